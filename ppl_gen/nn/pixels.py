r"""Pixels as what is seen of a number between 0 and 1: the interval that it lies in.

.. math:: x = \frac{k}{L - 1}, \quad k = \lfloor L v \rfloor, \quad
          p(x) = \int_{k/L}^{(k+1)/L} p(v) \, dv \ge \exp \mathbb{E}_{v \sim \mathrm{Uniform}(k/L, (k+1)/L)}
          [\log p(v)] \, L^{-1}

for each pixel of L levels; the bound is what is published as the bits of a model of dequantised pixels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.distributions import biject_to

__all__ = ["Dequantised", "Quantised"]

_ROUNDING = 1e-3  # of an interval: 255 + u is rounded to 1.5e-5 in float32


class _Levels(constraints.Constraint):
    """0, 1 / (levels - 1), ..., 1, within rounding."""

    def __init__(self, levels: int) -> None:
        self.levels = levels
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        place = value * (self.levels - 1)
        level = place.round()
        return ((place - level).abs() < _ROUNDING) & (level >= 0) & (level < self.levels)

    def __repr__(self) -> str:
        return f"{self.levels} levels: 0, 1/{self.levels - 1}, ..., 1"


@biject_to.register(_Levels)  # where the values are unknown they are read as numbers between 0 and 1
def _of_levels(constraint: _Levels) -> Any:
    return biject_to(constraints.unit_interval)


class Quantised(TorchDistribution):
    r"""p(x | v): the level of the interval that v lies in, for certain.

    The ends of an interval belong to both of its neighbours, within rounding: a set without volume. Numbers beyond 0
    and 1 have no level, and count against a model that draws them; a draw of x has the nearest one then. Values
    between the levels are outside of the support.

    Args:
        v: numbers between 0 and 1.
        levels: how many.

    References:
        A note on the evaluation of generative models (Theis, van den Oord and Bethge, 2016), section 3.1.

    Example:
        >>> four = Quantised(torch.tensor([0.1, 0.3, 0.99]), 4)
        >>> four.sample()
        tensor([0.0000, 0.3333, 1.0000])
        >>> four.log_prob(torch.tensor([0.0, 0.0, 1.0]))
        tensor([0., -inf, 0.])
    """

    arg_constraints: dict[str, Any] = {}
    has_rsample = False

    def __init__(self, v: Tensor, levels: int, validate_args: bool | None = None) -> None:
        self.v, self.levels = v, levels
        super().__init__(v.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Quantised:
        return type(self)(self.v.expand(batch_shape), self.levels)

    @property
    def support(self) -> Any:
        return _Levels(self.levels)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        level = (self.v * self.levels).floor().clamp(0, self.levels - 1) / (self.levels - 1)
        return level.expand(torch.Size(sample_shape) + self.batch_shape).detach()

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        middle = (value * (self.levels - 1)).round() + 0.5
        inside = (self.v * self.levels - middle).abs() <= 0.5 + _ROUNDING
        return torch.where(inside, 0.0, -math.inf).to(self.v)


class Dequantised(TorchDistribution):
    r"""q(v | x): evenly in the interval of the level of x, with the density L of levels for each pixel.

    Args:
        x: levels, 0, 1 / (L - 1), ..., 1.
        levels: L.

    Example:
        >>> even = Dequantised(torch.tensor([0.0, 1.0]), 2)
        >>> v = even.rsample()
        >>> bool((v[0] <= 0.5) & (v[1] >= 0.5)), even.log_prob(v).exp()
        (True, tensor([2., 2.]))
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.unit_interval
    has_rsample = True

    def __init__(self, x: Tensor, levels: int, validate_args: bool | None = None) -> None:
        self.x, self.levels = x, levels
        super().__init__(x.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Dequantised:
        return type(self)(self.x.expand(batch_shape), self.levels)

    @property
    def mean(self) -> Tensor:
        return ((self.x * (self.levels - 1)).round() + 0.5) / self.levels

    @property
    def variance(self) -> Tensor:
        return torch.full_like(self.x, 1 / (12 * self.levels**2))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        low = (self.x * (self.levels - 1)).round().expand(torch.Size(sample_shape) + self.batch_shape)
        return (low + torch.rand_like(low)) / self.levels

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        inside = (value - self.mean).abs() * self.levels <= 0.5 + _ROUNDING
        return torch.where(inside, math.log(self.levels), -math.inf).to(value)
