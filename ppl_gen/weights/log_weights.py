"""log p - log q of one run of model and guide: by row of the data plate, and of the sites outside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ppl_gen.data.batching import Batch
from ppl_gen.handlers.local_particles import LocalParticles
from ppl_gen.handlers.sites import in_plate, is_sample, is_subsample, log_density, own_scale
from ppl_gen.handlers.substitute import Substitute
from ppl_gen.program.info import ProgramInfo

__all__ = ["LogWeights", "collected", "global_draw", "sampled", "subsamples", "traced", "traced_together"]


@dataclass(frozen=True)
class LogWeights:
    """log w of one batch, nats: ``rows`` particles x rows (None without sites in the data plate), ``globals`` a scalar.

    Where a sum over a site outside the data plate ties the rows together, they are one: ``rows`` is particles x 1.

    Of a global site at a given value, ``globals`` holds log p alone: log q is known to the call that drew it.
    Where the program itself subsamples its data plate, ``scale`` is N / B, which belongs outside every logsumexp, and
    ``subsample`` the rows it chose: further particles have to be given these, to be weights of the same rows.
    """

    rows: Tensor | None
    globals: Tensor
    scale: float = 1.0
    subsample: Mapping[str, Tensor] = field(default_factory=dict)


def sampled(
    guide: Callable[..., Any] | None, batch: Batch, values: Mapping[str, Tensor] | None = None
) -> poutine.Trace:
    """A trace of the guide with some sites at given values."""
    if guide is None:
        return poutine.trace(lambda *a, **k: None).get_trace(*batch.args, **batch.kwargs)
    with Substitute(values or {}):
        return poutine.trace(guide).get_trace(*batch.args, **batch.kwargs)


def global_draw(guide: Callable[..., Any] | None, batch: Batch, info: ProgramInfo) -> tuple[dict[str, Tensor], Tensor]:
    """One draw of the guide's sites outside the data plate, auxiliary ones included, and log q of it (a scalar, nats).

    Both from one call: a flow without an inverse cannot weigh the draw of an earlier one.
    """
    once = sampled(guide, batch)
    sites = {n: s for n, s in once.nodes.items() if is_sample(s) and not in_plate(s, info.data_plate)}
    log_q = sum((_unplated(site, info).sum() for site in sites.values()), torch.zeros(()))
    return {name: site["value"] for name, site in sites.items()}, torch.as_tensor(log_q)


def traced(
    model: Callable[..., Any], guide: Callable[..., Any] | None, batch: Batch, values: Mapping[str, Tensor]
) -> tuple[poutine.Trace, poutine.Trace]:
    """Model replayed against guide, and the guide."""
    q = sampled(guide, batch, values)
    p = poutine.trace(poutine.replay(_substituted(model, values), trace=q)).get_trace(*batch.args, **batch.kwargs)
    return p, q


def traced_together(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    info: ProgramInfo,
    batch: Batch,
    count: int,
    values: Mapping[str, Tensor],
) -> tuple[poutine.Trace, poutine.Trace]:
    assert info.data_plate is not None
    with LocalParticles(count, info.data_plate, info.plate_nesting):
        return traced(model, guide, batch, values)


def _substituted(model: Callable[..., Any], values: Mapping[str, Tensor]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with Substitute(values):
            return model(*args, **kwargs)

    return run if values else model


def subsamples(trace: poutine.Trace) -> dict[str, Tensor]:
    return {n: s["value"] for n, s in trace.nodes.items() if s["type"] == "sample" and is_subsample(s)}


def collected(
    p: poutine.Trace | None, q: poutine.Trace, info: ProgramInfo, count: int, values: Mapping[str, Tensor]
) -> LogWeights:
    """log p - log q by sites: ``rows`` count x rows, ``globals`` a scalar; without ``p`` minus log q alone."""
    rows: Tensor | None = None
    total = torch.zeros(())
    for trace, sign in ((p, 1.0), (q, -1.0)):
        for name, site in trace.nodes.items() if trace is not None else ():
            if not is_sample(site):
                continue
            if trace is p and not site["is_observed"] and name not in q.nodes and name not in values:
                continue  # drawn from the prior: the term and the proposal cancel
            inside = in_plate(site, info.data_plate)
            if trace is q and name in values and not inside:
                continue  # weighed when it was drawn
            value = _unplated(site, info)
            if inside:
                value = _by_particle(value, info, count)
                rows = sign * value if rows is None else rows + sign * value
            else:
                total = total + sign * value.sum()
    chosen = {**(subsamples(p) if p is not None else {}), **subsamples(q)}
    return LogWeights(rows, total, own_scale(q if p is None else p, info.data_plate), chosen)


def _unplated(site: dict[str, Any], info: ProgramInfo) -> Tensor:
    """The log density with the user's own scale and mask, without the data plate's N / B; in its batch shape, nats."""
    value = log_density(site)
    scale = site["scale"]
    for frame in site["cond_indep_stack"]:
        if frame.name == info.data_plate and frame.full_size and frame.full_size != frame.size:
            scale = scale * frame.size / frame.full_size
    if site["mask"] is not None:
        value = torch.where(torch.as_tensor(site["mask"]), value, value.new_zeros(()))
    return value * scale


def _by_particle(value: Tensor, info: ProgramInfo, count: int) -> Tensor:
    """A site's log density, of its batch shape, as particles x rows: sum what lies right of the rows and between."""
    dim = info.plate_dim if info.plate_dim is not None else -1
    if dim < -1:
        value = value.sum(tuple(range(dim + 1, 0)))
    lead = info.plate_nesting + dim  # vectorised plates left of the data plate
    value = value[(None,) * max(0, lead + 2 - value.dim())]
    if lead:
        value = value.sum(tuple(range(-1 - lead, -1)))
    return value.expand(count, value.shape[-1])
