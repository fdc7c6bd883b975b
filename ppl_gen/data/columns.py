"""Columns of the data that make inference hard without being wrong: constant, or on a scale far from the others'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl_gen.data.arrays import shared
from ppl_gen.data.on_disk import RowsOnDisk

__all__ = ["column_notes"]

FAR = 1e3  # times larger or smaller than one
_ROWS = 10_000  # rows that are looked at
_MOST = 32  # columns that are looked at: of images, pixels are no features with units of their own
_NAMED = 4


def column_notes(entries: Mapping[str, Any], *, scaled: bool = False) -> dict[str, str]:
    """Notes on numeric columns, named as ``entry[:, j]``: ``constant columns`` and ``unscaled columns``.

    A column is unscaled where its standard deviation, or its distance from zero in standard deviations, is a thousand
    and more (or a thousandth and less, of the standard deviation): priors of order one and learning rates are at odds
    with it, and float32 loses its digits. Integers, which may be labels or counts, are not looked at for that, nor
    anything that a recipe has ``scaled``. A constant vector may be a known error or exposure, and a column of ones the
    intercept: constants are looked for among the other columns of tables. Tables with a mask of their shape are passed
    over, since what stands where nothing was observed is no number of theirs.

    >>> rows = torch.arange(6.0)
    >>> column_notes({"x": torch.stack([rows, 1e5 * rows, 3 * torch.ones(6)], 1)})["unscaled columns"]
    'x[:, 1] (mean 2.5e+05, sd 1.9e+05); standardise: subtract the mean, divide by the sd'
    """
    constant, unscaled = [], []
    masks = {tuple(value.shape) for value in entries.values() if _is_mask(value)}
    for name, value in entries.items():
        table = _table(value)
        if table is None or tuple(value.shape) in masks:
            continue
        floats = table.is_floating_point()
        columns = table.double()
        mean, sd, flat = columns.mean(0), columns.std(0), (columns == columns[0]).all(0)
        for j in range(columns.shape[1]):
            label = name if value.ndim == 1 else f"{name}[:, {j}]"
            m, s = float(mean[j]), float(sd[j])
            if bool(flat[j]):
                if value.ndim == 1 or m == 1:
                    continue
                constant.append(f"{label} (all {float(columns[0, j]):.3g})")
            elif floats and not scaled and (s >= FAR or s <= 1 / FAR or abs(m) >= FAR * s):
                unscaled.append(f"{label} (mean {m:.2g}, sd {s:.2g})")
    found = {}
    if constant:
        hint = "say nothing of what varies; leave them out, or let them be the intercept alone"
        found["constant columns"] = f"{_listed(constant)}; they {hint}"
    if unscaled:
        found["unscaled columns"] = f"{_listed(unscaled)}; standardise: subtract the mean, divide by the sd"
    return found


def _is_mask(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray) and str(value.dtype).endswith("bool")


def _table(value: Any) -> Tensor | None:
    """Rows x columns of an entry whose columns mean something one by one; None for others."""
    if isinstance(value, RowsOnDisk) and value.ndim in (1, 2):
        value = value[:_ROWS] if value.shape[-1] <= _MOST or value.ndim == 1 else None
    if isinstance(value, np.ndarray):
        value = shared(value)
    if not isinstance(value, Tensor) or value.ndim not in (1, 2) or len(value) < 3 or value.dtype is torch.bool:
        return None
    table = value[:_ROWS].reshape(min(len(value), _ROWS), -1).detach().cpu()
    return table if table.shape[1] <= _MOST else None


def _listed(columns: list[str]) -> str:
    more = len(columns) - _NAMED
    return ", ".join(columns[:_NAMED]) + (f" and {more} more" if more > 0 else "")
