"""Where a normal guide of a run begins, and how it moves, where the user left both open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import get_param_store
from torch import Tensor
from torch.distributions import constraints, transform_to

from ppl_gen.errors import PROGRAM_ERRORS, IncompatibleError
from ppl_gen.fitting.run import Run
from ppl_gen.inference.guides.frames import KINDS, Frame, frame_of
from ppl_gen.inference.guides.normals import NormalGuide
from ppl_gen.inference.guides.resolved import as_class
from ppl_gen.inference.guides.vector_guide import refuse_moving_supports
from ppl_gen.inference.paths import Search
from ppl_gen.inference.potentials import derived_seed, first_points, guarded, recorded_potential
from ppl_gen.inference.unconstrained import NEEDS, Unconstrained
from ppl_gen.inference.whitened import WhitenedAdam
from ppl_gen.workspace.isolation import without_side_effects

__all__ = ["Beginning", "beginning"]

_LARGEST = 300  # numbers: the guide's covariance has half their square
_PATHS, _STEPS, _DRAWS, _MEMORY = 4, 300, 10, 6
_TOLERANCE = 1e-3  # nats


@dataclass(frozen=True)
class Beginning:
    """A normal near the posterior, in the frame of a guide of Pyro's."""

    guide: Any
    frame: Frame
    said: str
    evaluations: int

    def optimiser(self, params: Sequence[Tensor]) -> WhitenedAdam:
        """Adam in the units of the normal, on these parameters, which are put at it."""
        names = self._names(params)
        return WhitenedAdam(params, lambda free: self._values(names, free), self.frame.zeros(), self.frame.held())

    def place(self, params: Sequence[Tensor]) -> None:
        """Put the parameters at the normal."""
        with torch.no_grad():
            for param, value in zip(params, self._values(self._names(params), self.frame.zeros()), strict=True):
                param.copy_(value)

    def _names(self, params: Sequence[Tensor]) -> list[str]:
        known = {id(leaf): name for name, leaf in get_param_store().named_parameters()}
        return [known[id(param)] for param in params]

    def _values(self, names: Sequence[str], free: Sequence[Tensor]) -> list[Tensor]:
        """The unconstrained values of the parameters of these names."""
        store, before = get_param_store(), f"{self.guide._pyro_name}."
        found = self.frame.values(free)
        bounds = [store._constraints.get(name, constraints.real) for name in names]
        return [
            transform_to(bound).inv(found[name.removeprefix(before)]) for name, bound in zip(names, bounds, strict=True)
        ]


def beginning(run: Run, guide: Callable[..., Any] | None, *, search: bool) -> Beginning | None:
    """The normal that a guide made for this fit begins at; None where it begins as Pyro has it.

    That is the normal of the fit to continue from (`Laplace`, `Pathfinder`), or, with ``search``, the best of some
    quasi-Newton paths. The guide has to be one of Pyro's normal autoguides that was made for this fit, over at most 300
    continuous latents of a program without parameters of its own; a start that a guide's options give is kept.
    """
    earlier = None if run.start is None else run.start.guide
    if not _serves(run, guide) or (run.start is not None and not isinstance(earlier, NormalGuide)):
        return None
    if not (search or isinstance(earlier, NormalGuide)):
        return None
    try:
        with without_side_effects():
            density = Unconstrained(run.joint, run.data.batch(), run.info)
            if density.size > _LARGEST:
                return None
            refuse_moving_supports(run, guide, density)
            found, said, evaluations = _given(earlier) if earlier is not None else _searched(run, density)
    except (IncompatibleError, *PROGRAM_ERRORS) as error:
        run.notes["guide starts"] = f"as Pyro has it: {str(error).splitlines()[0]}"
        return None
    if found is None:
        run.notes["guide starts"] = f"as Pyro has it: {said}"
        return None
    loc, factor = (value.to(dtype=run.dtype, device=run.data.device) for value in found)
    frame = frame_of(guide, density.sites, loc, factor)
    return None if frame is None or len(loc) != density.size else Beginning(guide, frame, said, evaluations)


def _serves(run: Run, guide: Any) -> bool:
    given, options = as_class(run.program.guide)
    made = given is None or (isinstance(given, type) and given in KINDS)
    chosen = {"init_loc_fn", "init_scale"} & set(options)
    return (
        made
        and type(guide) in KINDS
        and not chosen
        and not run.program.terms
        and run.program.time_steps is None
        and all(set(need) & set(run.info.offers) for need in NEEDS)
    )


_Found = tuple[tuple[Tensor, Tensor] | None, str, int]  # mean and factor, words, evaluations of the density


def _given(guide: NormalGuide) -> _Found:
    loc, covariance = guide.moments()
    return (loc, torch.linalg.cholesky(covariance)), "at the normal of the fit to start from", 0


def _searched(run: Run, density: Unconstrained) -> _Found:
    """The best normal of some paths."""
    points = first_points(run, density, _PATHS)
    search = Search(guarded(recorded_potential(run, density, points)), _MEMORY, _DRAWS, _TOLERANCE)
    trails = []
    for number, u in enumerate(points):
        trail = search.begun(u)
        while not trail.over and trail.length < _STEPS:
            trail = search.advanced(trail, derived_seed(run.seed, 1000 + number, trail.length))
        trails.append(trail)
    best = max(trails, key=lambda trail: trail.elbo)
    evaluations = sum(trail.evaluations for trail in trails)
    if best.loc is None or best.scale_tril is None:
        return None, "no quasi-Newton path passed a normal with a finite ELBO", evaluations
    said = f"at the best normal of {_PATHS} quasi-Newton paths (Pathfinder), ELBO about {best.elbo:.1f} nats"
    return (best.loc, best.scale_tril), said, evaluations
