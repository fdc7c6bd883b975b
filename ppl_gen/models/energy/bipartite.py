r"""Zeros and ones in two groups without connections inside either: sums over one group, chains, and the way to coins.

.. math:: \log f(x) = u^\top x + \sum_j \log(1 + e^{c_j + (x^\top W)_j})

A restricted Boltzmann machine has x visible; in a deep one x are the layers of odd number and the sum runs over the
others, the visible layer among them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ppl_gen.program.extensions import Tempering

__all__ = ["ENUMERABLE", "TERMS", "Bipartite", "all_states", "few_states", "flip", "gained", "softplus_difference"]

ENUMERABLE = 16  # units of the smaller group: 65536 states, the most that log Z sums over
TERMS = 2**27  # of a sum over all states that stands beside annealing: two seconds
_LONG = 0.05  # steps of b from which a difference of two logarithms is precise enough
_BLOCK = 4096  # states at a time, so that the sum needs little memory


def flip(probability: Tensor) -> Tensor:
    """Coins of these probabilities, as numbers of the same type."""
    return (torch.rand_like(probability) < probability).to(probability.dtype)


def softplus_difference(at: Tensor, by: Tensor) -> Tensor:
    """log(1 + e^(at + by)) - log(1 + e^at), to full relative precision however small it is; ``by`` within 80 of zero.

    >>> softplus_difference(torch.tensor(20.0), torch.tensor(1e-4))
    tensor(1.0000e-04)
    """
    below = at < 0  # on either side the form whose logarithm never comes near that of zero
    part = (-at.abs()).sigmoid() * torch.expm1(torch.where(below, by, -by))
    return torch.where(below, 0.0, by) + torch.log1p(part)


def gained(base: Tensor, there: Tensor, old: float, new: float) -> Tensor:
    """log(1 + e^(base + new there)) - log(1 + e^(base + old there)), summed over the last dimension in float64."""
    if abs(new - old) > _LONG:
        wide = there.double()
        return (softplus(base + new * wide) - softplus(base + old * wide)).sum(-1)
    return softplus_difference(base + old * there, (new - old) * there).sum(-1, dtype=torch.float64)


@dataclass(frozen=True)
class Bipartite:
    """Both groups at the present parameters.

    Args:
        weight: W, outer x inner.
        outer: u, biases of the units x that states are made of.
        inner: c, biases of the units that are summed out.
        outer_base: biases of the outer units at b = 0, where all are coins on their own.
        inner_base: biases of the inner units there.
    """

    weight: Tensor
    outer: Tensor
    inner: Tensor
    outer_base: Tensor
    inner_base: Tensor

    def log_density(self, x: Tensor, b: Any = 1.0) -> Tensor:
        """log f_b(x), nats: ... x outer -> ..."""
        inside = (1 - b) * self.inner_base + b * (x @ self.weight + self.inner)
        return (x * ((1 - b) * self.outer_base + b * self.outer)).sum(-1) + softplus(inside).sum(-1)

    @torch.no_grad()
    def move(self, x: Tensor, b: Any, steps: int) -> Tensor:
        """``steps`` sweeps, inner units given outer ones and back; leaves f_b invariant."""
        for _ in range(steps):
            inner = flip(((1 - b) * self.inner_base + b * (x @ self.weight + self.inner)).sigmoid())
            x = flip(((1 - b) * self.outer_base + b * (inner @ self.weight.T + self.outer)).sigmoid())
        return x

    @torch.no_grad()
    def between(self, x: Tensor, old: float, new: float) -> tuple[Tensor, Tensor]:
        """A step of annealing, by two matrix products: see `Tempering`."""
        there = x @ self.weight + (self.inner - self.inner_base)
        gain = gained(self.inner_base, there, old, new)
        gain = gain + (new - old) * (x @ (self.outer - self.outer_base)).double()
        inner = flip((self.inner_base + new * there).sigmoid())
        back = inner @ self.weight.T + (self.outer - self.outer_base)
        return flip((self.outer_base + new * back).sigmoid()), gain

    def tempering(self, of_rows: Any = None) -> Tempering:
        """From coins on their own to these units."""
        base = self.outer_base

        def begin(count: int) -> Tensor:
            return flip(base.sigmoid().expand(count, len(base)))

        def elsewhere(count: int) -> Tensor:
            """Coins whose chance is another in each chain: from all units off to all units on."""
            chance = torch.linspace(0, 1, count, dtype=base.dtype, device=base.device).unsqueeze(-1)
            return flip(chance.expand(count, len(base)))

        log_base = softplus(base.double()).sum() + softplus(self.inner_base.double()).sum()
        exact = self.log_partition if few_states(*self.weight.shape) else None
        return Tempering(
            begin, log_base, self.log_density, self.move, self.between, of_rows, elsewhere=elsewhere, exact=exact
        )

    def log_partition(self) -> Tensor:
        """log Z, by summing over every state of the smaller group, the other one summed out by hand; float64."""
        weight, outer, inner = self.weight.double(), self.outer.double(), self.inner.double()
        if weight.shape[1] < weight.shape[0]:
            weight, outer, inner = weight.T, inner, outer
        blocks = [
            torch.logsumexp(states @ outer + softplus(states @ weight + inner).sum(-1), 0)
            for states in all_states(len(outer), weight)
        ]
        return torch.logsumexp(torch.stack(blocks), 0)


def few_states(one: int, other: int) -> bool:
    """Whether a sum over all states of the smaller group is short enough to be made beside annealing.

    >>> few_states(784, 17), few_states(784, 18), few_states(20, 100)
    (True, False, True)
    """
    return 2 ** min(one, other) * max(one, other) <= TERMS


def all_states(units: int, like: Tensor) -> list[Tensor]:
    """Every state of ``units`` zeros and ones, in blocks: states x units each."""
    places = torch.arange(units, device=like.device)
    codes = torch.arange(2**units, device=like.device)
    return [((block[:, None] >> places) & 1).to(like) for block in codes.split(_BLOCK)]
