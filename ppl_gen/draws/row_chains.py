r"""Hamiltonian chains in many rows at once, each accepted, tuned and judged by itself.

Chains come in pairs with the same target, two for each draw of the globals: differences within pairs say how wide the
posterior of a row is and whether its chains forget where they began, whatever the globals do between pairs. Beside
Hamiltonian moves chains make jumps by the difference of two others (ter Braak 2006), which lead from mode to mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["RowChains", "run_chains"]

PHASE = 7  # trajectories between two looks
PHASES = 20  # at most
TARGET = 0.8  # mean acceptance that step sizes aim at
LONGEST = 32  # leapfrog steps of one trajectory, at most
REACH = 1.6  # about a quarter of a period of a normal density of width one
MOST = 64  # numbers of a row beyond which only their widths are learned, not how they depend on each other
_Z = 4.5  # standard errors: a false alarm in 150 000


@dataclass(frozen=True)
class RowChains:
    """Where the chains ended, and what is to be said of each row.

    Args:
        ends: chains x rows x numbers.
        log_density: chains x rows, there.
        settled: rows: whether means and widths stood still over the last phase and the chains forgot its start.
        acceptance: rows: the mean acceptance probability of the last phase.
        forgetting: rows: the correlation within pairs over the last phase, at worst over the numbers of a row.
    """

    ends: Tensor
    log_density: Tensor
    settled: Tensor
    acceptance: Tensor
    forgetting: Tensor


Density = Callable[[Tensor, Tensor], Tensor]


def run_chains(log_density: Density, start: Tensor, width: Tensor) -> RowChains:
    r"""Chains that leave :math:`\exp \ell` invariant, from ``start``, until every row has settled or `PHASES` went by.

    Each trajectory has momenta of its own and is accepted row by row. Between phases the moves of a row are scaled by
    the covariance within its pairs, and its step size is tuned; in the last phase both stand still.

    Args:
        log_density: of positions and the numbers of their chains: chains x rows; differentiable in the positions.
            Chains 2s and 2s + 1 have one target.
        start: chains x rows x numbers, an even number of chains.
        width: rows x numbers: how far the first moves go, better too far (step sizes shrink) than not far enough.
    """
    state = _State(log_density, start, width)
    before = start
    for phase in range(PHASES):
        frozen = phase >= 2 and phase % 2 == 0  # looks alternate with tuning: only phases that stood still count
        if not frozen and phase:
            state.rescale()
        state.accepted.zero_()
        for _ in range(PHASE):
            state.jump()
            state.trajectory(tune=not frozen)
        if frozen:
            still, forgetting = _judged(before, state.u)
            settled = still & (state.accepted / PHASE > 0.2) & state.value.isfinite().all(0)
            if bool(settled.all()) or phase + 2 >= PHASES:
                break
        before = state.u.clone()
    return RowChains(state.u, state.value, settled, state.accepted / PHASE, forgetting)


class _State:
    """Positions and densities of all chains, and how each row is moved.

    ``u``: chains x rows x numbers; ``value``: chains x rows, in nats; ``step``, ``accepted``: rows; ``width``: rows x
    numbers; ``scale`` (L): rows x numbers x numbers, or its diagonal, rows x numbers.
    """

    def __init__(self, log_density: Density, start: Tensor, width: Tensor) -> None:
        self.log_density, self.u = log_density, start.clone()
        self.every = torch.arange(len(start))
        self.value = self._at(self.u)[0]
        rows = start.shape[1]
        self.step = torch.full((rows,), 0.3)
        self.accepted = torch.zeros(rows)
        self.scale = self.width = width.clamp_min(1e-6)

    def _at(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Log density (chains x rows) and its slope (chains x rows x numbers) at ``u``, which is as the slope."""
        with torch.enable_grad():
            u = u.detach().requires_grad_(True)
            value = self.log_density(u, self.every)
            (gradient,) = torch.autograd.grad(value.sum(), u)
        return _cleaned(value.detach()), gradient.nan_to_num(0.0, 0.0, 0.0)

    def rescale(self) -> None:
        """L with L L^T the covariance within pairs of each row, drawn to its diagonal where pairs are few."""
        apart = (self.u[0::2] - self.u[1::2]) / math.sqrt(2)
        pairs, width = apart.shape[0], apart.shape[2]
        self.width = torch.maximum(apart.square().mean(0).sqrt(), 0.1 * self.width)  # pairs may begin at one point
        diagonal = self.width.square()
        if width > MOST:
            self.scale = self.width
            return
        covariance = torch.einsum("srd,sre->rde", apart, apart) / pairs
        trust = pairs / (pairs + 5.0 * width)
        covariance = trust * covariance + (1 - trust) * torch.diag_embed(diagonal)
        covariance = covariance + torch.diag_embed(1e-4 * diagonal)
        self.scale, failed = torch.linalg.cholesky_ex(covariance)
        self.scale = torch.where(failed.bool()[:, None, None], torch.diag_embed(diagonal.sqrt()), self.scale)

    def _moved(self, x: Tensor) -> Tensor:
        """L x, chains x rows x numbers as ``x`` is."""
        return self.scale * x if self.scale.dim() == 2 else torch.einsum("rde,cre->crd", self.scale, x)

    def _force(self, gradient: Tensor) -> Tensor:
        """L^T times the gradient, chains x rows x numbers."""
        return self.scale * gradient if self.scale.dim() == 2 else torch.einsum("rde,crd->cre", self.scale, gradient)

    def trajectory(self, *, tune: bool) -> None:
        step = self.step * (0.8 + 0.4 * torch.rand(()))
        typical = float(self.step.median())
        length = min(LONGEST, max(3, math.ceil(REACH / typical)))
        length = int(torch.randint(max(1, length // 2), length + 1, ()))
        move = step[None, :, None]
        momentum = torch.randn_like(self.u)
        kinetic = 0.5 * momentum.square().sum(-1)
        u, (value, gradient) = self.u, self._at(self.u)
        for _ in range(length):
            momentum = momentum + 0.5 * move * self._force(gradient)
            u = u + move * self._moved(momentum)
            value, gradient = self._at(u)
            momentum = momentum + 0.5 * move * self._force(gradient)
        change = value - self.value + kinetic - 0.5 * momentum.square().sum(-1)
        # From where the density is zero any place with some is taken.
        chance = _cleaned(change).clamp(max=0.0).exp()
        chance = torch.where(self.value.isinf() & value.isfinite(), 1.0, chance)
        taken = torch.rand_like(chance) < chance
        self.u = torch.where(taken[..., None], u, self.u)
        self.value = torch.where(taken, value, self.value)
        rate = chance.mean(0)
        self.accepted = self.accepted + rate
        if tune:
            self.step = (self.step.log() + (rate - TARGET)).exp().clamp(1e-4, 0.6)

    def jump(self) -> None:
        """Half of the chains after the other, by the difference of two of the half that stands still."""
        for half in (0, 1):
            mine, others = self.every[half::2], self.every[1 - half :: 2]
            one, two = (others[torch.randint(len(others), self.value[half::2].shape)] for _ in range(2))
            rows = torch.arange(self.u.shape[1])
            noise = 1e-2 * self.width * torch.randn_like(self.u[mine])
            moved = self.u[mine] + self.u[one, rows] - self.u[two, rows] + noise
            value = _cleaned(self.log_density(moved, mine))
            taken = torch.rand_like(value).log() < _cleaned(value - self.value[mine])
            self.u[mine] = torch.where(taken[..., None], moved, self.u[mine])
            self.value[mine] = torch.where(taken, value, self.value[mine])


def _cleaned(value: Tensor) -> Tensor:
    """What is not a number counts as impossible."""
    return value.nan_to_num(-torch.inf, torch.inf, -torch.inf)


def _judged(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """By row: whether means and widths stood still between two looks and pairs forgot; the worst correlation.

    Both looks are chains x rows x numbers.
    """
    chains = before.shape[0]
    first, second = (x[0::2] - x[1::2] for x in (before, after))
    pairs = len(first)
    width = second.square().mean(0).div(2).sqrt().clamp_min(1e-12)
    drift = after - before
    far = drift.mean(0).abs() > 0.1 * width + _Z * drift.std(0) / math.sqrt(chains)
    spread = first.square().mean(0).div(2).sqrt().clamp_min(1e-12)
    wide = (width / spread).log().abs() > 0.1 + _Z / math.sqrt(pairs)
    both = (first.square().mean(0) * second.square().mean(0)).sqrt().clamp_min(1e-24)
    correlation = (first * second).mean(0) / both
    stuck = correlation > 0.3 + _Z / math.sqrt(pairs)
    return ~(far | wide | stuck).any(-1), correlation.amax(-1)
