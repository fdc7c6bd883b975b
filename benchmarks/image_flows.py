"""NICE, RealNVP and Glow on MNIST at a small budget: bits per dimension of test images, beside the published ones.

Every flow has the same seconds of one core (``--minutes``, 2 unless given, each); the papers took days of GPUs. Stops
and goes on; ``--quick`` shortens all and writes no results.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from stages import WORK, recorded, trained
from versions import table, write

import ppl_gen as pg
from ppl_gen.inference import SVI
from ppl_gen.models import bits_per_dimension, glow, nice, real_nvp

PIXELS = 28 * 28
BATCH, TRIED = 64, 30  # rows in a batch; steps from which the seconds of one are told
RECIPES: dict[str, tuple[Any, bool]] = {  # and whether it reads images or flat rows
    "NICE": (nice(PIXELS, layers=4, hidden=(500, 500, 500), levels=256), False),
    "RealNVP": (real_nvp((1, 28, 28), channels=16, blocks=1, levels=256), True),
    "Glow": (glow((1, 28, 28), steps=4, channels=24, blocks=1, levels=256), True),
}
PAPER = {"NICE": "4.36 (1980.50 nats)", "RealNVP": "1.06", "Glow": "1.05"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, nothing written to results/")
    parser.add_argument("--minutes", type=float, default=2.0, help="of training for each flow")
    options = parser.parse_args()
    began, quick = time.perf_counter(), options.quick
    folder = WORK / ("image_flows-quick" if quick else "image_flows")
    train, test = (pg.load_data("mnist", split=split, images=True)["x"] for split in ("train", "test"))
    chosen = test[:: 1000 if quick else 20]
    rows = []
    for name, (recipe, images) in RECIPES.items():
        shape = (-1, 1, 28, 28) if images else (-1, PIXELS)
        data, held_out = train.reshape(shape), chosen.reshape(shape)
        if quick:
            data, steps = data[:200], 6
        else:
            steps = _affordable(folder, name, recipe, data, 60 * options.minutes)
        runs = [SVI(steps=steps // 2, batch_size=BATCH, lr=rate) for rate in (1e-3, 3e-4)]
        fits, seconds = trained(folder / name.lower(), recipe, data, runs)
        numbers = sum(value.numel() for value in fits[-1].params.values())
        found = {n: _bits(folder, name, fits[-1], held_out, n) for n in ((1,) if quick else (1, 64))}
        print(name, found, f"{seconds:.0f} s", flush=True)
        rows.append(
            [
                name,
                *(f"{value['bits']:.3f} +- {value['stderr']:.3f}" for value in found.values()),
                PAPER[name],
                f"{numbers / 1e6:.2f}",
                f"{2 * (steps // 2)}",
                f"{seconds / 60:.1f} min",
            ]
        )
    if not quick:
        _written(rows, len(chosen), options.minutes, time.perf_counter() - began)


def _affordable(folder: Path, name: str, recipe: Any, data: Any, seconds: float) -> int:
    """How many steps fit into the budget, by the time of some."""

    def make() -> dict[str, Any]:
        fit = pg.fit(recipe, data, SVI(steps=TRIED, batch_size=BATCH), seed=0, progress=False)
        return {"step": float(fit.cost["seconds"]) / TRIED}

    step = recorded(folder / f"{name.lower()}-step.json", make)["step"]
    return max(2, int(seconds / step))


def _bits(folder: Path, name: str, fit: pg.Fit, rows: torch.Tensor, particles: int) -> dict[str, Any]:
    def make() -> dict[str, Any]:
        found = fit.evidence(rows, particles=particles, seed=0)
        return {
            "bits": bits_per_dimension(found, PIXELS),
            "stderr": bits_per_dimension(-found.stderr, PIXELS),
        }

    return recorded(folder / f"{name.lower()}-{particles}-{len(rows)}.json", make)


def _written(rows: list[list[str]], images: int, minutes: float, took: float) -> None:
    head = ["", "bits per dimension, bound", "64 particles", "published", "million numbers", "steps", "training"]
    body = (
        f"{images} test images, every twentieth one; the bound is that of Theis et al., one draw of the noise that "
        "fills the interval of each pixel, as published numbers are; 64 particles are nearer to log p(x). "
        f"One seed, {minutes:g} minutes of one core for each flow, batches of {BATCH}, Adam at 1e-3 and then "
        "3e-4; no setting was searched for. The published runs had days of graphics cards: this says what a flow "
        "reaches in minutes, and that its bits are counted as theirs. How many steps fit is told by the time of some; "
        "the last column is what they took, on a machine that may have had other work.\n\n"
        + table(head, rows)
        + "\n\nNICE's published number is of rows in [0, 1] without a logit, as here.\n"
    )
    write("image_flows", "Flows of images on MNIST, at a small budget", body, took)


if __name__ == "__main__":
    main()
