"""A ring of eight modes and a grid of 25 by games, over several seeds, beside the same game by hand in PyTorch.

What is counted: modes that have a sample within three standard deviations, and the share of the samples that lie so
near to one. ``--quick`` shortens all and writes no results; ``--seeds N`` changes the number of seeds.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import softplus
from versions import table, write

import ppl_gen as pg
from ppl_gen.inference import SVI, Adversarial
from ppl_gen.models import gan

LATENT, BATCH, ROWS, SAMPLES, DECAY = 16, 256, 5000, 2500, 0.99


@dataclass(frozen=True)
class Setting:
    """Data whose modes are known, and what learns them."""

    name: str
    modes: Tensor
    sd: float
    hidden: tuple[int, ...]
    weight: float
    steps: int

    def rows(self) -> Tensor:
        noise = torch.Generator().manual_seed(0)
        chosen = self.modes[torch.randint(len(self.modes), (ROWS,), generator=noise)]
        return chosen + self.sd * torch.randn(ROWS, 2, generator=noise)


def _settings() -> tuple[Setting, ...]:
    turns = torch.arange(8) * (2 * math.pi / 8)
    ring = 2 * torch.stack([turns.cos(), turns.sin()], -1)
    grid = 2 * torch.cartesian_prod(torch.arange(-2.0, 3), torch.arange(-2.0, 3))
    return (
        Setting("ring of 8", ring, 0.02, (128, 128), 0.1, 4000),
        Setting("grid of 25", grid, 0.05, (256, 256, 256), 0.0125, 9000),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, nothing written to results/")
    parser.add_argument("--seeds", type=int, default=3, help="of each game")
    options = parser.parse_args()
    began, lines, drawn = time.perf_counter(), [], {}
    for setting in _settings():
        rows, steps = setting.rows(), 5 if options.quick else setting.steps
        for way, play in (("ppl_gen", by_library), ("PyTorch by hand", by_hand)):
            found, start = [], time.perf_counter()
            for seed in range(1 if options.quick else options.seeds):
                samples = play(setting, rows, steps, seed)
                found.append(pg.modes_covered(samples, setting.modes, within=3 * setting.sd))
                drawn.setdefault(f"{setting.name}, {way}", samples)
            seconds = (time.perf_counter() - start) / len(found)
            lines.append(_line(setting, way, steps, found, seconds))
            print(*lines[-1], sep=" | ", flush=True)
    if not options.quick:
        _written(lines, drawn, options.seeds, time.perf_counter() - began)


def by_library(setting: Setting, rows: Tensor, steps: int, seed: int) -> Tensor:
    torch.manual_seed(seed)
    objective = Adversarial(critic=_critic(setting, rows), penalty="r1", penalty_weight=setting.weight)
    algorithm = SVI(objective, steps=steps, batch_size=BATCH)
    return pg.fit(gan(hidden=setting.hidden), rows, algorithm, seed=seed, progress=False).sample(SAMPLES, seed=1)["x"]


def by_hand(setting: Setting, rows: Tensor, steps: int, seed: int) -> Tensor:
    """The same game without programs, fits or the library's loop: sizes, optimisers, penalty and average are equal."""
    torch.manual_seed(seed)
    loc, scale = rows.mean(0), rows.std(0)
    critic, generator = _critic(setting, rows), _perceptron((LATENT, *setting.hidden, 2), nn.ReLU)
    average = copy.deepcopy(generator)
    ours, theirs = (
        torch.optim.Adam(network.parameters(), lr=1e-3, betas=(0.5, 0.99), fused=True)
        for network in (generator, critic)
    )
    for _ in range(steps):
        real = rows[torch.randint(len(rows), (BATCH,))].requires_grad_()
        with torch.no_grad():
            fake = loc + scale * generator(torch.randn(BATCH, LATENT))
        score = critic(real)
        (slope,) = torch.autograd.grad(score.sum(), real, create_graph=True)
        penalty = (scale * slope).square().sum(1).mean() / 2
        loss = softplus(-score).mean() + softplus(critic(fake)).mean() + setting.weight * penalty
        theirs.zero_grad()
        loss.backward()
        theirs.step()
        loss = softplus(-critic(loc + scale * generator(torch.randn(BATCH, LATENT)))).mean()
        ours.zero_grad()
        loss.backward()
        ours.step()
        with torch.no_grad():
            for kept, now in zip(average.parameters(), generator.parameters(), strict=True):
                kept.lerp_(now, 1 - DECAY)
    with torch.no_grad():
        return loc + scale * average(torch.randn(SAMPLES, LATENT))


def _critic(setting: Setting, rows: Tensor) -> nn.Module:
    first = nn.Linear(2, 2)
    with torch.no_grad():
        first.weight.copy_(torch.diag(1 / rows.std(0)))
        first.bias.copy_(-rows.mean(0) / rows.std(0))
    first.requires_grad_(False)
    return nn.Sequential(first, _perceptron((2, *setting.hidden, 1), lambda: nn.LeakyReLU(0.2)))


def _perceptron(sizes: Sequence[int], between: Callable[[], nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(before, after), between()]
    return nn.Sequential(*layers[:-1])


def _line(setting: Setting, way: str, steps: int, found: Sequence[tuple[int, float]], seconds: float) -> list[str]:
    modes = ", ".join(str(count) for count, _ in found)
    shares = ", ".join(f"{share:.0%}" for _, share in found)
    return [setting.name, way, str(steps), modes, shares, f"{seconds:.0f} s"]


def _written(lines: list[list[str]], drawn: dict[str, Tensor], seeds: int, took: float) -> None:
    figure = Figure(figsize=(3.2 * len(drawn), 3.4), layout="constrained")
    for axis, (name, samples) in zip(figure.subplots(1, len(drawn)), drawn.items(), strict=True):
        axis.plot(*samples.T, ".", markersize=1)
        axis.set_aspect("equal")
        axis.set_title(name, fontsize=9)
    figure.savefig(Path(__file__).parent / "results" / "modes.png", dpi=110)
    body = (
        f"{seeds} seeds; {SAMPLES} samples of each, counted within three standard deviations of a mode. The ring has "
        "radius 2 and standard deviation 0.02, the grid modes two apart and 0.05. Generator and critic are perceptrons "
        "(128, 128) on the ring, (256, 256, 256) on the grid; the non-saturating game under R1 (weight 0.1, 0.0125), "
        f"Adam at 1e-3 (betas 0.5 and 0.99), batches of {BATCH}, one update each in turn, and the average of the "
        "generator's parameters (0.99) at the end.\n\n"
        + table(["", "", "updates", "modes, by seed", "near a mode, by seed", "time of a run"], lines)
        + "\n\n![Samples of the first seed](modes.png)\n"
    )
    write("modes", "Games on known modes", body, took)


if __name__ == "__main__":
    main()
