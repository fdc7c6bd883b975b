"""What recipes read of the training data before they build a program."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ppl_gen.data.arrays import FILL, as_array, check_extent, check_finite, largest
from ppl_gen.data.batching import Constant
from ppl_gen.data.on_disk import WHOLE, RowsOnDisk, is_on_disk, on_disk
from ppl_gen.data.sources import Columns, collected
from ppl_gen.data.streams import Stream
from ppl_gen.errors import IncompatibleError, require_whole

__all__ = [
    "active_steps",
    "check_width",
    "checked_shape",
    "entries",
    "row_shape",
    "row_width",
    "seen_in_part",
    "sequences",
]

LOOK = 10_000  # rows of a large file that a recipe looks at, where these tell enough: the shape, where weights start
_MASK = 'leave missing entries out by a mask, True where observed: {"x": torch.nan_to_num(x), "mask": ~x.isnan()}'


def entries(data: Any, program: str, *names: str, few: bool = False) -> list[Tensor | None]:
    """The entries of the data that a program reads, in order; data without names are the first. Missing ones are None.

    ``few``: of a file too large for memory, some rows from all over it are enough; others refuse such a file.

    Raises:
        ValueError: if the first is missing, or one has no rows, is not finite or has squares that are not.
        TypeError: if one does not hold real numbers.

    Example:
        >>> entries({"x": [1.0, 2.0], "label": [0, 1]}, "gaussian_mixture", "x", "lengths")
        [tensor([1., 2.], dtype=torch.float64), None]
    """
    if isinstance(data, Stream):
        if not few:
            raise IncompatibleError(
                f"data: {program} computes constants from all of the rows, and a stream hands out batches; pass rows "
                "in memory or in a file, or an instance of the program that was made for them"
            )
        data = data.first
    data = collected(data)
    found = data if isinstance(data, Mapping) else _in_order(data, names)
    if found.get(names[0]) is None:  # nothing else is asked of the mapping: what nobody reads may be misspelt
        there = [str(name) for name, value in found.items() if value is not None]
        listed = f"only {', '.join(there)}" if there else "none"
        raise ValueError(f"data: {program} reads the entry {names[0]!r}, got {listed}")
    hint = _MASK if "mask" in names else FILL
    return [None if found.get(name) is None else _numbers(found[name], name, hint, program, few) for name in names]


def seen_in_part(data: Any) -> bool:
    """Whether the entry x lies in a file too large for memory, of which ``entries(..., few=True)`` gives some rows."""
    if isinstance(data, Stream):
        return True
    found = data if isinstance(data, Mapping) else _in_order(data, ("x",))
    value = found.get("x")
    return is_on_disk(value) and on_disk(value).nbytes > WHOLE


def check_width(name: str, given: int | None, least: int = 1) -> None:
    """Raise ValueError unless a width of a recipe is a whole number, or None: the one of the data."""
    if given is not None:
        require_whole(name, given, least)


def checked_shape(features: int | Sequence[int]) -> tuple[int, ...]:
    """The shape of a row from a number of columns or a shape; raises ValueError for anything else.

    Example:
        >>> checked_shape(3), checked_shape([1, 28, 28])
        ((3,), (1, 28, 28))
    """
    given: Any = features  # whatever was passed
    if not isinstance(given, numbers.Integral | Sequence | torch.Size) or isinstance(given, str):
        raise ValueError(f"features: expected a number of columns or the shape of a row, got {given!r}")
    shape = (given,) if isinstance(given, numbers.Integral) else tuple(given)
    if not shape:
        raise ValueError("features: expected a number of columns or the shape of a row, got an empty shape")
    for size in shape:
        require_whole("features", size)
    return tuple(map(int, shape))


def row_shape(data: Any, program: str) -> tuple[int, ...]:
    """The shape of a row of the entry x.

    Raises:
        ValueError: if x is a vector: a column, or one row? Recipes that read vectors say so themselves.

    Example:
        >>> row_shape({"x": torch.zeros(10, 1, 8, 8)}, "vae")
        (1, 8, 8)
    """
    (x,) = entries(data, program, "x", few=True)
    assert x is not None  # the first entry
    if x.dim() < 2:
        raise ValueError(
            f"data: {program} takes rows x columns, got shape {tuple(x.shape)}; "
            "one column is x[:, None], one row x[None]"
        )
    if len(x) == 1 and x.dim() > 2:
        raise ValueError(
            f"data: {program} takes its rows along the first dimension, and got one, of shape {tuple(x.shape[1:])}; "
            "if these are rows x columns, pass them without the dimension before"
        )
    return tuple(x.shape[1:])


def row_width(given: int | None, data: Any, program: str) -> int:
    """How many numbers a row holds: ``given``, which the recipe then checks, or what the data say.

    Example:
        >>> row_width(None, torch.zeros(10, 3), "ppca"), row_width(4, torch.zeros(10, 3), "ppca")
        (3, 4)
    """
    return prod(row_shape(data, program)) if given is None else int(given)


def _in_order(data: Any, names: Sequence[str]) -> dict[str, Any]:
    """A tuple fills the names in order; of a labelled dataset's columns only labels do so."""
    if isinstance(data, Columns):
        return {name: value for i, (name, value) in enumerate(zip(names, data, strict=False)) if not i or name == "y"}
    return dict(zip(names, data, strict=False)) if isinstance(data, tuple) else {names[0]: data}


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


def _numbers(value: Any, name: str, hint: str, program: str, few: bool) -> Tensor:
    array = as_array(value.value if isinstance(value, Constant) else value, name)
    if isinstance(array, RowsOnDisk):
        check_extent(name, array)
        part = few and array.nbytes > WHOLE
        array = array.probe(LOOK) if part else array.whole(f"{program}, for the constants that it computes,")
    check_extent(name, array)
    precision = torch.get_default_dtype()
    if not array.is_floating_point() or largest(array) <= torch.finfo(precision).max ** 0.5:
        return array
    check_finite(name, array, array.dtype, hint)
    _check_square(name, array, precision)
    return array


def _check_square(name: str, array: Tensor, precision: torch.dtype) -> None:
    """Variances are what recipes read first: an infinite one would come out as an error of some distribution."""
    most = torch.finfo(precision).max ** 0.5
    if largest(array) > most:
        first = tuple(int(i) for i in (array.abs() > most).nonzero()[0])
        raise ValueError(
            f"data {name!r}: {float(array[first]):g} at index {first} is so large that its square is infinite in "
            f"{precision}; rescale the data"
        )


def active_steps(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Which time steps of each sequence hold data: sequences x time, true or false.

    Example:
        >>> active_steps(torch.zeros(2, 3), torch.tensor([1, 3]))
        tensor([[ True, False, False],
                [ True,  True,  True]])
    """
    steps = torch.arange(x.shape[1], device=x.device)
    if lengths is None:
        return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    return steps < lengths.to(x.device).unsqueeze(-1)
