"""What recipes read of the training data before they build a program."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ppl_gen.data.batching import Constant
from ppl_gen.data.sources import collected
from ppl_gen.models.markov_steps import active_steps

__all__ = ["entries", "sequences"]


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


def sequences(data: Any, program: str) -> tuple[Tensor, Tensor]:
    """The entry x, sequences x time, and which of its steps hold data by the entry lengths: true or false.

    Raises:
        ValueError: for another shape, or lengths that are not one whole number from 1 to time for each sequence.

    Example:
        >>> sequences({"x": [[1, 2, 0]], "lengths": [2]}, "hidden_markov")
        (tensor([[1, 2, 0]]), tensor([[ True,  True, False]]))
    """
    x, lengths = entries(data, program, "x", "lengths")
    assert x is not None  # the first entry
    if x.dim() != 2:
        hint = "; one sequence is x[None]" if x.dim() == 1 else ""
        raise ValueError(f"data: {program} takes sequences x time, got shape {tuple(x.shape)}{hint}")
    if lengths is None:
        return x, active_steps(x, None)
    if lengths.shape != x.shape[:1] or lengths.is_floating_point():
        raise ValueError(f"lengths: expected {len(x)} whole numbers, one per sequence, got {tuple(lengths.shape)}")
    if bool(((lengths < 1) | (lengths > x.shape[1])).any()):
        raise ValueError(f"lengths: expected numbers from 1 to {x.shape[1]}, got {lengths.min()} to {lengths.max()}")
    return x, active_steps(x, lengths)


def _numbers(value: Any, name: str) -> Tensor:
    try:
        return torch.as_tensor(value.value if isinstance(value, Constant) else value).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"data {name!r}: expected a tensor or an array of numbers, got {type(value).__name__}"
        ) from error
