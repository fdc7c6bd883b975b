"""Pathfinder: the best of the normals that quasi-Newton paths pass by on their way to a maximum."""

from __future__ import annotations

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
from ppl_gen.inference.guides.normals import kept_buffers, normal_guide
from ppl_gen.inference.mixing import Shares, importance_shares
from ppl_gen.inference.paths import Search, Trail
from ppl_gen.inference.potentials import derived_seed, first_points, guarded, recorded_potential, refuse_large
from ppl_gen.inference.unconstrained import NEEDS, Unconstrained
from ppl_gen.program.offers import Need
from ppl_gen.workspace.workspace import ProgramState

__all__ = ["Pathfinder"]

_LARGEST = 2000  # numbers, of which a covariance is kept
_ENOUGH = 0.05  # of the draws' number: with fewer effective draws the weights name a path by chance


@dataclass(frozen=True)
class Pathfinder(Iterative):
    r"""Quasi-Newton paths to a maximum, and the normal along each that has the highest ELBO (Zhang et al. 2022).

    .. math:: q(u) = \sum_k \pi_k\, N(\mu_k, \Sigma_k), \quad
        (\mu_k, \Sigma_k) = \arg\max_{l}\, \mathrm{ELBO}\big(N(\mu_{kl}, \Sigma_{kl})\big)

    Each path is L-BFGS on minus the log density over unconstrained latents (finite discrete sites summed out) from a
    dispersed start. At every point l the inverse Hessian that the path implies gives a normal, and ``elbo_draws`` draws
    its ELBO, less one standard error. The posterior is the best normal of each path, mixed in shares that follow from
    Pareto smoothed importance weights of ``draws`` draws, so that a path into a lesser mode counts for what that mode
    holds. ``history["elbo"]`` is the best estimate so far, in nats in all.

    Where the program offers `relabel`, copies of a mode are no other modes, and the best path alone is kept. A fit can
    be passed on: ``pg.fit(..., SVI(), start=fit)`` begins its guide at the best normal.

    Args:
        paths: how many; several show several modes. One is "single-path Pathfinder".
        steps: at most so many iterations of each path.
        memory: pairs of steps and slopes that the inverse Hessian is made of.
        elbo_draws: draws for the ELBO at a point, 2 at least.
        draws: draws in all that shares are made of; a share takes two paths or more.
        tolerance: a path ends when an iteration gained, and the next would gain, no more than so many nats.

    Raises:
        ValueError: for settings out of range, or from `pg.fit` where no start with a finite density was found.
        IncompatibleError: from `pg.fit`, where nothing continuous is latent, the program has free parameters or no
            density, the support of a site depends on another, or there are more than 2000 latent numbers.

    A fit none of whose paths passed a normal with a finite ELBO has status ``failed`` and holds the last point alone.

    References:
        Pathfinder: parallel quasi-Newton variational inference (Zhang, Carpenter, Gelman and Vehtari, 2022).
        Pareto smoothed importance sampling (Vehtari, Simpson, Gelman, Yao and Gabry, 2024).
        Adaptive importance sampling in general mixture classes (Cappe et al., 2008), for the shares.

    Example:
        >>> import pyro, torch, ppl_gen as pg
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> fit = pg.fit(model, torch.tensor([1.0, 2.0, 3.0]), Pathfinder(paths=2), seed=0)
        >>> [round(float(value), 4) for value in fit.guide.moments()]  # exactly: 6 / 3.01 and 1 / 3.01
        [1.9934, 0.3322]
    """

    paths: int = 4
    steps: int = 1000
    memory: int = 6
    elbo_draws: int = 10
    draws: int = 1000
    tolerance: float = 1e-8

    dtype: ClassVar[torch.dtype | None] = torch.float64
    vectors: ClassVar[bool] = True
    growing: ClassVar[Sequence[str]] = ("steps",)
    needs: ClassVar[Sequence[Need]] = NEEDS

    def __post_init__(self) -> None:
        for name, least in (("paths", 1), ("steps", 1), ("memory", 1), ("elbo_draws", 2), ("draws", 100)):
            require_whole(name, getattr(self, name), least)
            object.__setattr__(self, name, int(getattr(self, name)))
        require_number("tolerance", self.tolerance)

    def init(self, run: Run) -> _State:
        density = Unconstrained(run.joint, run.data.batch(), run.info)
        refuse_large(run, density, self.label, _LARGEST)
        points = first_points(run, density, self.paths)
        potential = guarded(recorded_potential(run, density, points))
        search = Search(potential, self.memory, self.elbo_draws, self.tolerance)
        return _State(density, search, tuple(search.begun(u) for u in points), run.seed)

    def step(self, state: _State, source: Batches) -> tuple[_State, Info]:
        trails = []
        for number, trail in enumerate(state.trails):
            seed = derived_seed(state.seed, 1000 + number, trail.length)
            trails.append(trail if trail.over else state.search.advanced(trail, seed))
        best = max(trail.elbo for trail in trails)
        lowest = min(float(trail.path.value) for trail in trails)
        left = sum(not trail.over for trail in trails)
        return _State(state.density, state.search, tuple(trails), state.seed), {
            "elbo": best,
            "log_density": -lowest,
            "paths_under_way": left,
        }

    def limit(self, run: Run) -> int:
        return self.steps

    def stop(self, history: Mapping[str, Sequence[float]]) -> str | None:
        if history["paths_under_way"][-1] > 0:
            return None
        return "the path has ended" if self.paths == 1 else f"all {self.paths} paths have ended"

    def state_dict(self, state: _State) -> dict[str, Any]:
        return {str(number): trail.state_dict() for number, trail in enumerate(state.trails)}

    def load_state_dict(self, state: _State, saved: Mapping[str, Any]) -> _State:
        trails = tuple(Trail.of(saved[str(number)]) for number in range(len(state.trails)))
        return _State(state.density, state.search, trails, state.seed)

    def outcome(self, state: _State, run: Run) -> Outcome:
        found = [trail for trail in state.trails if trail.loc is not None]
        cost: dict[str, float | str] = {"gradient_evaluations": sum(trail.evaluations for trail in state.trails)}
        if not found:
            return _failed(state, run, cost)
        found.sort(key=lambda trail: -trail.elbo)
        if run.program.relabel is not None and len(found) > 1:
            run.notes["paths"] = f"the best of {len(found)}, as exchangeable parts have a copy of every mode"
            found = found[:1]
        loc = torch.stack([trail.loc for trail in found if trail.loc is not None])
        tril = torch.stack([trail.scale_tril for trail in found if trail.scale_tril is not None])
        shares = loc.new_ones(1)
        if len(found) > 1:
            shares = self._shares(state, run, loc, tril)
            cost["gradient_evaluations"] = float(cost["gradient_evaluations"]) + self.draws
        guide = normal_guide(run, state.density, shares, loc, tril)
        return Outcome(GuidePosterior(guide), ProgramState(buffers=kept_buffers(guide)), cost=cost)

    def _shares(self, state: _State, run: Run, loc: Tensor, tril: Tensor) -> Tensor:
        """The share of each path, and what the weights say, in the notes."""
        made: Shares = importance_shares(
            state.search.potential, loc, tril, self.draws, derived_seed(run.seed, 999), floor=_ENOUGH
        )
        held = ", ".join(f"{float(share):.2f}" for share in made.shares)
        run.notes["paths"] = f"{len(loc)} normals in shares of {held}; {made.said}"
        return made.shares


@dataclass(frozen=True)
class _State:
    density: Unconstrained
    search: Search
    trails: tuple[Trail, ...]
    seed: int


def _failed(state: _State, run: Run, cost: dict[str, float | str]) -> Outcome:
    last = min(state.trails, key=lambda trail: float(trail.path.value))
    point = dict(zip(state.density.sites, state.density.values(last.path.u), strict=True))
    said = (
        "no path passed a normal with a finite ELBO: the density has no maximum with curvature where they went. The "
        "last point is kept; look at priors, give a start, or use NUTS"
    )
    return Outcome(PointPosterior(point), run.workspace.snapshot(), ending=Ending("failed", said), cost=cost)
