"""What is kept of a fit's draws beside its weights: as many draws and rows as are read without its program."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ppl_gen.bridge import to_tree
from ppl_gen.data.batching import LARGE, Batch
from ppl_gen.diagnostics.export import provenance
from ppl_gen.diagnostics.labels import labels_of, variable_shapes
from ppl_gen.diagnostics.posterior_group import as_array
from ppl_gen.draws.observations import observed_rows
from ppl_gen.draws.predictive import amortised
from ppl_gen.weights.densities import derived
from ppl_gen.weights.work import alone

if TYPE_CHECKING:
    from ppl_gen.fits.result import Fit

__all__ = ["DRAWS", "ROWS", "excerpt"]

DRAWS, ROWS = 1000, 256
_CELLS = 20_000_000  # numbers drawn in all, kept or not, before fewer draws have to do
_FEWEST = 25
_WORK = 200_000_000  # numbers of data that a program runs through, draw by draw, for its deterministic sites


def excerpt(fit: Fit) -> Any:
    """ArviZ's tree of a fit at a bounded cost: nothing is weighed, predicted or judged for it.

    Groups: posterior (chains as they are; else at most 1000 draws of a guide, fewer where it draws many numbers at
    once), sample_stats (those of a sampler, or the losses), observed_data and constant_data. Sites and entries with
    more than 256 rows are kept for the first 256; ``attrs["rows"]`` and ``attrs["lacks"]`` say what is left out.
    """
    attrs: dict[str, Any] = {"kind": fit.learned.kind, **provenance(fit)}
    with fit.bound():
        posterior, lacking = _posterior(fit)
        rows = fit.data.rows
        many = fit.info.data_plate is not None and rows is not None and rows > ROWS
        batch = fit.data.head(ROWS) if many else fit.data.most()
        observed = {name: _first_rows(fit, name, value) for name, value in observed_rows(fit, batch).items()}
    entries = {**fit.data.entries, **{n: v for n, v in fit.data.constants.items() if isinstance(v, Tensor)}}
    inputs = {name: as_array(v[:ROWS] if name in fit.data.entries and v.ndim else v) for name, v in entries.items()}
    stats, unsampled = _statistics(fit)
    groups = {
        "posterior": posterior,
        "sample_stats": stats,
        "observed_data": observed,
        "constant_data": {name: value for name, value in inputs.items() if name not in observed},
    }
    if rows is not None and rows > ROWS:
        attrs["rows"] = f"the first {ROWS} of {rows}"
    if lacking:
        attrs["lacks"] = lacking
    kept = {k: v for k, v in groups.items() if v}
    head = fit.data if rows is None or rows <= ROWS else replace(fit.data, rows=ROWS)
    dims, labels = labels_of(fit.info, head, variable_shapes(kept), unsampled, fit.data)
    coords = {dim: values for dim, values in labels.items() if any(dim in axes for axes in dims.values())}
    return to_tree(kept, dims=dims, coords=coords, attrs=attrs, unsampled=unsampled)


def _posterior(fit: Fit) -> tuple[dict[str, np.ndarray], str]:
    """The posterior group, and what it lacks in words; inside ``fit.bound()``."""
    if not fit.info.select():
        return {}, "posterior: the program has no latent sites"
    if held := fit.learned.by_chain():
        flat = {name: value.flatten(0, 1) for name, value in held.items()}
        chains = len(next(iter(held.values())))
    else:
        flat, chains = _drawn(fit), 1
    if not flat:
        return {}, "posterior: the algorithm learned no posterior over latent sites"
    more, lacking = _deterministic(fit, flat)
    kept = {name: _first_rows(fit, name, value, lead=1) for name, value in flat.items()} | more
    return {name: value.reshape(chains, -1, *value.shape[1:]) for name, value in kept.items()}, lacking


def _drawn(fit: Fit) -> dict[str, Tensor]:
    """Draws x shape of every latent site that the algorithm learned of, rows beyond the first dropped at once."""
    names, batch = {site.name for site in fit.info.select()}, _batch(fit)
    if not fit.learned.independent:
        return _together(fit, batch)

    def one() -> tuple[dict[str, Tensor], int]:
        drawn = {n: torch.as_tensor(v) for n, v in fit.learned.draw(1, batch)[0].items() if n in names}
        kept = {name: _head(fit, name, value).detach().clone() for name, value in drawn.items()}
        return kept, sum(value.numel() for value in drawn.values())

    first, size = one()
    count = 1 if fit.learned.point is not None else min(alone(fit, DRAWS), max(_FEWEST, _CELLS // max(1, size)))
    draws = [first, *(one()[0] for _ in range(count - 1))]
    return {name: torch.stack([draw[name] for draw in draws]) for name in first}


def _together(fit: Fit, batch: Batch) -> dict[str, Tensor]:
    shapes = {site.name: (*site.batch_shape, *site.event_shape) for site in fit.info.select()}
    size = sum(math.prod(shape) for shape in shapes.values())
    drawn = fit.learned.draw(min(alone(fit, DRAWS), max(_FEWEST, _CELLS // max(1, size))), batch)
    names = [name for name in drawn[0] if name in shapes] if drawn else []
    return {n: torch.stack([_head(fit, n, torch.as_tensor(draw[n])).detach() for draw in drawn]) for n in names}


def _batch(fit: Fit) -> Batch:
    """What a guide is called with: the first rows where it follows them, or where only globals are drawn of many."""
    rows = fit.data.rows
    if rows is None or rows <= ROWS:
        return fit.data.most()
    local = {site.name for site in fit.info.select(local=True)}.intersection(fit.info.guide_sites or {})
    large = fit.data.elements > LARGE or fit.data.beyond_memory
    if amortised(fit) or (not local and large and fit.info.data_plate):
        return fit.data.head(ROWS)
    return fit.data.batch()


def _deterministic(fit: Fit, flat: Mapping[str, Tensor]) -> tuple[dict[str, np.ndarray], str]:
    """What follows from the globals outside the data plate, from the whole data."""
    sites = fit.info.select(kind="deterministic", local=False)
    if not sites or not flat:
        return {}, ""
    count = len(next(iter(flat.values())))
    if count * fit.data.elements > _WORK:
        named = ", ".join(site.name for site in sites)
        return {}, f"{named}: computed from {fit.data.rows} rows for every draw, which only fit.to_arviz() does"
    known = {name: value for name, value in flat.items() if not fit.info.sites[name].local}
    draws = [{name: value[i] for name, value in known.items()} for i in range(count)]
    rows = derived(fit, fit.data.batch(), draws)
    return {name: as_array(torch.stack([row[name] for row in rows])) for name in rows[0]}, ""


def _head(fit: Fit, name: str, value: Tensor, lead: int = 0) -> Tensor:
    """The first rows of a value of a site, along the axis of the data plate."""
    site, dim = fit.info.sites.get(name), fit.info.plate_dim
    if site is None or not site.local or dim is None:
        return value
    axis = lead + len(site.batch_shape) + dim
    return value.narrow(axis, 0, min(ROWS, value.shape[axis])) if lead <= axis < value.dim() else value


def _first_rows(fit: Fit, name: str, value: Tensor, lead: int = 0) -> np.ndarray:
    return as_array(_head(fit, name, torch.as_tensor(value), lead))


def _statistics(fit: Fit) -> tuple[dict[str, np.ndarray], list[str]]:
    """A sampler's own numbers, or the losses of every step (whose names are also given: they are no draws)."""
    if fit.learned.stats:
        return {name: as_array(value) for name, value in fit.learned.stats.items()}, []
    wanted = [name for name in fit.records if name.endswith("loss")]
    wanted = wanted or [name for name in fit.records if name in ("elbo", "log_likelihood")]
    renamed = {"loss" if name == "program_loss" else name: np.asarray(fit.records[name]) for name in wanted}
    return renamed, list(renamed)
