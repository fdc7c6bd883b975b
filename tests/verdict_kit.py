"""What the test bed of verdicts is made of: a case, data by seed, and fits whose guide stays as it was written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

import ppl_gen as pg
from ppl_gen.inference import SVI

UNTRAINED = SVI(steps=1, lr=1e-12)


@dataclass(frozen=True)
class Case:
    """``make(seed)`` gives the fit; ``good``: True must be trusted (9 times of 10), False never, None either way."""

    name: str
    make: Callable[[int], pg.Fit]
    good: bool | None


def rows(seed: int, n: int = 30, loc: float = 1.0) -> torch.Tensor:
    return loc + torch.randn(n, generator=source(seed))


def source(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + seed)


def as_written(program, guide, data: Callable[[int], object]) -> Callable[[int], pg.Fit]:
    return lambda seed: pg.fit(pg.Program(program, guide), data(seed), UNTRAINED, seed=seed)


def falling(steps: int) -> Callable[[torch.optim.Optimizer], object]:
    """A rate that falls to a thousandth over a run of so many steps."""
    return lambda optimiser: torch.optim.lr_scheduler.ExponentialLR(optimiser, 1e-3 ** (1 / steps))
