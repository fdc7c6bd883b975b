"""Values that are missing from the data, as NaN: allowed where nothing in the program reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ppl_gen.data.batching import LARGE, Batch, Dataset
from ppl_gen.errors import PROGRAM_ERRORS
from ppl_gen.handlers.sites import is_sample
from ppl_gen.workspace.isolation import validation_off, without_side_effects

__all__ = ["refuse_read_nan"]


def refuse_read_nan(model: Callable[..., Any], data: Dataset) -> None:
    """Run the program on all rows, if NaN stands in them, and see whether it reaches a site; inside a workspace.

    What `obs_mask` hides does not: see `handlers.obs_masks`.

    Raises:
        ValueError: naming entry, place and the site that reads it.
    """
    if not data.missing:
        return
    refused = next(iter(data.missing.values()))
    with without_side_effects(), validation_off():
        for batch in _pieces(data):
            try:
                site = _reader(model, batch)
            except PROGRAM_ERRORS as error:
                if _runs(model, _without_nan(batch)):
                    raise ValueError(f"{refused}; the program cannot be run on them") from error
                return  # it does not run in any case: the dry run says why
            if site:
                raise ValueError(f"{refused}; the program reads them at site {site!r}")


def _pieces(data: Dataset) -> Iterator[Batch]:
    if data.streamed is not None:
        return iter([data.most()])
    size = max(1, (data.rows or 1) * LARGE // max(1, data.elements))
    return data.chunks(size)


def _reader(model: Callable[..., Any], batch: Batch) -> str:
    """The first site with NaN in its distribution, value, mask or scale; sites that only name a value read nothing."""
    trace = poutine.trace(model).get_trace(*batch.args, **batch.kwargs)
    for name, node in trace.nodes.items():
        if not is_sample(node):
            continue
        parts = [*_tensors(node["fn"]), node["value"], node["mask"], node["scale"]]
        if any(isinstance(p, Tensor) and p.is_floating_point() and bool(p.isnan().any()) for p in parts):
            return name.removesuffix("_observed") if name.removesuffix("_observed") in trace.nodes else name
    return ""


def _tensors(fn: Any) -> list[Tensor]:
    parts = list(vars(fn).values())
    inner = [p for p in parts if isinstance(p, torch.distributions.Distribution)]
    return [p for p in parts if isinstance(p, Tensor)] + [t for part in inner for t in _tensors(part)]


def _without_nan(batch: Batch) -> Batch:
    def filled(value: Any) -> Any:
        return value.nan_to_num(0.0) if isinstance(value, Tensor) and value.is_floating_point() else value

    kwargs = {name: filled(value) for name, value in batch.kwargs.items()}
    return replace(batch, args=tuple(map(filled, batch.args)), kwargs=kwargs)


def _runs(model: Callable[..., Any], batch: Batch) -> bool:
    try:
        model(*batch.args, **batch.kwargs)
    except PROGRAM_ERRORS:
        return False
    return True
