"""Diffusion of MNIST at a stated budget: bits per dimension as a bound, by objective and schedule.

Grey levels get uniform noise that fills their intervals, so that the bound on the density of [0, 1]^784 is one on the
probability of the 256 levels (Theis, van den Oord and Bethge 2016). ``--quick`` shortens all and writes no results.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from versions import table, write

import ppl_gen as pg
from ppl_gen.inference import ELBO, SVI, SimpleDiffusion
from ppl_gen.models import bits_per_dimension, denoising_diffusion

RUNS: dict[str, tuple[Any, dict[str, Any]]] = {
    "bound, linear schedule": (ELBO(), {}),
    "bound, learned schedule": (ELBO(), {"schedule": "learned"}),
    "plain error, linear schedule": (SimpleDiffusion(), {}),
}
LEVELS = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, nothing written to results/")
    parser.add_argument("--steps", type=int, default=1000, help="updates of each run")
    options = parser.parse_args()
    began, quick = time.perf_counter(), options.quick
    steps = 5 if quick else options.steps
    train, test = (_levels(split, 64 if quick else None) for split in ("train", "test"))
    test = test[:: len(test) // 8] if quick else test[::20]
    lines = []
    for name, (objective, arguments) in RUNS.items():
        schedule = lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, steps)  # noqa: E731
        algorithm = SVI(objective, steps=steps, batch_size=64, lr=2e-3, schedule=schedule)
        fit = pg.fit(denoising_diffusion(steps=50, hidden=16, **arguments), train, algorithm, seed=0, progress=False)
        found = fit.evidence(test, particles=1, chunk=100, seed=0)
        dimensions = test[0].numel()
        bits = bits_per_dimension(found, dimensions, levels=LEVELS)
        error = bits_per_dimension(found.mean - found.stderr, dimensions, levels=LEVELS) - bits
        lines.append([name, f"{bits:.3f} +- {error:.3f}", f"{fit.cost['seconds']:.0f} s"])
        print(*lines[-1], sep=" | ", flush=True)
    body = (
        f"A U-Net of 16 channels and 3 levels, 50 time steps, {steps} updates of 64 images by Adam (2e-3, falling); "
        f"one seed; {len(test)} test images (every twentieth), whole chains, one draw of each.\n\n"
        + table(["trained by", "bits per dimension, at most", "training"], lines)
        + "\n\nPublished: NICE 4.36 (Dinh et al. 2015).\n"
    )
    if not quick:
        write("diffusion_images", "Diffusion of MNIST in bits per dimension", body, time.perf_counter() - began)


def _levels(split: str, count: int | None) -> torch.Tensor:
    """Images in [0, 1] with noise within their levels."""
    x = pg.load_data("mnist", split=split, images=True)["x"][:count]
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    return ((x * (LEVELS - 1)).round() + noise) / LEVELS


if __name__ == "__main__":
    main()
