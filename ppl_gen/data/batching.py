"""Rows: whatever a user passes as data, checked once and handed out whole or in batches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl_gen.data.arrays import check_extent, check_finite, where_missing
from ppl_gen.data.calls import Constant, as_call, by_step
from ppl_gen.data.dataset import FEW, LARGE, Batch, Dataset
from ppl_gen.data.frames import check_indices, frames
from ppl_gen.data.on_disk import RowsOnDisk
from ppl_gen.data.sources import collected
from ppl_gen.data.streamed import StreamedRows, as_stream_dataset
from ppl_gen.data.streams import Stream

__all__ = ["FEW", "LARGE", "Batch", "Constant", "Dataset", "as_dataset", "by_step", "constant", "is_double"]


def constant(value: Any) -> Constant:
    """Mark an entry of the data as having no rows: it is passed whole with every batch.

    >>> constant([1.0, 2.0]).value
    [1.0, 2.0]
    """
    return Constant(value)


def as_dataset(
    data: Any,
    model: Callable[..., Any],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    read: Collection[str] = (),
    data_dim: int = 0,
    like: Dataset | None = None,
    missing: bool = False,
) -> Dataset:
    """Check ``data`` against the signature of ``model`` and wrap it; a recipe has ``read`` entries of these names.

    ``like``: the rows of a fit, whose dtype, device and dimension of rows these rows take. ``missing``: NaN is let
    through, for `missing.refuse_read_nan` to judge.

    Raises:
        TypeError: for data that is no tensor, array, mapping, Dataset or DataLoader, or holds no numbers.
        ValueError: for empty data, NaN or infinity, rows that differ in number, a missing or misspelt argument.
    """
    if like is not None:
        dtype, device, read, data_dim = like.dtype, like.device, like.read, like.data_dim
    if isinstance(data, StreamedRows):
        data = data.stream
    if isinstance(data, Stream):
        made = partial(as_dataset, model=model, dtype=dtype, device=device)
        return as_stream_dataset(data, partial(made, read=read, data_dim=data_dim, missing=missing))
    if isinstance(data, Dataset):
        return replace(data, dtype=dtype or data.dtype, device=device or data.device)
    original, data = data, collected(data)
    call = as_call(data, model, read)
    for name in call.taken.keys() & (set() if like is None else like.entries.keys()):
        check_extent(name, torch.empty((), device="meta"))  # rows before, and now a single number
    entries = {name: _rows_first(value, data_dim) for name, value in call.entries.items()}
    rows = _common_rows(entries)
    check_indices(frames(original, call.order, next(iter(entries), "data")))
    values = {**entries, **call.constants}
    if dtype is None:
        dtype = torch.float64 if any(map(is_double, values.values())) else torch.float32
    lacking = {}
    for name, value in values.items():
        if not missing:
            check_finite(name, value, dtype)
        elif said := where_missing(name, value, dtype):
            lacking[name] = said
    return Dataset(
        entries,
        call.constants,
        call.positional,
        call.order,
        rows,
        device,
        dtype,
        getattr(data, "on_batch", None),
        original,
        call.left_out,
        frozenset(read),
        call.taken,
        data_dim,
        lacking,
    )


def _rows_first(value: Any, dim: int) -> Any:
    dim = min(dim, value.ndim - 1)
    if dim <= 0:
        return value
    if isinstance(value, RowsOnDisk):
        raise ValueError(f"data_dim: rows of data on disk come first, got dimension {dim}; write the file transposed")
    return value.movedim(dim, 0).contiguous() if isinstance(value, Tensor) else np.moveaxis(value, dim, 0)


def _common_rows(entries: Mapping[str, Any]) -> int | None:
    sizes = {name: value.shape[0] if value.ndim else None for name, value in entries.items()}
    for name, value in entries.items():
        check_extent(name, value)
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name}: {size}" for name, size in sizes.items())
        raise ValueError(
            f"data: entries must share their rows (first dimension), got {listed}; wrap what has no rows in "
            "pg.constant(...)"
        )
    return next(iter(sizes.values()), None)


def is_double(value: Any) -> bool:
    """Whether ``value`` was made in float64; plain numbers and lists of them ask for no precision."""
    if isinstance(value, Constant):
        return is_double(value.value) if isinstance(value.value, Tensor | np.ndarray) else False
    if isinstance(value, Tensor | np.ndarray):
        return value.dtype in (torch.float64, np.float64)
    return str(getattr(value, "dtype", "")) == "float64"


def is_single(value: Any) -> bool:
    """Whether ``value`` holds floats of another precision than float64."""
    value = value.value if isinstance(value, Constant) else value
    if isinstance(value, Tensor):
        return value.is_floating_point() and value.dtype is not torch.float64
    return not is_double(value) and str(getattr(value, "dtype", "")).startswith("float")
