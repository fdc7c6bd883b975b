"""A handful of rows for each kind of model, the same ones each time."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from ppl_gen.models.variational.semi_supervised import m1

__all__ = [
    "bars",
    "first_stage",
    "labelled_bars",
    "letters",
    "ring",
    "ripples",
    "small_network",
    "some_labelled",
    "squares",
    "two_factors",
    "two_groups",
    "two_regimes",
]


def two_groups() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, generator=generator, dtype=torch.float64)
    return torch.where(torch.arange(40) < 16, 0.6 * rows - 2.0, rows + 1.5)


def two_regimes() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    regime = (torch.arange(8) // 4 + torch.arange(6).unsqueeze(-1)) % 2
    return 3.0 * regime + 0.7 * torch.randn(6, 8, generator=generator, dtype=torch.float64)


def bars() -> Tensor:
    lines = (torch.arange(8).unsqueeze(-1) >> torch.arange(3)) & 1
    rows = lines.unsqueeze(-1).expand(8, 3, 3)
    return torch.cat([rows, rows.mT]).flatten(1).to(torch.float64)


def some_labelled() -> dict[str, Tensor]:
    direction = torch.arange(16) // 8
    return {"x": bars(), "y": torch.where(torch.arange(16) % 4 == 1, direction, -1)}


def labelled_bars() -> dict[str, Tensor]:
    return {"x": bars(), "y": torch.arange(16) // 8}


@functools.cache
def first_stage() -> Any:
    """A fit of `m1` for `m1_m2` to stand on."""
    from ppl_gen.fits.driver import fit
    from ppl_gen.inference import SVI

    return fit(m1(latent=2, hidden=(8,)), bars(), SVI(steps=5), seed=0, progress=False)


def two_factors() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(40, 2, generator=generator) @ torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 1.0, 1.0, 0.5]])
    return factors + 0.5 * torch.randn(40, 4, generator=generator)


def ring() -> Tensor:
    angle = torch.arange(40) * (2 * math.pi / 40)
    return 2 * torch.stack([angle.cos(), angle.sin()], -1)


def ripples() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    place = 2 * math.pi * torch.rand(24, 1, 1, 1, generator=generator)
    across = torch.arange(4).unsqueeze(-1) + 2.0 * torch.arange(4)
    return (across + place).sin() + 0.2 * torch.randn(24, 1, 4, 4, generator=generator)


def squares() -> Tensor:
    """Images of 8 x 8 pixels, a bright square of 4 x 4 somewhere in each."""
    at = torch.arange(16)
    inside = [
        (torch.arange(8) - start.unsqueeze(-1) < 4) & (torch.arange(8) >= start.unsqueeze(-1))
        for start in (at // 4, at % 4)
    ]
    return (inside[0].unsqueeze(-1) & inside[1].unsqueeze(-2)).unsqueeze(1).to(torch.float64)


@functools.cache
def small_network() -> nn.Module:
    """A network from pairs to one number each, for `energy_model`; always the same weights."""
    network = nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 1))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return network


def letters() -> dict[str, Tensor]:
    codes = (torch.arange(6) * (1 + torch.arange(8).unsqueeze(-1) % 2)) % 3
    return {"x": codes, "lengths": 6 - torch.arange(8) % 3}
