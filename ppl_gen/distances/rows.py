"""Two sets of rows that can be compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["two_sets"]


def two_sets(names: tuple[str, str], first: Any, second: Any) -> tuple[Tensor, Tensor]:
    """Both as floating rows x numbers, further dimensions flattened.

    Raises:
        TypeError: for what is no tensor or array of real numbers.
        ValueError: for fewer than two rows, rows without numbers, other widths, or values that are not finite.
    """
    one, other = (_rows(name, value) for name, value in zip(names, (first, second), strict=True))
    if one.shape[1:] != other.shape[1:]:
        raise ValueError(
            f"{names[1]}: expected rows of shape {tuple(one.shape[1:])} as {names[0]} has, got {tuple(other.shape[1:])}"
        )
    return one.flatten(1), other.flatten(1)


def _rows(name: str, value: Any) -> Tensor:
    want = "a tensor or an array of real numbers, rows x numbers"
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub" and not isinstance(value, np.ma.MaskedArray):
        value = torch.from_numpy(np.ascontiguousarray(value))
    if not isinstance(value, Tensor) or value.is_complex() or value.is_quantized or value.layout != torch.strided:
        raise TypeError(f"{name}: expected {want}, got {type(value).__name__}")
    if value.device.type == "meta":
        raise ValueError(f"{name}: expected numbers, and a tensor on the device 'meta' holds none")
    if value.dim() < 2 or len(value) < 2 or not value[0].numel():
        raise ValueError(f"{name}: expected at least two rows of numbers, rows x numbers, got {tuple(value.shape)}")
    wide = value if value.is_floating_point() else value.to(torch.get_default_dtype())
    if wide.dtype in (torch.float16, torch.bfloat16):  # squares of a few hundred are beyond their range or precision
        wide = wide.float()
    if not bool(wide.isfinite().all()):
        raise ValueError(f"{name}: expected finite numbers, and some are NaN or infinite; leave out these rows")
    return wide
