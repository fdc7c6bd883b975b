"""What recipes read of the training data before they build a program."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ppl_gen.data.batching import Constant
from ppl_gen.data.sources import collected

__all__ = ["entries"]


def entries(data: Any, program: str, *names: str) -> list[Tensor | None]:
    """The entries of the data that a program reads, in order; data without names are the first. Missing ones are None.

    Raises:
        ValueError: if the first is missing.
        TypeError: if one does not hold numbers.

    Example:
        >>> entries({"x": [1.0, 2.0], "label": [0, 1]}, "gaussian_mixture", "x", "lengths")
        [tensor([1., 2.]), None]
    """
    data = collected(data)
    found = data if isinstance(data, Mapping) else {names[0]: data}
    if found.get(names[0]) is None:
        raise ValueError(f"data: {program} reads the entry {names[0]!r}, got only {', '.join(found) or 'none'}")
    return [None if found.get(name) is None else _numbers(found[name], name) for name in names]


def _numbers(value: Any, name: str) -> Tensor:
    try:
        return torch.as_tensor(value.value if isinstance(value, Constant) else value).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"data {name!r}: expected a tensor or an array of numbers, got {type(value).__name__}"
        ) from error
