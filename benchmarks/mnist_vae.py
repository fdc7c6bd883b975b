"""VAE and IWAE on dynamically binarised MNIST: the evidence of the test images, over epochs and at the end.

One stochastic layer of 50, two hidden layers of 200 tanh units (Burda, Grosse and Salakhutdinov 2016). Stops and goes
on: every stage of training and every evidence lies in ``benchmarks/.work``. ``--train`` only trains; ``--quick``
shortens all and writes no results.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from stages import WORK, recorded, trained
from versions import table, write

import ppl_gen as pg
from ppl_gen.inference import ELBO, IWAE, SVI
from ppl_gen.models import vae

RATES = (1e-3, 1e-3, 5e-4, 2e-4, 1e-4)
OBJECTIVES: dict[str, Any] = {"VAE": ELBO(), "IWAE, K = 5": IWAE(5), "IWAE, K = 50": IWAE(50)}
PAPER = {"VAE": 86.76, "IWAE, K = 5": 85.54, "IWAE, K = 50": 84.78}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", action="store_true", help="train only")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, nothing written to results/")
    options = parser.parse_args()
    began, quick = time.perf_counter(), options.quick
    stages, epochs = (RATES[:2], 1) if quick else (RATES, 4)
    whole = pg.load_data("mnist", split="train", binarize="dynamic")
    train = _first(whole, 1000) if quick else whole
    test = pg.load_data("mnist", split="test", binarize="fixed")["x"]
    folder = WORK / ("mnist_vae-quick" if quick else "mnist_vae")
    fits, seconds = {}, {}
    for name, objective in OBJECTIVES.items():
        runs = [SVI(objective, epochs=epochs, batch_size=100, lr=rate) for rate in stages]
        fits[name], seconds[name] = trained(folder / _plain(name), vae(784, latent=50), train, runs)
    if options.train:
        return
    # Spread over the file: its first half is written more cleanly than its second.
    tenth, chosen, particles = test[::10], test[::500] if quick else test[::4], 50 if quick else 5000
    curves = {n: [_evidence(folder, n, i, fit, tenth, 500) for i, fit in enumerate(f)] for n, f in fits.items()}
    final = {n: _evidence(folder, n, "final", f[-1], chosen, particles) for n, f in fits.items()}
    units = {n: recorded(folder / f"{_plain(n)}-units.json", lambda f=f: _units(f[-1], test)) for n, f in fits.items()}
    if not quick:
        _picture(curves, epochs)
        _written(curves, final, units, seconds, epochs, time.perf_counter() - began)


def _first(rows: Any, count: int) -> Any:
    from ppl_gen.data.rows import Rows

    return Rows({name: value[:count] for name, value in rows.items()}, rows.on_batch)


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def _evidence(folder: Path, name: str, key: Any, fit: pg.Fit, test: Any, particles: int) -> dict[str, Any]:
    def make() -> dict[str, Any]:
        found = fit.evidence(test, particles=particles, chunk=200, seed=0)
        print(name, key, found, flush=True)
        return {"mean": found.mean, "stderr": found.stderr, "mc": found.mc_stderr, "values": found.values.tolist()}

    return recorded(folder / f"{_plain(name)}-{key}-{len(test)}-{particles}.json", make)


def _units(fit: pg.Fit, test: Any) -> dict[str, Any]:
    from ppl_gen.diagnostics.units import active_units

    return {"active": int(active_units(fit, test).active.sum())}


def _picture(curves: dict[str, list[dict[str, Any]]], epochs: int) -> None:
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, values in curves.items():
        axes.plot([epochs * (i + 1) for i in range(len(values))], [-v["mean"] for v in values], "o-", label=name)
    axes.set_xlabel("epochs")
    axes.set_ylabel("negative evidence, nats per image")
    axes.legend(frameon=False)
    figure.savefig(Path(__file__).parent / "results" / "mnist_vae.png", dpi=120)


def _written(curves: Any, final: Any, units: Any, seconds: Any, epochs: int, took: float) -> None:
    head = ["", *(f"{epochs * (i + 1)} epochs" for i in range(len(RATES)))]
    over = [[name, *(f"{-v['mean']:.2f}" for v in values)] for name, values in curves.items()]
    base = final["VAE"]["values"]
    last = []
    for name, found in final.items():
        gains = [a - b for a, b in zip(found["values"], base, strict=True)]
        mean = sum(gains) / len(gains)
        spread = (sum((g - mean) ** 2 for g in gains) / max(1, len(gains) - 1) / len(gains)) ** 0.5
        last.append(
            [
                name,
                f"{-found['mean']:.2f} +- {found['stderr']:.2f}",
                "" if name == "VAE" else f"{mean:.2f} +- {spread:.2f}",
                str(units[name]["active"]),
                f"{PAPER[name]:.2f}",
                f"{seconds[name] / 60:.0f} min",
            ]
        )
    columns = ["", "negative evidence (nats)", "gain over the VAE, paired", "active units", "paper", "training"]
    body = (
        f"{len(base)} test images (every fourth one), binarised once; evidence by importance weighting, the "
        f"guide as proposal, 5000 particles; one seed; batches of 100, Adam at {', '.join(f'{r:g}' for r in RATES)}, "
        f"{epochs} epochs each. The paper trained for 3280 epochs with batches of 20.\n\n"
        + table(columns, last)
        + "\n\nOver epochs, on every tenth test image with 500 particles (negative evidence, nats):\n\n"
        + table(head, over)
        + "\n\n![Negative evidence over epochs](mnist_vae.png)\n"
    )
    write("mnist_vae", "VAE and IWAE on dynamically binarised MNIST", body, took)


if __name__ == "__main__":
    main()
