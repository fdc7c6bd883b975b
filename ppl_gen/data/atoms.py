"""Atoms: a value that many rows share exactly, in a column of numbers that otherwise hardly repeat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["MUCH", "Atom", "atoms", "spoken"]

MUCH = 0.05  # of the rows: an atom that no density can pass over
_WHATEVER = 0.3  # of the rows: no rounding of real numbers puts so many into one value
_TIMES, _LEAST = 10, 10  # as often as almost all other values; so many rows at least
_ROWS = 2000  # that are looked at


@dataclass(frozen=True)
class Atom:
    """``share`` of the rows hold exactly ``value`` in column number ``column`` (of an image, laid out flat)."""

    column: int
    value: float
    share: float


def atoms(rows: Tensor) -> list[Atom]:
    """The atoms of the columns of rows (N or N x anything), at most one of a column: its most frequent value.

    Rounded numbers repeat too, each of them: an atom is there ten times as often as nineteen in twenty of the others,
    or in three rows of ten.

    >>> numbers = torch.linspace(0.1, 3.0, 100).sqrt()
    >>> atoms(numbers), atoms(numbers.clamp(min=0.75))
    ([], [Atom(column=0, value=0.75, share=0.16)])
    >>> atoms((10 * numbers).round())
    []
    """
    columns = rows.detach().reshape(len(rows), -1)[:: -(-len(rows) // _ROWS)].cpu()
    if len(columns) < _LEAST or not columns.numel():
        return []
    ordered = columns.sort(0).values
    place = torch.arange(1, len(ordered)).unsqueeze(1).expand(-1, ordered.shape[1])
    begun = torch.where(ordered[1:] != ordered[:-1], place, 0).cummax(0).values
    most, where = (place - begun + 1).max(0)
    found = []
    for column in (most >= _LEAST).nonzero().squeeze(-1).tolist():
        values, counts = ordered[:, column].unique_consecutive(return_counts=True)
        count = int(most[column])
        others = counts[values != ordered[where[column] + 1, column]].double()
        usual = float(others.quantile(0.95)) if len(others) else 0.0
        share = count / len(ordered)
        if len(values) > 1 and (share >= _WHATEVER or count >= _TIMES * usual):
            found.append(Atom(column, float(ordered[where[column] + 1, column]), share))
    return found


def spoken(found: Sequence[Atom], shape: Sequence[int] = ()) -> str:
    """In words: the largest atom, and how many more columns have one; of images ``shape`` tells where it is."""
    worst = max(found, key=lambda atom: atom.share)
    more = f", and {len(found) - 1} more have such a value" if len(found) > 1 else ""
    if len(shape) == 3:
        _, height, width = shape
        at = (worst.column // (height * width), worst.column // width % height, worst.column % width)
        return (
            f"the pixel at channel, line and column {at} is exactly {worst.value:g} in {worst.share:.0%} of rows{more}"
        )
    return f"column {worst.column} is exactly {worst.value:g} in {worst.share:.0%} of the rows{more}"
