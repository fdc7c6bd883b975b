"""Importance-weighted particles of local latents, vectorised where the program allows it, unrolled where not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ppl_gen.data.batching import Batch
from ppl_gen.errors import PROGRAM_ERRORS
from ppl_gen.handlers.sites import is_subsample, own_scale
from ppl_gen.program.checks import require_enumerable
from ppl_gen.program.info import ProgramInfo
from ppl_gen.weights.log_weights import LogWeights, collected, sampled, subsamples, traced, traced_together
from ppl_gen.workspace.isolation import without_side_effects

__all__ = ["can_vectorise", "local_log_weights", "log_weights_in_chunks", "most_at_once", "of_particle"]

MAX_ELEMENTS = 4_000_000  # numbers of one tensor, where no gradient asks for all particles together


def can_vectorise(
    model: Callable[..., Any], guide: Callable[..., Any] | None, info: ProgramInfo, batch: Batch, sums: tuple[str, ...]
) -> bool:
    """Whether particles as one more dimension on the left go through this program, and come to the same numbers."""
    if sums or info.data_plate is None:
        return False
    try:
        with without_side_effects():
            return _same_one_by_one(model, guide, info, batch)
    except PROGRAM_ERRORS:
        # Convolutions and batch norm refuse the extra dimension, and a flow without an inverse cannot be asked again
        # for the density of one particle of many: unroll instead.
        return False


def _same_one_by_one(
    model: Callable[..., Any], guide: Callable[..., Any] | None, info: ProgramInfo, batch: Batch
) -> bool:
    """A softmax over dim=1, say, takes the extra dimension without a word and means something else by it."""
    p, q = traced_together(model, guide, info, batch, 2, {})
    together = collected(p, q, info, 2, {})
    nodes = {name: site for trace in (p, q) for name, site in trace.nodes.items() if site["type"] == "sample"}
    for k in range(2):
        values = {n: of_particle(s, k, info) for n, s in nodes.items() if not s["is_observed"]}
        alone_p, alone_q = traced(model, guide, batch, values)
        alone = collected(alone_p, alone_q, info, 1, {})
        if together.rows is None or alone.rows is None or together.rows.shape[1:] != alone.rows.shape[1:]:
            return False
        if not torch.allclose(together.rows[k], alone.rows[0], rtol=1e-3, atol=1e-3, equal_nan=True):
            return False
    return True


def of_particle(site: dict[str, Any], k: int, info: ProgramInfo) -> Tensor:
    """The value of one particle, in the shape that the site has without a plate of particles."""
    value: Tensor = site["value"]
    if is_subsample(site):  # which rows of a plate are taken is the same for all particles
        return value
    frames = [f for f in site["cond_indep_stack"] if f.vectorized and f.name != "_particles"]
    if not any(f.name == info.data_plate for f in frames):
        return value
    axis = value.dim() - site["fn"].event_dim - 1 - info.plate_nesting
    if axis < 0:
        return value
    depth = max(-f.dim for f in frames)
    one = value.select(axis, min(k, value.shape[axis] - 1))
    return one.reshape(one.shape[axis + info.plate_nesting - depth :])


def local_log_weights(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    info: ProgramInfo,
    batch: Batch,
    particles: int,
    *,
    values: Mapping[str, Tensor],
    sums: tuple[str, ...] = (),
    vectorise: bool,
) -> LogWeights:
    r"""log w_ki = log p(x_i, z_ki | theta) - log q(z_ki | x_i) per particle and row, at global values ``values``.

    Latent sites that the guide does not draw come from the model's own prior (their terms cancel) or, named in
    ``sums``, are summed out. No plate scale enters: it belongs outside every logsumexp.
    """
    if vectorise and sums and not _inside_vmap():
        return _summed_together(model, guide, info, batch, particles, values, sums)
    if vectorise and not sums:
        p, q = traced_together(model, guide, info, batch, particles, values)
        return collected(p, q, info, particles, values)
    drawn: list[LogWeights] = []
    for _ in range(particles):
        drawn.append(_single(model, guide, info, batch, values, sums))
        values = {**values, **drawn[-1].subsample}
    rows = None if drawn[0].rows is None else torch.stack([w.rows for w in drawn if w.rows is not None])
    return replace(drawn[0], rows=rows, globals=torch.stack([w.globals for w in drawn]).mean(0))


def log_weights_in_chunks(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    info: ProgramInfo,
    batch: Batch,
    particles: int,
    *,
    values: Mapping[str, Tensor],
    sums: tuple[str, ...] = (),
    vectorise: bool,
) -> LogWeights:
    """`local_log_weights` with as many particles at a time as keep each tensor at about `MAX_ELEMENTS` numbers."""
    most = most_at_once(batch)
    parts = []
    while particles > 0:
        count = min(most, particles)
        parts.append(local_log_weights(model, guide, info, batch, count, values=values, sums=sums, vectorise=vectorise))
        values = {**values, **parts[-1].subsample}
        particles -= count
    rows = [part.rows for part in parts if part.rows is not None]
    return replace(parts[0], rows=torch.cat(rows) if rows else None)


def most_at_once(batch: Batch) -> int:
    """How many copies of the batch `MAX_ELEMENTS` numbers are."""
    inputs = [v for v in (*batch.args, *batch.kwargs.values()) if isinstance(v, Tensor)]
    return max(1, MAX_ELEMENTS // max(1, sum(value.numel() for value in inputs)))


def _single(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    info: ProgramInfo,
    batch: Batch,
    values: Mapping[str, Tensor],
    sums: tuple[str, ...],
) -> LogWeights:
    """One particle, its rows without a dimension of particles."""
    if not sums:
        p, q = traced(model, guide, batch, values)
        weights = collected(p, q, info, 1, values)
        return replace(weights, rows=None if weights.rows is None else weights.rows[0])
    from ppl_gen.enumeration.marginals import enumerated_trace, log_prior, row_log_density

    require_enumerable(info, sums)
    q = sampled(guide, batch, values)
    drawn = {name: site["value"] for name, site in q.nodes.items() if site["type"] == "sample"}
    known = {**drawn, **values}
    p = enumerated_trace(
        model, batch.args, batch.kwargs, discrete=sums, values=known, plate_nesting=info.plate_nesting, varying=True
    )
    plate = info.rows_plate(sums)
    rows, minus_q = row_log_density(p, plate), collected(None, q, info, 1, values)
    if minus_q.rows is not None:
        rows = rows + (minus_q.rows[0] if plate is not None else minus_q.rows[0].sum())
    return LogWeights(rows, log_prior(p, plate) + minus_q.globals, own_scale(p, plate), subsamples(q))


def _summed_together(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    info: ProgramInfo,
    batch: Batch,
    count: int,
    values: Mapping[str, Tensor],
    sums: tuple[str, ...],
) -> LogWeights:
    """What `_single` gives ``count`` times, by the same random numbers, the sums of all in one run of the model."""
    from ppl_gen.weights.summed_particles import summed_densities

    traces = [sampled(guide, batch, values) for _ in range(count)]
    drawn = [{n: s["value"] for n, s in q.nodes.items() if s["type"] == "sample"} for q in traces]
    rows, prior = summed_densities(model, info, batch, drawn, values, sums)
    minus_q = [collected(None, q, info, 1, values) for q in traces]
    if minus_q[0].rows is not None:
        inside = torch.stack([w.rows[0] for w in minus_q if w.rows is not None])
        rows = rows + (inside if info.rows_plate(sums) is not None else inside.sum(-1, keepdim=True))
    outside = torch.stack([w.globals for w in minus_q])
    return LogWeights(rows, (prior + outside).mean(0))


def _inside_vmap() -> bool:
    """Whether all draws of the globals are under way at once: particles then go one by one, as before."""
    return torch._C._functorch.maybe_current_level() is not None
