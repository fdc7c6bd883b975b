"""Observations outside the data plate, on minibatches: allowed where they do not depend on the rows of the batch."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine

from ppl_gen.data.batching import Batch
from ppl_gen.errors import IncompatibleError
from ppl_gen.fitting.run import Run
from ppl_gen.handlers.substitute import Substitute
from ppl_gen.workspace.isolation import validation_off, without_side_effects

__all__ = ["refuse_rows_outside"]


def refuse_rows_outside(run: Run, size: int) -> None:
    """Raise IncompatibleError if the density of an observed site outside the data plate differs from batch to batch.

    An outcome of groups is the same whatever the batch, and counts once. A sum over rows, or over latents of the rows,
    would be that of the batch, and N / B times it is not that of the data. Two batches and their union are compared,
    the sites outside of the plate at the same values.
    """
    names = [site.name for site in run.info.select(kind="observed", local=False)]
    if not names or run.data.rows is None:
        return
    # Not in the order of the data, which may repeat itself from batch to batch.
    rows = torch.randperm(run.data.rows, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    shared = [site.name for site in run.info.select(local=False)]
    with without_side_effects(), validation_off():
        first = _nodes(run, run.data.batch(rows[:size]), {})
        values = {name: first[name]["value"] for name in shared if name in first}
        others = [_nodes(run, run.data.batch(index), values) for index in (rows[-size:], rows[: 2 * size])]
    moved = [name for name in names if any(not _alike(first.get(name), other.get(name)) for other in others)]
    if moved:
        raise IncompatibleError(
            f"the observed site(s) {moved} stand outside the data plate {run.info.data_plate!r}, and their density "
            "depends on the rows of the batch, which minibatches cannot rescale; leave batch_size out, or write them "
            "so that they depend on constants and global sites only"
        )


def _nodes(run: Run, batch: Batch, values: dict[str, Any]) -> dict[str, Any]:
    with Substitute(values):
        nodes: dict[str, Any] = poutine.trace(run.joint).get_trace(*batch.args, **batch.kwargs).nodes
    return nodes


def _alike(one: Any, other: Any) -> bool:
    if one is None or other is None:
        return one is other
    mine, theirs = (node["fn"].log_prob(node["value"]) for node in (one, other))
    return mine.shape == theirs.shape and torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)
