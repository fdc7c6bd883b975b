"""Single entries of the data: what counts as an array of numbers, and what is wrong with one that does not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl_gen.data.on_disk import WHOLE, BadRowsError, RowsOnDisk, is_on_disk, on_disk

__all__ = ["FILL", "as_array", "check_extent", "check_finite", "equal", "largest", "shared", "where_missing"]

#: What to do about values that are not finite.
FILL = (
    "drop these rows, hide them from a site by `pyro.sample(..., obs=y, obs_mask=mask)`, or pass a finite filler "
    "together with a mask that the program applies (poutine.mask)"
)


def as_array(value: Any, name: str) -> Any:
    """One entry as a tensor (a file as `RowsOnDisk`); raises TypeError, naming it, for what holds no real numbers."""
    if is_on_disk(value):
        return on_disk(value)
    if isinstance(value, Tensor):
        _check_kind(name, value.layout is torch.strided, "a sparse tensor; pass .to_dense()")
        _check_kind(name, value.device.type != "meta", "a meta tensor, which holds none; pass one on a device")
        _check_kind(name, not value.is_quantized, "a quantised tensor; pass .dequantize()")
        _check_kind(name, not value.is_complex(), "complex ones; pass real and imaginary parts as columns")
        return value.detach().contiguous()  # sums over strided memory round differently: equal rows, equal fits
    if isinstance(value, tuple) and any(isinstance(part, Tensor | np.ndarray) and part.ndim for part in value):
        raise TypeError(
            f"data {name!r}: got a tuple of {len(value)} arrays; pass a mapping from the model's arguments to them, "
            'such as {"x": x, "y": y}'
        )
    _check_kind(
        name,
        not isinstance(value, np.ma.MaskedArray),
        "a masked array; pass its filled values and its mask as two entries, the mask for poutine.mask",
    )
    if isinstance(value, list) and any(isinstance(part, Tensor) for part in value):
        value = [part.detach().cpu() if isinstance(part, Tensor) else part for part in value]
    try:
        array = np.asarray(value)
        if array.dtype == object or array.dtype.kind in "USOMmc":
            raise TypeError
        return shared(array)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"data {name!r}: expected a tensor or an array of numbers, got {type(value).__name__}; "
            "wrap what has no rows in pg.constant(...)"
        ) from error


def _check_kind(name: str, held: bool, got: str) -> None:
    if not held:
        raise TypeError(f"data {name!r}: expected a tensor or an array of real numbers, got {got}")


def shared(array: np.ndarray) -> Tensor:
    """The array as a tensor; what torch cannot share (other byte order, odd strides, read-only) is copied."""
    return torch.as_tensor(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]), device="cpu")


def check_extent(name: str, value: Any) -> None:
    """Raise ValueError, naming the entry, unless it has at least one row and one column."""
    if not value.ndim:
        raise ValueError(f"data {name!r}: expected rows along the first dimension, got a single number")
    if 0 in value.shape:
        raise ValueError(f"data {name!r}: expected at least one row and one column, got {tuple(value.shape)}")


def check_finite(name: str, value: Any, dtype: torch.dtype, hint: str = FILL) -> None:
    """Raise ValueError for NaN, infinity, or what is that in ``dtype``; ``hint`` ends the message."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"data {name!r}: expected a finite number, got {value}")
    if isinstance(value, RowsOnDisk):
        return _check_file(name, value, dtype)
    if not isinstance(value, Tensor | np.ndarray):
        return
    tensor = value if isinstance(value, Tensor) else shared(value)
    if not tensor.is_floating_point() or largest(tensor) <= _limit(tensor, dtype):
        return
    bad = _beyond(tensor, dtype)
    count = int(bad.sum())
    if count:
        first = tuple(int(i) for i in bad.nonzero()[0])
        beyond = f" (or too large for {dtype})" if bool(tensor[bad].isfinite().any()) else ""
        raise ValueError(
            f"data {name!r}: {count} value(s) are NaN or infinite{beyond}, the first at index {first}; {hint}"
        )


def _check_file(name: str, value: RowsOnDisk, dtype: torch.dtype) -> None:
    """Only of what is small are all rows looked at before they are used; of the others, as they are read."""
    if value.dtype.kind == "f" and value.nbytes <= WHOLE:
        row = 0
        for piece in value.pieces():
            bad = _beyond(piece, dtype).reshape(len(piece), -1).any(1)
            if bool(bad.any()):
                row += int(bad.nonzero()[0])
                raise ValueError(f"data {name!r}: row {row} holds a value that is NaN or infinite; {FILL}")
            row += len(piece)


def _beyond(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Which entries are no finite numbers of ``dtype``."""
    return ~(tensor.abs() <= _limit(tensor, dtype))


def _limit(tensor: Tensor, dtype: torch.dtype) -> float:
    return min(torch.finfo(dtype).max, torch.finfo(tensor.dtype).max)


def largest(tensor: Tensor) -> float:
    """The largest absolute value, NaN where one is NaN, 0 of no values: one pass, and no copy.

    Example:
        >>> largest(torch.tensor([1.0, -3.0]))
        3.0
    """
    if not tensor.numel():
        return 0.0
    low, high = torch.aminmax(tensor.detach())
    return float(torch.maximum(-low, high))


def where_missing(name: str, value: Any, dtype: torch.dtype) -> str:
    """What `check_finite` says of an entry in which nothing but NaN is wrong; empty where nothing is.

    Raises:
        ValueError: for infinity, and for what is that in ``dtype``.
    """
    try:
        check_finite(name, value, dtype)
    except BadRowsError:
        raise
    except ValueError as error:
        if isinstance(value, RowsOnDisk):
            return str(error)
        tensor = value if isinstance(value, Tensor) else None if isinstance(value, float) else shared(value)
        if tensor is None or bool((_beyond(tensor, dtype) & ~tensor.isnan()).any()):
            raise
        return str(error)
    return ""


def equal(one: Any, two: Any) -> bool:
    """Whether two entries or constants hold the same, number for number, however deep they stand in lists and dicts."""
    if isinstance(one, RowsOnDisk):
        return one.same_as(two) if isinstance(two, RowsOnDisk | Tensor | np.ndarray) else False
    if isinstance(two, RowsOnDisk):
        return equal(two, one)
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one is two or (one.shape == two.shape and _same_numbers(one, two.to(one)))
    if type(one) is not type(two):
        return False
    if isinstance(one, Mapping):
        return one.keys() == two.keys() and all(equal(value, two[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(equal, one, two))
    return np.array_equal(one, two) if isinstance(one, np.ndarray) else bool(one == two)


def _same_numbers(one: Tensor, two: Tensor) -> bool:
    """NaN, which stands for what is missing, counts as equal to itself."""
    same = torch.equal(one, two)
    return same or (one.is_floating_point() and bool(((one == two) | (one.isnan() & two.isnan())).all()))
