"""NUTS, SVI, Laplace and Pathfinder on six posteriors of posteriordb, against its reference draws.

Every posterior gets the same settings; none was tuned for its own sake.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import joblib
import numpy as np
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from versions import table, write

import ppl_gen as pg
from ppl_gen.inference import NUTS, SVI, Laplace, Pathfinder

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from posteriordb_programs import POSTERIORS  # noqa: E402

SVI_SETTINGS = SVI()
NUTS_SETTINGS = NUTS(draws=500, warmup=500, chains=4, processes=1)
GUIDES = {"AutoNormal": AutoNormal, "AutoMultivariateNormal": AutoMultivariateNormal}
QUICK = {"Laplace": Laplace(), "Pathfinder": Pathfinder()}

ABOUT = f"""
Six posteriors with reference draws (tests/data/posteriordb). The error of a mean is in units of the reference's
standard deviation, the largest over all parameters; the sd ratio is ours over the reference's, smallest and largest.

- NUTS: draws={NUTS_SETTINGS.draws}, warmup={NUTS_SETTINGS.warmup}, chains={NUTS_SETTINGS.chains}, all else default,
  seed 0, float64, one process. ESS and R-hat are the worst over the parameters.
- SVI: `SVI()`, no setting given, seed 0: the guide begins at quasi-Newton paths, Adam moves it in units of their
  normal, iterates are averaged, the trend of the loss ends the run. Means and sds from 4000 draws of the guide. k-hat
  is the joint one; where the guide factorises over rows with latents of their own, the largest k-hat of a row stands
  beside it.
- Laplace and Pathfinder: all default, seed 0, draws and k-hats as for SVI.
- Draws of a program that offers `relabel` are relabelled before they are compared: the order of its components means
  nothing. NUTS does so by itself.

A mean-field guide is not expected to get the sds of correlated parameters right. Seconds are those of the wall clock,
two fits running side by side.
"""


def numbers(posterior, sites):
    """Largest |error of a mean| in reference sds, smallest and largest ratio of sds."""
    errors, ratios = [], []
    for name, draws in posterior.draws(sites).items():
        reference = posterior.reference[name]
        errors.append(abs(float(draws.mean()) - reference["mean"]) / reference["sd"])
        ratios.append(float(draws.std()) / reference["sd"])
    return max(errors), min(ratios), max(ratios)


def grade(frame):
    """ "trust", "doubtful" or "do not trust"."""
    return frame.attrs["verdict"].split(":")[0]


def by_normals(posterior, label):
    began = time.perf_counter()
    program = replace(posterior.program, guide=GUIDES.get(label))
    fit = pg.fit(program, posterior.data, QUICK.get(label, SVI_SETTINGS), seed=0)
    seconds = time.perf_counter() - began
    draws = {name: value.unsqueeze(0) for name, value in fit.posterior(draws=4000, seed=1).items()}
    if posterior.program.relabel is not None:
        draws = dict(posterior.program.relabel(draws))
    error, low, high = numbers(posterior, draws)
    frame = fit.diagnose(draws=2000)
    k = f"{frame.attrs['pareto_k']:.2f}"
    if "pareto_k_rows" in frame.attrs:
        k += f", rows {np.max(frame.attrs['pareto_k_rows']):.2f}"
    return [f"{error:.2f}", f"{low:.2f} to {high:.2f}", k, grade(frame), f"{seconds:.0f}"]


def by_nuts(posterior):
    import arviz

    began = time.perf_counter()
    fit = pg.fit(posterior.program, posterior.data, NUTS_SETTINGS, seed=0)
    seconds = time.perf_counter() - began
    sites = fit.learned.draws  # chains x draws x shape
    error, low, high = numbers(posterior, sites)
    named = {name: value.numpy() for name, value in posterior.draws(sites).items()}
    summary = arviz.summary(arviz.convert_to_dataset(named), kind="diagnostics", round_to="none")
    return [
        f"{error:.3f}",
        f"{low:.2f} to {high:.2f}",
        f"{summary['ess_bulk'].min():.0f}",
        f"{summary['r_hat'].max():.4f}",
        f"{fit.cost['divergences']:.0f}",
        grade(fit.diagnose()),
        f"{seconds:.0f}",
    ]


def measured(name, label):
    torch.set_num_threads(1)
    posterior = POSTERIORS[name]
    row = [name, *by_nuts(posterior)] if label == "NUTS" else [name, label, *by_normals(posterior, label)]
    print(" | ".join(row), flush=True)
    return row


def main():
    began = time.perf_counter()
    tasks = [(name, label) for name in POSTERIORS for label in ("NUTS", *QUICK, *GUIDES)]
    rows = joblib.Parallel(n_jobs=2, batch_size=1)(joblib.delayed(measured)(*task) for task in tasks)
    nuts = [row for row, (_, label) in zip(rows, tasks, strict=True) if label == "NUTS"]
    svi = [row for row, (_, label) in zip(rows, tasks, strict=True) if label in GUIDES]
    quick = [row for row, (_, label) in zip(rows, tasks, strict=True) if label in QUICK]
    common = ["mean error / sd", "sd ratio"]
    body = [
        ABOUT,
        "## NUTS",
        table(["posterior", *common, "bulk ESS", "R-hat", "divergences", "verdict", "seconds"], nuts),
        "## SVI",
        table(["posterior", "guide", *common, "k-hat", "verdict", "seconds"], svi),
        "## Laplace and Pathfinder",
        table(["posterior", "algorithm", *common, "k-hat", "verdict", "seconds"], quick),
    ]
    text = "\n\n".join(part.strip() for part in body)
    write("posteriordb", "Six posteriors of posteriordb", text, time.perf_counter() - began)


if __name__ == "__main__":
    main()
