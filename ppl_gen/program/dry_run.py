"""One traced dry run: sites, shapes, kinds, the data plate, and what the program offers."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from functools import cache
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import ExpandedDistribution

from ppl_gen.data.batching import Batch
from ppl_gen.errors import PROGRAM_ERRORS
from ppl_gen.handlers.followed import ShapesKept
from ppl_gen.handlers.picked import Picked
from ppl_gen.handlers.read_sites import is_flat
from ppl_gen.handlers.sites import is_deterministic, sample_nodes
from ppl_gen.handlers.whole_plates import whole_plates
from ppl_gen.program.checks import check_reparameterised
from ppl_gen.program.explained import explained
from ppl_gen.program.guide_checks import check_auxiliary, check_match
from ppl_gen.program.idle import idle_where_masked
from ppl_gen.program.info import ProgramInfo, Site
from ppl_gen.program.only_summed import drawn_too
from ppl_gen.program.plates import check_plate, check_sizes, data_plate, rows_outside, vectorised
from ppl_gen.program.possible import checked_trace
from ppl_gen.program.program import Program, with_known_kwargs

__all__ = ["dry_run"]


def dry_run(
    program: Program,
    batch: Batch,
    *,
    guide: Callable[..., Any] | None = None,
    fewer: Callable[[], Batch] | None = None,
    predicted: Collection[str] = (),
) -> ProgramInfo:
    """Run model (and guide) once on ``batch`` with full validation and describe what happened.

    ``fewer`` gives fewer rows of the same data, on which the program runs again where its shapes alone do not tell
    what follows the rows. ``predicted`` names latent sites that need not be learned: those that the guide draws
    nevertheless are latent sites like others.

    Raises:
        ValueError: for the usual plate and shape mistakes, naming the site and the edit that fixes it.
    """
    with drawn_too(program, batch), explained(program, batch, "model"), torch.no_grad():
        trace, inside = checked_trace(program.model, batch, program.start)
    if _sites_subsampled(trace):
        with whole_plates():
            return dry_run(program, batch, guide=guide, fewer=fewer, predicted=predicted)
    few = _on_fewer(program, fewer)
    plate, frames = data_plate(program, batch, trace, few), vectorised(trace)
    sites = {name: _site(name, node, plate) for name, node in sample_nodes(trace)}
    idle = idle_where_masked(program.model, batch, trace)
    sites = {name: replace(site, idle=name in idle) for name, site in sites.items()}
    frame = frames.get(plate)
    nesting = max((-f.dim for f in frames.values()), default=0)
    check_plate(batch, frame)
    check_sizes(batch, trace)
    if coupled := rows_outside(batch, sites, frame, few):
        plate, frame, sites = "", None, {name: replace(site, local=False) for name, site in sites.items()}
    check_reparameterised(sites)
    guide_sites = None
    if guide is None:
        sites = _predicting(sites, predicted)
    else:
        guide_trace = _traced(with_known_kwargs(guide), batch, program, what="guide")
        guide_sites = {name: _site(name, node, plate) for name, node in sample_nodes(guide_trace)}
        guide_sites = _with_points(
            guide_sites, guide_trace, lambda: _traced(with_known_kwargs(guide), batch, program, "guide")
        )
        auxiliary = {name for name, node in sample_nodes(guide_trace) if node["infer"].get("is_auxiliary")}
        sites = _predicting(sites, set(predicted) - set(guide_sites))
        check_match(program, sites, {k: v for k, v in guide_sites.items() if k not in auxiliary})
        check_auxiliary(program, guide_trace, guide_sites, auxiliary)
        guide_frames = [f for _, node in sample_nodes(guide_trace) for f in node["cond_indep_stack"] if f.vectorized]
        nesting = max([nesting, *(-f.dim for f in guide_frames)])
    params = {name: tuple(node["value"].shape) for name, node in trace.nodes.items() if node["type"] == "param"}
    free = [name for name in params if f"{name.removesuffix('_centered')}_decentered" not in sites]
    offers = _derived_offers(program, sites, frame is not None, bool(free))
    return ProgramInfo(
        program.name,
        sites,
        guide_sites,
        params,
        plate if frame is not None else None,
        None if frame is None else frame.dim,
        nesting,
        batch.rows,
        offers,
        coupled=coupled,
        inside=inside,
    )


def _sites_subsampled(trace: poutine.Trace) -> bool:
    """Whether a plate that is iterated over takes some of its rows: then each run has sites of its own."""
    frames = (frame for _, node in sample_nodes(trace) for frame in node["cond_indep_stack"])
    return any(not frame.vectorized and frame.full_size and frame.full_size != frame.size for frame in frames)


def _predicting(sites: dict[str, Site], names: Collection[str]) -> dict[str, Site]:
    return {n: replace(site, kind="predicted") if n in names and site.latent else site for n, site in sites.items()}


def _on_fewer(program: Program, fewer: Callable[[], Batch] | None) -> Callable[[], tuple[poutine.Trace, int] | None]:
    @cache
    def run() -> tuple[poutine.Trace, int] | None:
        if fewer is None or not (batch := fewer()).rows:
            return None
        try:
            with torch.no_grad():
                return poutine.trace(program.model).get_trace(*batch.args, **batch.kwargs), batch.rows
        except PROGRAM_ERRORS:
            return None

    return run


def _site(name: str, node: dict[str, Any], data_plate: str) -> Site:
    fn = node["fn"]
    base = fn
    while isinstance(base, dist.Independent | dist.MaskedDistribution | ExpandedDistribution | Picked):
        base = base.base_dist  # wrappers around what the user wrote
    deterministic = is_deterministic(node)
    kind = "deterministic" if deterministic else "observed" if node["is_observed"] else "latent"
    kind = "factor" if isinstance(base, dist.Unit) else kind
    frames = [f for f in sorted(node["cond_indep_stack"], key=lambda f: f.dim or 0) if f.vectorized]
    plates = tuple(f.name for f in frames)
    discrete = bool(getattr(fn.support, "is_discrete", False)) if _has_support(fn) else False
    return Site(
        name=name,
        kind=kind,
        distribution=type(base).__name__,
        batch_shape=tuple(fn.batch_shape),
        event_shape=tuple(fn.event_shape),
        plates=plates,
        local=data_plate in plates,
        discrete=discrete,
        finite=discrete and bool(fn.has_enumerate_support),
        reparameterised=bool(fn.has_rsample),
        likelihood_free=isinstance(base, dist.Delta) and not deterministic,
        support=fn.support if _has_support(fn) else None,
        improper=is_flat(fn) and kind == "latent",
        averaged=type(base).mean is not torch.distributions.Distribution.mean,
        under_mask=isinstance(node["mask"], torch.Tensor),
        masked=isinstance(node["mask"], torch.Tensor) and bool(node["mask"].any()) and not bool(node["mask"].all()),
        plate_dims=tuple(f.dim for f in frames),
    )


def _with_points(sites: dict[str, Site], first: poutine.Trace, again: Callable[[], poutine.Trace]) -> dict[str, Site]:
    """Mark the Deltas of a guide that are point masses: those at a value that no other run of the guide changes.

    Autoguides put a Delta at every site whose value they made of a draw at an auxiliary site; these move with it.
    """
    still = {name for name, site in sites.items() if site.likelihood_free}
    drawn = [site for name, site in sites.items() if name not in still]
    # Two runs tell continuous draws apart; draws of finite sites often coincide.
    for _ in range((5 if any(site.discrete for site in drawn) else 1) if drawn and still else 0):
        other = again()
        still = {n for n in still if n in other and _same(first.nodes[n]["value"], other.nodes[n]["value"])}
    return {name: replace(site, point=name in still) for name, site in sites.items()}


def _same(one: Any, other: Any) -> bool:
    one, other = torch.as_tensor(one), torch.as_tensor(other)
    return one.shape == other.shape and bool(torch.equal(one, other))


def _has_support(fn: Any) -> bool:
    try:
        return fn.support is not None
    except (NotImplementedError, AttributeError):
        return False


def _traced(function: Callable[..., Any], batch: Batch, program: Program, what: str = "model") -> poutine.Trace:
    # A guide that is set up here may ask what depends on what in the model.
    with explained(program, batch, what), torch.no_grad(), ShapesKept():
        return checked_trace(function, batch)[0]


def _derived_offers(program: Program, sites: dict[str, Site], plate: bool, free: bool) -> frozenset[str]:
    latents = [site for site in sites.values() if site.latent]
    observed = [site for site in sites.values() if site.kind == "observed"]
    local = [site for site in latents if site.local]
    offers = {
        "density": not program.drawn_by_chain and not any(site.likelihood_free for site in observed),
        "latent sites": bool(latents),
        "samples": bool(observed) and not any(site.improper for site in local),
        "differentiable samples": not program.drawn_by_chain
        and bool(observed)
        and all(site.reparameterised for site in latents)
        and all(site.reparameterised or not site.discrete or site.support is not None for site in observed)
        and all(site.reparameterised or site.averaged for site in observed),
        "finite local latents": bool(local) and all(site.finite for site in local),
        "no free parameters": not free,
        "differentiable latents": bool(latents) and all(site.finite or not site.discrete for site in latents),
        "codes": bool(latents) and all(s.local and s.reparameterised and not s.improper for s in latents),
        "data plate": plate,
        "noise prediction": program.time_steps is not None and program.time_steps.error is not None,
        **{offer: getattr(program, name) is not None for name, offer in program.offer_fields().items()},
    }
    return frozenset(name for name, held in offers.items() if held)
