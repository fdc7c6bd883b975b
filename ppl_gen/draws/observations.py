"""What of the rows was observed: values, and the entries and rows that masks leave out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from pyro.distributions import MaskedDistribution
from torch import Tensor

from ppl_gen.data.batching import Batch

if TYPE_CHECKING:
    from ppl_gen.fits.result import Fit

__all__ = ["entry_mask", "observed_rows", "rows_observed"]


def observed_rows(fit: Fit, batch: Batch) -> dict[str, Tensor]:
    """Values of the observed sites in their shapes, NaN where a mask hides them; call inside ``fit.bound()``.

    The program runs on the rows, and with it whatever its latents cost: few rows are to be asked for.
    """
    trace = poutine.trace(fit.program.model).get_trace(*batch.args, **batch.kwargs)
    names = [site.name for site in fit.info.select(kind="observed")]
    return {fit.info.shown(name): _seen(trace.nodes[name]) for name in names if name in trace.nodes}


def rows_observed(fit: Fit, batch: Batch) -> Tensor:
    """Which rows hold an observation: all but those that masks leave out of every observed site."""
    trace = poutine.trace(fit.program.model).get_trace(*batch.args, **batch.kwargs)
    nodes = [
        trace.nodes[site.name] for site in fit.info.select(kind="observed", local=True) if site.name in trace.nodes
    ]
    rows, dim = batch.rows or _in_plate(trace, fit.info.data_plate), fit.info.plate_dim
    found = torch.zeros(rows, dtype=torch.bool)
    for node in nodes:
        mask = entry_mask(node)
        if mask is None or dim is None:
            return torch.ones(rows, dtype=torch.bool)
        found |= mask.movedim(dim - node["fn"].event_dim, 0).reshape(rows, -1).any(1)
    factors = fit.info.select(kind="factor", local=True)
    return found if nodes and not factors else torch.ones(rows, dtype=torch.bool)


def _in_plate(trace: poutine.Trace, plate: str | None) -> int:
    """How many rows a plate has: what the data do not tell whose rows stand inside of one argument, as of a dict."""
    frames = (frame for node in trace.nodes.values() for frame in node.get("cond_indep_stack", ()))
    return next((frame.size for frame in frames if frame.name == plate), 1)


def _seen(node: Mapping[str, Any]) -> Tensor:
    """The value of one observed site in its shape, NaN where a mask hides it."""
    value: Tensor = node["value"]
    mask = entry_mask(node)
    return value if mask is None else torch.where(mask, value, torch.nan)


def entry_mask(node: Mapping[str, Any]) -> Tensor | None:
    """Which entries of an observed value count, in its shape; None where no mask hides any.

    A mask is that of the statement (`obs_mask`, `poutine.mask`) or one of its distribution, ``fn.mask(...)``.
    """
    value, fn = node["value"], node["fn"]
    shown = torch.ones(value.shape, dtype=torch.bool, device=value.device)
    layers = [(node["mask"], fn.batch_shape, fn.event_dim)]
    while fn is not None:
        if isinstance(fn, MaskedDistribution):
            layers.append((fn._mask, fn.batch_shape, fn.event_dim))
        fn = getattr(fn, "base_dist", None)
    for mask, batch, event in layers:
        if mask is not None:
            whole = torch.as_tensor(mask, device=value.device).bool().expand(batch)
            shown &= whole.reshape(*whole.shape, *[1] * event)
    return None if bool(shown.all()) else shown
