"""Particles of local latents where finite sites are summed out: drawn one by one, and weighed all at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ppl_gen.data.batching import Batch
from ppl_gen.enumeration.marginals import enumerated_trace, log_prior, row_log_density
from ppl_gen.errors import PROGRAM_ERRORS
from ppl_gen.program.checks import require_enumerable
from ppl_gen.program.info import ProgramInfo
from ppl_gen.workspace.isolation import without_side_effects

__all__ = ["can_sum_together", "summed_densities"]

MAX_ELEMENTS = 4_000_000  # numbers of data times values of finite sites times particles

Values = Mapping[str, Tensor]


def can_sum_together(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    info: ProgramInfo,
    batch: Batch,
    sums: tuple[str, ...],
) -> bool:
    """Whether the sums of several particles at once (`torch.vmap`) come to what each comes to alone."""
    if not sums or info.data_plate is None or guide is None:
        return False
    try:
        require_enumerable(info, sums)
        with without_side_effects():
            traces = [poutine.trace(guide).get_trace(*batch.args, **batch.kwargs) for _ in range(2)]
            drawn = [{n: s["value"] for n, s in q.nodes.items() if s["type"] == "sample"} for q in traces]
            rows, prior = summed_densities(model, info, batch, drawn, {}, sums)
            alone = [_summed(model, info, batch, values, sums) for values in drawn]
    except PROGRAM_ERRORS:
        return False
    same = (torch.allclose(rows[i], a, rtol=1e-4, atol=1e-4, equal_nan=True) for i, (a, _) in enumerate(alone))
    return all(same) and all(torch.allclose(prior[i], b, rtol=1e-4, atol=1e-4) for i, (_, b) in enumerate(alone))


def summed_densities(
    model: Callable[..., Any],
    info: ProgramInfo,
    batch: Batch,
    drawn: list[dict[str, Tensor]],
    values: Values,
    sums: tuple[str, ...],
) -> tuple[Tensor, Tensor]:
    """Log densities particles x rows, finite sites ``sums`` summed out, and log p of the globals of each particle.

    In nats; particles x 1 where a site outside the data plate is among the ``sums``. ``drawn``: the sites of each
    particle; ``values``: those that all share.
    """
    stacked = {n: torch.stack([d[n] for d in drawn]) for n in drawn[0] if n not in values and n in info.sites}
    inputs = sum(v.numel() for v in (*batch.args, *batch.kwargs.values()) if isinstance(v, Tensor))

    def one(part: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return _summed(model, info, batch, {**part, **values}, sums)

    if not stacked:
        rows, prior = one({})
        return rows.expand(len(drawn), *rows.shape), prior.expand(len(drawn))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that an operation has no batching rule costs time, no more
        found: tuple[Tensor, Tensor] = torch.vmap(one, chunk_size=max(1, MAX_ELEMENTS // (10 * max(1, inputs))))(
            stacked
        )
    return found


def _summed(
    model: Callable[..., Any], info: ProgramInfo, batch: Batch, values: Values, sums: tuple[str, ...]
) -> tuple[Tensor, Tensor]:
    """At one particle's values: log densities of rows (a single one where ``sums`` tie them), and log p, a scalar."""
    p = enumerated_trace(
        model, batch.args, batch.kwargs, discrete=sums, values=values, plate_nesting=info.plate_nesting, varying=True
    )
    plate = info.rows_plate(sums)
    rows = row_log_density(p, plate)
    return rows, torch.as_tensor(log_prior(p, plate), dtype=rows.dtype)
