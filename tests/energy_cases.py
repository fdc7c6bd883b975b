"""Small machines whose states can all be listed: what the tests of energies share."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from ppl_gen.data.batching import Batch
from ppl_gen.inference.gradients import gradients
from ppl_gen.inference.objectives.game import Game, Setting
from ppl_gen.program.dry_run import dry_run

__all__ = ["bars", "batch_of", "codes_of", "frequency_gap", "mean_gradient", "played", "randomise", "states"]


def states(units: int) -> Tensor:
    """Every state of so many zeros and ones, the first unit slowest."""
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=units)))


def codes_of(rows: Tensor) -> Tensor:
    """The place of each row in `states`."""
    return (rows.long() * 2 ** torch.arange(rows.shape[1] - 1, -1, -1)).sum(1)


def frequency_gap(rows: Tensor, chances: Tensor) -> float:
    """The largest |z| of how often each state was drawn."""
    seen = torch.bincount(codes_of(rows), minlength=len(chances)) / len(rows)
    return float(((seen - chances) / (chances * (1 - chances) / len(rows)).sqrt()).abs().max())


def bars(side: int) -> Tensor:
    """Every pattern of full rows, and every pattern of full columns."""
    patterns = {tuple(p for p in line for _ in range(side)) for line in itertools.product((0, 1), repeat=side)}
    patterns |= {tuple(line) * side for line in itertools.product((0, 1), repeat=side)}
    return torch.tensor(sorted(patterns), dtype=torch.float32)


def randomise(module: torch.nn.Module, scale: float = 1.0) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=scale)


def batch_of(x: Tensor) -> Batch:
    return Batch((x,), {}, len(x), len(x))


def played(program: Any, objective: Any, x: Tensor) -> tuple[Game, Batch]:
    """The game of an objective on all rows."""
    batch = batch_of(x)
    guide = program.guide if objective.uses_guide else None
    info = dry_run(program, batch, guide=guide)
    return objective.build(Setting(program, program.model, guide, info, batch)), batch


def mean_gradient(game: Game, player: str, leaves: list[Tensor], batch: Batch, count: int) -> tuple[Tensor, Tensor]:
    """Mean over independent draws of a player's gradient, flat, and its standard error."""
    draws = []
    for _ in range(count):
        found = gradients(game, player, leaves, batch, game.init(batch)).gradients
        draws.append(torch.cat([grad.flatten() for grad in found]))
    flat = torch.stack(draws)
    return flat.mean(0), flat.std(0) / count**0.5
