"""Paths of Pathfinder: an iteration of L-BFGS, the normal it implies, its ELBO, and the best one so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ppl_gen.inference.inverse_hessian import ImpliedNormal, implied_normal, next_diagonal
from ppl_gen.inference.lbfgs import Path, advanced, begun
from ppl_gen.inference.potentials import Potential

__all__ = ["Search", "Trail"]


@dataclass(frozen=True)
class Trail:
    """How far one path has come: its point, the diagonal of its estimate, and the best normal that it passed.

    ``elbo`` is that of ``loc`` (size,) and ``scale_tril`` (size, size), in nats, less one standard error of the
    estimate; -inf and None before there is one.
    """

    path: Path
    alpha: Tensor
    elbo: float = -float("inf")
    loc: Tensor | None = None
    scale_tril: Tensor | None = None
    length: int = 0
    drawn: int = 0
    over: bool = False

    @property
    def evaluations(self) -> int:
        """Of the potential, in all."""
        return self.path.evaluations + self.drawn

    def state_dict(self) -> dict[str, Any]:
        """All of it, by name."""
        rest = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "path"}
        return {**rest, "path": self.path.state_dict()}

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Trail:
        """The inverse of `state_dict`."""
        kept = {name: saved[name] for name in cls.__dataclass_fields__ if name != "path"}
        kept = {name: value.clone() if isinstance(value, Tensor) else value for name, value in kept.items()}
        return cls(**kept, path=Path.of(saved["path"]))


@dataclass(frozen=True)
class Search:
    """How paths go on: by ``memory`` pairs and ``draws`` draws a point, until ``tolerance`` nats are gained no more."""

    potential: Potential
    memory: int
    draws: int
    tolerance: float

    def begun(self, u: Tensor) -> Trail:
        """A path at its first point."""
        return Trail(begun(self.potential, u), torch.ones_like(u))

    def advanced(self, trail: Trail, seed: int) -> Trail:
        """One iteration, and the normal at the new point if its ELBO is the highest so far."""
        before, after = trail.path, advanced(self.potential, trail.path, self.memory)
        gain = float(before.value - after.value)
        # A search that fails forgets its pairs and begins again from the same point; only then stuck is it over.
        begins_again = not len(after.steps) and not after.stuck and len(before.steps) > 0
        over = after.stuck or (not begins_again and gain <= self.tolerance and after.gap <= self.tolerance)
        moved = not torch.equal(before.u, after.u)
        trail = replace(trail, path=after, length=trail.length + 1, over=over)
        if not moved or not len(after.steps):
            return trail
        step, change = after.u - before.u, after.slope - before.slope
        if torch.equal(after.steps[-1], step):
            trail = replace(trail, alpha=next_diagonal(trail.alpha, step, change))
        normal = implied_normal(after, trail.alpha)
        return trail if normal is None else self._judged(trail, normal, seed)

    def _judged(self, trail: Trail, normal: ImpliedNormal, seed: int) -> Trail:
        generator = torch.Generator(device="cpu").manual_seed(seed)
        noise = torch.randn(self.draws, len(normal.loc), dtype=normal.loc.dtype, generator=generator)
        u, density = normal.draw(noise.to(normal.loc.device))
        values = torch.stack([self.potential(point)[0] for point in u])
        ratios = -values - density
        # Of many points the highest estimate would be the luckiest one: a standard error is taken off.
        elbo = float(ratios.mean() - ratios.std() / self.draws**0.5)
        trail = replace(trail, drawn=trail.drawn + self.draws)
        if not elbo > trail.elbo:
            return trail
        factor, failed = torch.linalg.cholesky_ex(normal.covariance())
        if int(failed) or not bool(factor.isfinite().all()):
            return trail
        return replace(trail, elbo=elbo, loc=normal.loc, scale_tril=factor)
