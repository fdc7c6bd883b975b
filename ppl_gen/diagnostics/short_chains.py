"""Many short Hamiltonian chains that move together: their steps, and the scale on which these are taken."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Function", "State", "quenched", "sampled", "scale_of"]

STEPS = 30  # iterations of each chain, of about 6 gradients; in the first third the step size is adapted
QUENCH = 25  # iterations downhill of chains that begin elsewhere
DENSE = 60  # up to here the chains know the correlations of the draws

Function = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class State:
    """Where all chains are: ``u`` chains x numbers, the potential there (chains, nats) and its gradient, as ``u``."""

    u: Tensor
    value: Tensor
    gradient: Tensor

    def where(self, accept: Tensor, other: State) -> State:
        """``other`` for the chains that ``accept`` names, true or false for each."""
        wide = accept[:, None]
        return State(
            torch.where(wide, other.u, self.u),
            torch.where(accept, other.value, self.value),
            torch.where(wide, other.gradient, self.gradient),
        )


def scale_of(points: Tensor) -> Tensor:
    """The Cholesky factor of the draws' covariance where they are enough for it, else their standard deviations.

    ``points``: draws x numbers; the factor is numbers x numbers, the standard deviations are one for each number.
    """
    deviations = points.std(0).clamp_min(1e-6 * (1.0 + points.abs().amax(0)))
    size = points.shape[1]
    if size > DENSE or len(points) < 5 * size:
        return deviations
    centred = (points - points.mean(0)) / deviations
    correlation = centred.T @ centred / (len(points) - 1)
    shrunk = 0.95 * correlation + 0.05 * torch.eye(size, dtype=points.dtype)
    return deviations[:, None] * torch.linalg.cholesky(shrunk)


def _times(scale: Tensor, x: Tensor) -> Tensor:
    """L x of each chain, chains x numbers as ``x`` is."""
    return x * scale if scale.dim() == 1 else x @ scale.T


def _transposed(scale: Tensor, x: Tensor) -> Tensor:
    """L^T x of each chain, chains x numbers as ``x`` is."""
    return x * scale if scale.dim() == 1 else x @ scale


def _leapfrog(many: Function, state: State, p: Tensor, scale: Tensor, step: Tensor, count: int) -> tuple[State, Tensor]:
    """``count`` leaps of size ``step`` (chains x 1), in units in which the draws of the fit have unit variance.

    Momenta ``p``, which come back too, are chains x numbers.
    """
    u, gradient = state.u, state.gradient
    value = state.value
    p = p - 0.5 * step * _transposed(scale, gradient)
    for i in range(count):
        u = u + step * _times(scale, p)
        value, gradient = many(u)
        gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
        p = p - (1.0 if i < count - 1 else 0.5) * step * _transposed(scale, gradient)
    return State(u, value, gradient), p


def sampled(many: Function, state: State, scale: Tensor, own: int) -> tuple[State, list[Tensor]]:
    """Hamiltonian steps with one step size for all, adapted to the acceptance of the first ``own`` chains.

    Beside the last state: chains x numbers at three moments.
    """
    size, ends = 0.5 * state.u.shape[1] ** -0.25, []
    for iteration in range(STEPS):
        p = torch.randn_like(state.u)
        leaps = int(torch.randint(3, 9, ()))
        step = torch.full((len(state.u), 1), size, dtype=state.u.dtype) * (0.8 + 0.4 * torch.rand(len(state.u), 1))
        proposed, q = _leapfrog(many, state, p, scale, step, leaps)
        change = state.value - proposed.value + 0.5 * (p.square().sum(1) - q.square().sum(1))
        chance = change.nan_to_num(-math.inf, math.inf, -math.inf).clamp_max(0.0).exp()
        chance = chance * proposed.value.isfinite()  # an infinite density is one that has left the range of its numbers
        state = state.where(torch.rand_like(chance) < chance, proposed)
        if iteration < STEPS // 3:
            size *= math.exp(2.0 * (float(chance[:own].mean()) - 0.75))
        if iteration in (STEPS - 11, STEPS - 6, STEPS - 1):
            ends.append(state.u)
    return state, ends


def quenched(many: Function, state: State, scale: Tensor, own: int) -> State:
    """Chains that begin elsewhere first go downhill, each with a step of its own; the others stay."""
    step = torch.full((len(state.u), 1), 0.5 * state.u.shape[1] ** -0.25, dtype=state.u.dtype)
    free = torch.arange(len(state.u)) >= own
    for _ in range(QUENCH):
        proposed, _ = _leapfrog(many, state, torch.zeros_like(state.u), scale, step, 3)
        lower = (proposed.value < state.value) & proposed.value.isfinite() & free
        lost = ~state.value.isfinite() & proposed.value.isfinite() & free
        state = state.where(lower | lost, proposed)
        step = torch.where((lower | lost)[:, None], 1.3 * step, 0.3 * step)
    return state
