"""The guide of a run: which one is used, and whether it can follow minibatches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from pyro import poutine
from pyro.contrib.easyguide import EasyGuide
from pyro.infer.autoguide import (
    AutoDiscreteParallel,
    AutoGuide,
    AutoLaplaceApproximation,
    AutoMessenger,
    AutoNormal,
    AutoNormalMessenger,
    init_to_feasible,
    init_to_value,
)

from ppl_gen.data.batching import Batch
from ppl_gen.errors import IncompatibleError
from ppl_gen.fitting.run import Run
from ppl_gen.handlers.mapped import mapped
from ppl_gen.handlers.read_sites import ReadSites
from ppl_gen.handlers.sites import is_deterministic
from ppl_gen.inference.guides.guide_list import sharing_plates
from ppl_gen.inference.guides.laplace import LaplaceGuide
from ppl_gen.inference.guides.moving import moving_supports
from ppl_gen.inference.guides.normals import NormalGuide
from ppl_gen.program.info import ProgramInfo
from ppl_gen.program.program import with_known_kwargs
from ppl_gen.workspace.isolation import copied, revived, without_side_effects

__all__ = ["as_class", "as_whole", "is_auto", "point_sites", "refuse_row_parameters", "resolved_guide"]


_MADE_OF_A_MODEL = (AutoGuide, AutoMessenger, EasyGuide)


def resolved_guide(run: Run) -> Callable[..., Any] | None:
    """The user's guide; an autoguide class or instance made new for this fit; AutoNormal when there is none."""
    found = _resolved(run)
    if run.start is None or run.start.guide_source not in ("own", "lost"):
        run.resolved = found
    return found


def _resolved(run: Run) -> Callable[..., Any] | None:
    guide, info = run.program.guide, run.info
    if not info.select():
        return None
    earlier = None if run.start is None else run.start.guide
    if isinstance(earlier, LaplaceGuide):
        return earlier.first
    if earlier is not None and not isinstance(earlier, NormalGuide):  # that one has nothing to train: it is begun at
        return earlier
    guide, options = as_class(guide)
    _refuse_discrete(guide, info)
    _refuse_inner_laplace(guide)
    if guide is None or (isinstance(guide, type) and issubclass(guide, _MADE_OF_A_MODEL)):
        return _made(guide, run, options)
    if isinstance(guide, AutoGuide):
        shared = sharing_plates(copied(guide), run.data.order)
        return revived(shared, poutine.block(run.joint, hide=info.finite_latents))
    if isinstance(guide, AutoMessenger):
        return _alone(copied(guide))
    if isinstance(guide, EasyGuide):  # it remembers the rows it first saw; networks in it may be the model's too
        return copied(guide, shared=guide.children())
    if isinstance(guide, torch.nn.Module):
        return guide
    return with_known_kwargs(guide)


def as_class(guide: Any) -> tuple[Any, dict[str, Any]]:
    """A guide, or the class of a ``functools.partial`` of one, and its options."""
    if isinstance(guide, partial) and isinstance(guide.func, type):
        return guide.func, dict(guide.keywords)
    return guide, {}


def _made(guide: type | None, run: Run, options: Mapping[str, Any]) -> Callable[..., Any] | None:
    """An instance of a class of guides, over the sites that it can guide."""
    kind = guide or _default(run)
    finite = run.info.finite_latents
    rest = [site.name for site in run.info.select() if site.name not in finite]
    sites = finite if issubclass(kind, AutoDiscreteParallel) else rest
    if not sites:
        return None
    for site in run.info.select():
        if site.name in sites and not site.discrete and site.support is not None:
            mapped(site.name, site.support)
    # An autoguide runs the model behind a block of its own, past which statements would not be read as elsewhere.
    # Parameters stay in sight: a guide that runs inside the model makes its own there.
    # So do observations: AutoGaussian and AutoStructured ask what they make dependent (of a sum, its parts).
    seen = issubclass(kind, AutoGuide)
    model = poutine.block(ReadSites()(run.joint), hide_fn=lambda m: m["name"] not in sites and not _shown(m, seen))
    start = run.starting_values()
    begins = dict(options)
    if start and "init_loc_fn" not in options and "init_loc_fn" in inspect.signature(kind).parameters:
        begins["init_loc_fn"] = init_to_value(values=start, fallback=init_to_feasible)
    try:
        made = kind(model, **begins)
    except TypeError as error:
        if options:
            raise TypeError(f"guide: {kind.__name__} does not take {', '.join(options)} ({error})") from error
        raise TypeError(
            f"guide: {kind.__name__} cannot be made of a model alone ({error}); give an instance, made in a Recipe: "
            f"pg.Program(model, {kind.__name__}(model, ...))"
        ) from error
    run.notes["guide"] = f"{kind.__name__} over {', '.join(sites)}" + ("" if guide else " (default)")
    return _alone(made) if isinstance(made, AutoMessenger) else made


def _default(run: Run) -> type:
    """A mean field in the supports that sites have at first, or, where these move, in those of each run."""
    return AutoNormalMessenger if moving_supports(run.joint, run.data.glimpse()) else AutoNormal


def _alone(guide: AutoMessenger) -> Callable[..., Any]:
    """A guide that runs the whole model, shown without what is the model's own: observations and derived values."""
    shown: Callable[..., Any] = poutine.block(guide, hide_fn=lambda site: site["type"] == "sample" and _given(site))
    return shown


def _shown(message: Any, observed: bool) -> bool:
    """Whether a guide sees what it does not guide: parameters, and observations where ``observed``."""
    if message["type"] == "param":
        return True
    return observed and message["type"] == "sample" and message["is_observed"] and not is_deterministic(message)


def _given(site: Any) -> bool:
    return bool(site["is_observed"]) or is_deterministic(site)


def _refuse_inner_laplace(guide: Any) -> None:
    """Its second stage takes the curvature of the whole posterior: as a part of another guide it would be a point."""
    parts = guide.modules() if isinstance(guide, torch.nn.Module) else ()
    if any(isinstance(part, AutoLaplaceApproximation) for part in parts if part is not guide):
        raise IncompatibleError(
            f"guide: an AutoLaplaceApproximation inside {type(guide).__name__} would stay a point, as its second stage "
            "needs the curvature of all latent sites together: make it the whole guide, or take AutoNormal or "
            "AutoMultivariateNormal in its place"
        )


def _refuse_discrete(guide: Any, info: ProgramInfo) -> None:
    kind = guide if isinstance(guide, type) else type(guide)
    rest = [site.name for site in info.select() if not site.finite]
    if issubclass(kind, AutoDiscreteParallel) and rest:
        raise IncompatibleError(
            f"AutoDiscreteParallel guides finite latent sites only, and the program has {', '.join(rest)} besides: "
            "leave it out (finite sites are summed out exactly), or put it beside another in an AutoGuideList"
        )


def point_sites(info: ProgramInfo, *, local: bool | None = None) -> list[str]:
    """Names of the latent sites that the guide puts at one value: no draws, no density, no uncertainty.

    ``local`` selects sites inside (True) or outside (False) the data plate. Deltas at a value that an autoguide made
    of a draw at an auxiliary site are none.
    """
    guided = info.guide_sites or {}
    return [site.name for site in info.select(local=local) if site.name in guided and guided[site.name].point]


def is_auto(guide: Any) -> bool:
    kinds, (guide, _) = (AutoGuide, AutoMessenger), as_class(guide)
    return isinstance(guide, kinds) or (isinstance(guide, type) and issubclass(guide, kinds))


def refuse_row_parameters(run: Run, guide: Callable[..., Any], batch: Batch) -> None:
    """A guide with one set of parameters per row of a batch would share them among all rows: run it on fewer rows."""
    sites = (run.info.guide_sites or {}).items()
    local = [n for n, s in sites if s.local and (s.point or not s.likelihood_free)]
    if not local or batch.rows is None or batch.rows < 3 or run.data.rows is None:
        return
    fewer = run.data.head(batch.rows - 1) if batch.index is None else run.data.batch(batch.index[:-1])
    try:
        with without_side_effects():
            trace = poutine.trace(guide).get_trace(*fewer.args, **fewer.kwargs)
        frames = [f for n in local if n in trace for f in trace.nodes[n]["cond_indep_stack"]]
        sizes = {f.size for f in frames if f.name == run.info.data_plate}
        if sizes == {fewer.rows}:
            return
    except (RuntimeError, ValueError, IndexError):
        pass
    raise IncompatibleError(
        f"the guide's site(s) {local} cannot follow a batch of another size: it seems to hold parameters for each of "
        f"{batch.rows} rows, which minibatches would share among all {run.data.rows}. Give an amortised guide (a "
        "network of x), parameters that are picked by a row number in the data, or leave batch_size out."
    )


def as_whole(batch: Batch) -> Batch:
    return replace(batch, total=batch.rows)
