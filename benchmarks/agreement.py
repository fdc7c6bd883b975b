"""Captured steps beside the program's own: every objective on every program of the catalogue that it fits.

OMP_NUM_THREADS=1 .venv/bin/python benchmarks/agreement.py

Each is fitted for a few steps by the program itself (``compile=False``), as a graph and compiled, from one seed. Shown
are the largest difference of a loss or part, over its size, and of a parameter tensor, over its norm; and why a path
was not taken. Writes `results/agreement.md`. `--quick` takes three programs and no compiler, and writes nothing.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from typing import Any

import pyro.infer
import torch
from versions import table, write

import ppl_gen as pg
from ppl_gen.inference import ELBO, IWAE, SVI, Adversarial, ContrastiveDivergence, WakeSleep, Walkback
from ppl_gen.models.catalogue import CATALOGUE

STEPS = 6
OBJECTIVES: dict[str, Any] = {
    "ELBO": ELBO(),
    "IWAE, K = 3": IWAE(particles=3),
    "Adversarial": Adversarial("non-saturating"),
    "ContrastiveDivergence": ContrastiveDivergence(),
    "WakeSleep": WakeSleep(),
    "Walkback": Walkback(),
    "pyro.infer.TraceEnum_ELBO": pyro.infer.TraceEnum_ELBO(strict_enumeration_warning=False),
}


def fitted(program: str, objective: Any, path: str | bool) -> pg.Fit | None:
    entry = CATALOGUE[program]
    try:
        algorithm = SVI(objective=objective, steps=STEPS)
        return pg.fit(entry.recipe(), entry.data(), algorithm, seed=1, compile=path, progress=False)
    except pg.IncompatibleError:
        return None


def difference(one: pg.Fit, other: pg.Fit) -> str:
    records = [(torch.tensor(one.records[name]), torch.tensor(other.records[name])) for name in one.records]
    losses = max(float(((a - b).abs() / (a.abs() + 1e-3)).nan_to_num(0.0).max()) for a, b in records)
    params = max(float((one.params[n] - other.params[n]).norm() / (one.params[n].norm() + 1e-6)) for n in one.params)
    return "none" if losses == params == 0.0 else f"{losses:.0e}, {params:.0e}"


def row(program: str, name: str, quick: bool) -> list[str] | None:
    own = fitted(program, OBJECTIVES[name], False)
    if own is None:
        return None
    cells, why = [program, name], []
    for path in ("graph",) if quick else ("graph", "inductor"):
        found = fitted(program, OBJECTIVES[name], path)
        assert found is not None
        taken, seconds = str(found.cost["path"]), float(found.cost["capture_seconds"])
        shown = f"{difference(own, found)} ({seconds:.1f} s)" if taken == path else f"{taken} ran"
        cells.append(shown)
        if "path_reason" in found.cost and str(found.cost["path_reason"]) not in why:
            why.append(str(found.cost["path_reason"]))
    return [*cells, "; ".join(why)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three programs, no compiler; nothing is written")
    quick = parser.parse_args().quick
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)  # Pyro tells of the plates that it guesses
    began, lines = time.perf_counter(), []
    for program in list(CATALOGUE)[: 3 if quick else None]:
        for name in OBJECTIVES:
            if (found := row(program, name, quick)) is not None:
                lines.append(found)
                print(" | ".join(found), flush=True)
    if quick:
        return
    head = ["program", "objective", "graph", "compiled", "why not"]
    about = (
        f"{STEPS} steps from one seed, beside the same steps by the program itself: the largest difference of a loss "
        "or part over its size, and of a parameter tensor over its norm (in brackets what building it took)."
    )
    write(
        "agreement",
        "Captured steps beside the program's own",
        f"{about}\n\n{table(head, lines)}",
        time.perf_counter() - began,
    )


if __name__ == "__main__":
    main()
