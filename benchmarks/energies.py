"""A Boltzmann machine of 500 hidden units on binarised MNIST by persistent chains, its log-likelihood by annealing.

``--minutes N`` is the budget of training and of all annealing together. Training is one fit with one set of chains,
kept in a checkpoint; it is interrupted where the log-likelihood is estimated, and goes on. ``--quick`` shortens all and
writes no results.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from versions import table, write

import ppl_gen as pg
from ppl_gen.inference import SVI, ContrastiveDivergence
from ppl_gen.models import rbm

PUBLISHED = -86.34  # CD-25, 500 hidden units, AIS
STAGES = 8
CHAINS = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0, help="budget, most of it for training")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, nothing written to results/")
    parser.add_argument("--rate", type=float, default=0.2, help="of SGD at the start; it falls to zero")
    options = parser.parse_args()
    began = time.perf_counter()
    train = pg.load_data("mnist", split="train", binarize="dynamic")
    test = pg.load_data("mnist", split="test", binarize="fixed")["x"]
    hidden, seconds = (50, 1.0) if options.quick else (500, 60 * options.minutes)
    recipe = rbm(hidden=hidden)
    speed = _speed(recipe, train, options.rate)
    temperatures = 200 if options.quick else 10_000 if options.minutes >= 8 else 4000
    steps = max(20, int(0.75 * seconds / speed / STAGES))
    algorithm = _falling(STAGES * steps, options.rate)
    rows, fit = [], None
    with tempfile.TemporaryDirectory() as folder:
        for stage in range(1, STAGES + 1):
            stop = _stop_at(stage * steps)
            place = Path(folder) / "run"
            fit = pg.fit(recipe, train, algorithm, checkpoint=place, callbacks=[stop], progress=False)
            annealing = pg.AIS(temperatures=200 if options.quick else 1000, chains=50)
            minutes = stage * steps * speed / 60
            rows.append(_row(stage * steps, minutes, fit.evidence(test[::10], method=annealing)))
            print(rows[-1], flush=True)
    assert fit is not None
    final = fit.evidence(test, method=pg.AIS(temperatures=temperatures, chains=CHAINS))
    assert final.log_partition is not None
    machine = fit.module("machine")
    with torch.no_grad():
        seen = float(-machine.free_energy(_first(train, len(test))).mean()) - final.log_partition.forward
    print(final, seen, flush=True)
    if not options.quick:
        _picture(rows)
        _written(rows, final, seen, (steps, speed, temperatures, options.rate), time.perf_counter() - began)


def _first(rows: Any, count: int) -> Any:
    generator = torch.Generator().manual_seed(0)
    grey = rows["x"][:count]
    return (torch.rand(grey.shape, generator=generator) < grey).to(torch.float32)


def _falling(steps: int, rate: float) -> SVI:
    """A rate that falls in a straight line."""

    def line(optimiser: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.001, total_iters=steps)

    persistent = ContrastiveDivergence(persistent=True, chains=CHAINS)
    return SVI(persistent, steps=steps, batch_size=100, lr=rate, optimiser="sgd", schedule=line)


def _stop_at(last: int) -> Any:
    def callback(step: int, info: Mapping[str, Any]) -> None:
        if step == last:
            raise KeyboardInterrupt

    return callback


def _speed(recipe: Any, train: Any, rate: float) -> float:
    """Seconds of one step."""
    short = [
        pg.fit(recipe, train, _falling(steps, rate), seed=0, progress=False).cost["seconds"] for steps in (50, 250)
    ]
    return max(1e-4, (float(short[1]) - float(short[0])) / 200)


def _row(steps: int, minutes: float, found: Any) -> dict[str, Any]:
    z = found.log_partition
    return {
        "steps": steps,
        "minutes": minutes,
        "mean": found.mean,
        "stderr": found.stderr,
        "forward": z.forward,
        "reverse": z.reverse,
        "agrees": z.agrees,
    }


def _picture(rows: list[dict[str, Any]]) -> None:
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    minutes = [row["minutes"] for row in rows]
    axes.plot(minutes, [row["mean"] for row in rows], "o-", label="log Z forward")
    back = [row["mean"] + row["forward"] - row["reverse"] for row in rows]
    axes.plot(minutes, back, "s--", label="log Z in reverse")
    axes.axhline(PUBLISHED, color="0.5", linewidth=0.8, label="published, CD-25")
    axes.set_xlabel("minutes of training")
    axes.set_ylabel("log-likelihood of test images, nats")
    axes.legend(frameon=False)
    figure.savefig(Path(__file__).parent / "results" / "energies.png", dpi=120)


def _written(rows: Any, final: Any, seen: float, run: tuple[int, float, int, float], took: float) -> None:
    steps, speed, temperatures, rate = run
    head = ["updates", "minutes", "log-likelihood", "log Z forward", "in reverse", "agree"]
    curve = [
        [
            f"{row['steps']}",
            f"{row['minutes']:.1f}",
            f"{row['mean']:.2f} +- {row['stderr']:.2f}",
            f"{row['forward']:.2f}",
            f"{row['reverse']:.2f}",
            "yes" if row["agrees"] else "no",
        ]
        for row in rows
    ]
    z = final.log_partition
    last = [
        f"{final.mean:.2f} +- {final.stderr:.2f}",
        f"{seen:.2f}",
        f"{z.forward:.2f} +- {z.forward_stderr:.2f}",
        f"{z.reverse:.2f} +- {z.reverse_stderr:.2f}",
        z.doubt or "no doubt",
    ]
    epochs = STAGES * steps * 100 / 60_000
    body = (
        f"{STAGES * steps} updates ({epochs:.0f} epochs) in batches of 100 with {CHAINS} persistent chains, one sweep "
        f"an update, SGD at a rate that falls from {rate:g} to zero; {1000 * speed:.1f} ms an update. Training images "
        "are drawn as zeros and ones for every batch, test images once.\n\n"
        f"At the end, by {temperatures} temperatures and {CHAINS} chains each way (published for 500 hidden units and "
        f"CD-25: {PUBLISHED}; reproductions reach about -86.5 after 250 epochs):\n\n"
        + table(["test images (nats)", "training images", "log Z forward", "log Z in reverse", "verdict"], [last])
        + "\n\nOver time, on every tenth test image with 1000 temperatures and 50 chains:\n\n"
        + table(head, curve)
        + "\n\n![Log-likelihood over minutes](energies.png)\n"
    )
    write("energies", "A Boltzmann machine of MNIST by persistent chains", body, took)


if __name__ == "__main__":
    main()
