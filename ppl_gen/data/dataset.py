"""Checked rows, handed out whole or in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl_gen.data.arrays import equal, shared
from ppl_gen.data.calls import ByStep, Constant
from ppl_gen.data.on_disk import WHOLE, BadRowsError, RowsOnDisk, is_on_disk, on_disk
from ppl_gen.data.rows import Rows
from ppl_gen.runtime.ranks import Share

__all__ = ["FEW", "LARGE", "Batch", "Dataset"]

FEW = 256  # rows of large data that a look at a program takes
LARGE = 1_000_000  # elements: beyond this a dry run looks at a slice, and posterior draws are not made for every row


@dataclass(frozen=True)
class Batch:
    """Arguments of one call of model and guide, the number of rows they hold and of all rows.

    ``model(*batch.args, **batch.kwargs)`` runs a program on it; ``index`` says which rows they are, None: all of them.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: int | None
    total: int | None
    index: Tensor | None = None
    order: tuple[str, ...] = ()  # of the arguments that a tuple of data filled
    share: Share | None = None  # of a batch that several processes have parted among them: which rows are here

    @property
    def rescale(self) -> float:
        """N / B, the factor of the sites inside the data plate."""
        return 1.0 if self.rows is None or self.total is None else self.total / self.rows


@dataclass(frozen=True)
class Dataset:
    """Checked data: entries that share their rows, constants, and how they are passed to the model."""

    entries: Mapping[str, Any]
    constants: Mapping[str, Any] = field(default_factory=dict)
    positional: tuple[str, ...] = ()
    order: tuple[str, ...] = ()
    rows: int | None = None
    device: torch.device | None = None
    dtype: torch.dtype | None = None
    on_batch: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    original: Any = None
    left_out: tuple[str, ...] = ()  # entries that neither model nor recipe reads
    read: frozenset[str] = frozenset()  # what the recipe read
    taken: Mapping[str, str] = field(default_factory=dict)  # constants that nobody marked as such, and their types
    data_dim: int = 0  # of the entries as the user holds them: here rows always come first
    missing: Mapping[str, str] = field(
        default_factory=dict
    )  # entries with NaN that nothing may read, what to say if so
    domains: Callable[[Dataset, Batch], str] | None = None  # what to say of rows that were not looked at when it began

    def batch(self, index: Tensor | None = None, total: int | None = None, step: int | None = None) -> Batch:
        """The rows of ``index`` (all of them when None) as a call of the model, at a ``step`` of training if given."""
        values = {name: self._rows(value, index) for name, value in self.entries.items()}
        if self.on_batch is not None:
            values = self.on_batch(values)
        values = {name: self._placed(self._as_given(name, value)) for name, value in values.items()}
        rows = self.rows if index is None else len(index)
        held = {n: value.at(step) if isinstance(value, ByStep) else value for n, value in self.constants.items()}
        constants = {name: self._placed(value) for name, value in held.items()}
        kwargs = {**values, **constants}
        args = tuple(kwargs.pop(name) for name in self.positional)
        return Batch(args, kwargs, rows, self.rows if total is None else total, index, self.order)

    def _rows(self, value: Any, index: Tensor | None) -> Any:
        if isinstance(value, RowsOnDisk):
            return value.whole("a call of the model on all of the data") if index is None else value.take(index)
        if index is None:
            return value
        if isinstance(value, np.ndarray):
            return shared(value[index.numpy()])
        return value.index_select(0, index.to(value.device))  # half the time of value[index]

    def dim(self, name: str) -> int:
        """The dimension of an entry's rows in a call of the model: its first unless the program says otherwise."""
        return min(self.data_dim, self.entries[name].ndim - 1)

    def _as_given(self, name: str, value: Any) -> Any:
        dim = self.dim(name) if name in self.entries else 0
        if not dim or isinstance(value, RowsOnDisk):
            return value
        return value.movedim(0, dim) if isinstance(value, Tensor) else np.moveaxis(value, 0, dim)

    @property
    def given(self) -> dict[str, Any]:
        """The entries as the user passed them."""
        return {name: self._as_given(name, value) for name, value in self.entries.items()}

    def _placed(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            value = shared(value)
        if not isinstance(value, Tensor):
            return value
        return value.to(device=self.device, dtype=self.dtype if value.is_floating_point() else None)

    @property
    def elements(self) -> int:
        """Numbers of data in a call of the model, those in constants included."""
        return sum(map(_elements, (*self.entries.values(), *self.constants.values())))

    def head(self, rows: int) -> Batch:
        """The first rows as if they were all: what a dry run looks at."""
        if self.rows is None or rows >= self.rows:
            return self.batch()
        return self.batch(torch.arange(rows, device="cpu"), total=rows)

    def glimpse(self) -> Batch:
        """What a look at a program runs it on: all rows, or the first few of large data."""
        return self.head(FEW) if self.elements > LARGE or self.beyond_memory else self.batch()

    @property
    def unseen(self) -> bool:
        """Whether rows come that were not all looked at when the fit began: out of files, or made anew by a hook."""
        return self.on_batch is not None or any(isinstance(value, RowsOnDisk) for value in self.entries.values())

    def looked_at(self, batch: Batch, step: int) -> Batch:
        """The batch, if its values are inside of the supports of the sites that observe them.

        Raises:
            BadRowsError: naming row, site and value.
        """
        if self.domains is not None and (said := self.domains(self, batch)):
            raise BadRowsError(f"at step {step + 1}: {said}. Mend the value, or drop the row")
        return batch

    @property
    def streamed(self) -> int | None:
        """Rows of the first batch of a stream; None of data that are at hand."""
        return None

    def excerpt(self) -> Dataset:
        """The first rows as a data set of their own."""
        assert self.rows is not None
        return self.subset(torch.arange(min(FEW, self.rows), device="cpu"))

    def most(self) -> Batch:
        """All rows; of a file that is too large for that, the first few."""
        return self.head(FEW) if self.beyond_memory else self.batch()

    @property
    def beyond_memory(self) -> str:
        """Why there can be no call of the model on all rows: how large their files are, say; empty where there can."""
        size = sum(value.nbytes for value in self.entries.values() if isinstance(value, RowsOnDisk))
        return f"{size / 2**30:.1f} GiB in a file" if size > WHOLE else ""

    def template(self, rows: int) -> Batch:
        """``rows`` rows, the data's own repeated as often as needed: the shape on which new rows are drawn."""
        if self.rows is None:
            return self.batch()
        return self.batch(torch.arange(rows, device="cpu") % self.rows, total=rows)

    def same_rows(self, other: Dataset) -> bool:
        """Whether ``other`` holds the same entries, number for number."""
        if self is other:
            return True
        mine, theirs = ({**data.entries, **data.constants} for data in (self, other))
        if self.rows != other.rows or mine.keys() != theirs.keys() or self.on_batch is not other.on_batch:
            return False
        return all(equal(self._compared(value), other._compared(theirs[name])) for name, value in mine.items())

    def _compared(self, value: Any) -> Any:
        return value if isinstance(value, RowsOnDisk) else self._placed(value)

    def chunks(self, size: int) -> Iterator[Batch]:
        """All rows in order, at most ``size`` at a time; each chunk counts as the whole (no rescaling)."""
        if self.rows is None or self.rows <= size:
            yield self.batch()
            return
        for index in torch.arange(self.rows, device="cpu").split(size):
            yield self.batch(index, total=len(index))

    def subset(self, index: Tensor) -> Dataset:
        """A dataset of the rows of ``index`` only."""
        entries = {
            name: value.chosen(index) if isinstance(value, RowsOnDisk) else self._rows(value, index)
            for name, value in self.entries.items()
        }
        return replace(self, entries=entries, rows=len(index), original=self._chosen(entries, index))

    def _chosen(self, entries: dict[str, Any], index: Tensor) -> Any:
        """What the user would have passed for these rows: labels that only a recipe reads, and `Rows`, are kept."""
        entries = {name: self._as_given(name, value) for name, value in entries.items()}
        if self.order:
            values = [entries[n] if n in entries else Constant(self.constants[n]) for n in self.order]
            return values[0] if len(values) == 1 and entries else tuple(values)
        rest = {} if not isinstance(self.original, Mapping) else dict(self.original)
        for name, value in rest.items():
            if isinstance(value, Tensor | np.ndarray) and value.ndim and len(value) == self.rows:
                rest[name] = entries[name] if name in entries else _rest(value, index)
        if self.on_batch is not None:
            return Rows({**rest, **entries}, self.on_batch)
        return {**{name: Constant(value) for name, value in self.constants.items()}, **rest, **entries}


def _rest(value: Any, index: Tensor) -> Any:
    """Rows of what only a recipe reads."""
    if is_on_disk(value):
        return on_disk(value).chosen(index)
    return shared(value[index.numpy()]) if isinstance(value, np.ndarray) else value[index.to(value.device)]


def _elements(value: Any) -> int:
    if isinstance(value, Tensor | np.ndarray | RowsOnDisk):
        return int(np.prod(value.shape))
    if isinstance(value, Mapping):
        return sum(map(_elements, value.values()))
    return sum(map(_elements, value)) if isinstance(value, list | tuple) else 0
