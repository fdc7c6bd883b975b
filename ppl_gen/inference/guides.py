"""The guide of a run: which one is used, and whether it can follow minibatches."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide, AutoNormal, init_to_feasible, init_to_value

from ppl_gen.data.batching import Batch
from ppl_gen.dryrun import ProgramInfo
from ppl_gen.errors import IncompatibleError
from ppl_gen.inference.base import Run
from ppl_gen.inference.laplace import Laplace
from ppl_gen.isolation import copied, looking, revived
from ppl_gen.program import filtered

__all__ = ["as_whole", "is_auto", "point_sites", "refuse_row_parameters", "resolved_guide"]


def resolved_guide(run: Run) -> Callable[..., Any] | None:
    """The user's guide; an autoguide class or instance made afresh for this fit; AutoNormal when there is none."""
    guide, info = run.program.guide, run.info
    if not info.select():
        return None
    if run.start is not None and run.start.guide is not None:
        return run.start.guide.first if isinstance(run.start.guide, Laplace) else run.start.guide
    hidden = [name for name in info.finite_latents]
    if guide is None or (isinstance(guide, type) and issubclass(guide, AutoGuide)):
        continuous = [site.name for site in info.select() if site.name not in hidden]
        if not continuous:
            return None
        kind = guide or AutoNormal
        run.notes["guide"] = f"{kind.__name__} over {', '.join(continuous)}" + ("" if guide else " (default)")
        model = poutine.block(run.program.model, expose=continuous)
        start = run.starting_values()
        if start and "init_loc_fn" in inspect.signature(kind).parameters:
            return kind(model, init_loc_fn=init_to_value(values=start, fallback=init_to_feasible))
        return kind(model)
    if isinstance(guide, AutoGuide):
        return revived(copied(guide), poutine.block(run.program.model, hide=hidden))
    if isinstance(guide, torch.nn.Module):
        return guide
    return filtered(guide)


def point_sites(info: ProgramInfo, *, local: bool | None = None) -> list[str]:
    """Names of the latent sites that the guide puts at one value: no draws, no density, no uncertainty.

    ``local`` selects sites inside (True) or outside (False) the data plate. Deltas at a value that an autoguide made
    of a draw at an auxiliary site are none.
    """
    guided = info.guide_sites or {}
    return [site.name for site in info.select(local=local) if site.name in guided and guided[site.name].point]


def is_auto(guide: Any) -> bool:
    return isinstance(guide, AutoGuide) or (isinstance(guide, type) and issubclass(guide, AutoGuide))


def refuse_row_parameters(run: Run, guide: Callable[..., Any], batch: Batch) -> None:
    """A guide with one set of parameters per row of a batch would share them among all rows: run it on fewer rows."""
    sites = (run.info.guide_sites or {}).items()
    local = [n for n, s in sites if s.local and (s.point or not s.likelihood_free)]
    if not local or batch.rows is None or batch.rows < 3 or batch.index is None:
        return
    fewer = run.data.batch(batch.index[:-1])
    try:
        with looking():
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
    return Batch(batch.args, batch.kwargs, batch.rows, batch.rows, batch.index)
