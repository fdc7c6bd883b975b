"""The Laplace approximation: a normal at the maximum of the density, with its curvature there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ppl_gen.data.batches import Batches
from ppl_gen.errors import require_number, require_whole
from ppl_gen.fitting.algorithm import Iterative
from ppl_gen.fitting.posteriors.guides import GuidePosterior
from ppl_gen.fitting.posteriors.points import PointPosterior
from ppl_gen.fitting.run import Ending, Info, Outcome, Run
from ppl_gen.fitting.stopping import EarlyStop
from ppl_gen.inference.guides.normals import kept_buffers, normal_guide
from ppl_gen.inference.lbfgs import Path, advanced, begun
from ppl_gen.inference.potentials import Potential, first_points, guarded, recorded_potential, refuse_large
from ppl_gen.inference.unconstrained import NEEDS, Unconstrained
from ppl_gen.program.offers import Need
from ppl_gen.workspace.workspace import ProgramState

__all__ = ["Laplace"]

_LARGEST = 2000  # numbers: the Hessian takes one pass through the program for each
_MEMORY = 10  # pairs of steps and slopes
_FLAT, _FLAT_SINGLE = 1e-11, 1e-5  # of a number's own curvature: what is left along a ridge is rounding
_NEWTON = 20  # steps of Newton's method at most; two or three are usual where L-BFGS ended


@dataclass(frozen=True)
class Laplace(Iterative):
    r"""A normal at the maximum of the log density over unconstrained latents, with its curvature there (Laplace 1774).

    .. math::
        q(u) = N(u^*, H^{-1}), \quad u^* = \arg\max \log p(x, u), \quad H = -\nabla^2 \log p(x, u^*)

    u is the latent vector without constraints, z = T(u), its Jacobian part of the density; finite discrete sites are
    summed out. The maximum is found by L-BFGS and finished by Newton's method. ``history["log_density"]`` is
    log p(x, u) in nats in all. Exact where the posterior of u is normal, good where rows are many; a maximum says
    little about funnels and several modes, and the verdict looks for both. A fit can be passed on:
    ``pg.fit(..., SVI(), start=fit)`` begins its guide at this normal.

    Args:
        steps: at most so many iterations of L-BFGS.
        tolerance: converged when an iteration gained, and the next would gain, no more than so many nats.

    Raises:
        ValueError: for settings out of range, or from `pg.fit` where no start with a finite density was found.
        IncompatibleError: from `pg.fit`, where nothing continuous is latent, the program has free parameters or no
            density, the support of a site depends on another, or there are more than 2000 latent numbers.

    A fit whose curvature is not that of a maximum has status ``failed`` and holds the point alone.

    References:
        Bayesian Data Analysis, 3rd edition, chapter 13 (Gelman et al., 2013).
        Numerical Optimization, chapters 3, 6 and 7 (Nocedal and Wright, 2006).

    Example:
        >>> import pyro, torch, ppl_gen as pg
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> fit = pg.fit(model, torch.tensor([1.0, 2.0, 3.0]), Laplace())
        >>> [round(float(value), 4) for value in fit.guide.moments()]  # exactly: 6 / 3.01 and 1 / 3.01
        [1.9934, 0.3322]
    """

    steps: int = 1000
    tolerance: float = 1e-8

    dtype: ClassVar[torch.dtype | None] = torch.float64
    vectors: ClassVar[bool] = True
    growing: ClassVar[Sequence[str]] = ("steps",)
    needs: ClassVar[Sequence[Need]] = NEEDS

    def __post_init__(self) -> None:
        require_whole("steps", self.steps)
        require_number("tolerance", self.tolerance)
        object.__setattr__(self, "steps", int(self.steps))

    def init(self, run: Run) -> _State:
        density = Unconstrained(run.joint, run.data.batch(), run.info)
        refuse_large(run, density, self.label, _LARGEST)
        (u,) = first_points(run, density, 1)
        potential = guarded(recorded_potential(run, density, [u]))
        return _State(density, potential, begun(potential, u))

    def step(self, state: _State, source: Batches) -> tuple[_State, Info]:
        path = advanced(state.potential, state.path, _MEMORY)
        return _State(state.density, state.potential, path), {"log_density": -path.value, "gap": path.gap}

    def limit(self, run: Run) -> int:
        return self.steps

    def stop(self, history: Mapping[str, Sequence[float]]) -> str | None:
        values, gap = history["log_density"], float(history["gap"][-1])
        gain = float(values[-1]) - float(values[-2]) if len(values) > 1 else math.inf
        if gain == 0.0 and gap > self.tolerance:
            stuck = len(values) > 2 and float(values[-3]) == float(values[-1])
            return EarlyStop("stopped: no step raised the log density, and its slope is not 0") if stuck else None
        if not (gain <= self.tolerance and gap <= self.tolerance):
            return None
        return f"an iteration gained, and the next would gain, no more than {self.tolerance:g} nats"

    def state_dict(self, state: _State) -> dict[str, Any]:
        return state.path.state_dict()

    def load_state_dict(self, state: _State, saved: Mapping[str, Any]) -> _State:
        return _State(state.density, state.potential, Path.of(saved))

    def outcome(self, state: _State, run: Run) -> Outcome:
        density, path = state.density, state.path
        u, factor, more = _finished(density, path.u)
        cost: dict[str, float | str] = {"gradient_evaluations": path.evaluations + more * density.size}
        if factor is None:
            point = dict(zip(density.sites, density.values(path.u), strict=True))
            said = (
                "the curvature of the log density at the last point is not that of a maximum: none was reached, or "
                "none exists, as in a funnel or along a direction that the data leave free. The point is kept; look at "
                "priors, write scales non-centred, give a start, or use NUTS"
            )
            return Outcome(PointPosterior(point), run.workspace.snapshot(), ending=Ending("failed", said), cost=cost)
        guide = normal_guide(run, density, u.new_ones(1), u[None], factor[None])
        return Outcome(GuidePosterior(guide), ProgramState(buffers=kept_buffers(guide)), cost=cost)


@dataclass(frozen=True)
class _State:
    density: Unconstrained
    potential: Potential
    path: Path


def _hessian(density: Unconstrained, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, its slope and its Hessian, by differentiating the program twice."""
    with torch.enable_grad():
        at = u.detach().requires_grad_(True)
        value = density.potential(at)
        (slope,) = torch.autograd.grad(value, at, create_graph=True)
        rows = []
        for part in slope:
            row = torch.autograd.grad(part, at, retain_graph=True, allow_unused=True)[0] if part.requires_grad else None
            rows.append(torch.zeros_like(u) if row is None else row)
    hessian = torch.stack(rows).detach()
    return value.detach(), slope.detach(), (hessian + hessian.T) / 2


def _finished(density: Unconstrained, u: Tensor) -> tuple[Tensor, Tensor | None, int]:
    """The maximum near ``u`` by Newton's method, a factor of the inverse Hessian there, and how many were taken.

    The factor is None where the curvature is not positive definite, or where the maximum is farther away than Newton's
    method goes.
    """
    last = math.inf
    for taken in range(1, _NEWTON + 1):
        _, slope, hessian = _hessian(density, u)
        factor = _factor(hessian.double(), _FLAT if u.dtype is torch.float64 else _FLAT_SINGLE)
        if factor is None:
            return u, None, taken
        step = torch.cholesky_solve(slope.double()[:, None], factor)[:, 0]
        gap = 0.5 * float(slope.double() @ step)  # the fall that the step brings, in nats
        if gap >= 0.5 * last or gap <= 1e-20:  # it ends where rounding begins, and has to have come close by then
            close = gap <= 1e-6 if u.dtype is torch.float64 else gap <= 1e-2
            return u, torch.linalg.cholesky(torch.cholesky_inverse(factor)).to(u.dtype) if close else None, taken
        u, last = u - step.to(u.dtype), gap
    return u, None, _NEWTON


def _factor(hessian: Tensor, flat: float) -> Tensor | None:
    """The Cholesky factor; None where some direction has no curvature, beside that of each number by itself."""
    scale = hessian.diagonal().sqrt()
    if not bool((scale > 0).all() & hessian.isfinite().all()):
        return None
    if float(torch.linalg.eigvalsh(hessian / scale / scale[:, None])[0]) <= flat:
        return None
    return torch.linalg.cholesky(hessian)
