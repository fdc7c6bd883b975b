"""Rows that stay in a file: memory maps, h5py data sets, torch tensors that were made from a file.

Rows are read from the file as they are asked for, into memory of their own. Going through a memory map would instead
fill the process with pages of the file: they count as resident, and each costs a fault.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl_gen.errors import IncompatibleError

__all__ = [
    "WHOLE",
    "BadRowsError",
    "RowsOnDisk",
    "as_received",
    "for_sending",
    "is_on_disk",
    "nan_read",
    "on_disk",
]

WHOLE = 2**30  # bytes of one entry that are brought into memory at once without a word
_BLOCK = 16 * 2**20  # bytes that are read at a time
_PROBED = 64  # rows by which two files are told apart


class BadRowsError(FloatingPointError, ValueError):
    """Rows that come late, out of a file or a stream, and hold what none may: what was learned before them is kept."""


def is_on_disk(value: Any) -> bool:
    """Whether ``value`` holds its numbers in a file.

    >>> is_on_disk(np.zeros(3)), is_on_disk(torch.zeros(3))
    (False, False)
    """
    if isinstance(value, RowsOnDisk | np.memmap):
        return True
    if isinstance(value, Tensor):
        return value.device.type == "cpu" and _file_of(value) is not None
    return type(value).__module__.split(".")[0] == "h5py" and hasattr(value, "shape") and hasattr(value, "dtype")


def on_disk(value: Any) -> RowsOnDisk:
    """``value``, of which `is_on_disk` is true, as rows in a file."""
    return (
        value if isinstance(value, RowsOnDisk) else RowsOnDisk(_mapped(value) if isinstance(value, Tensor) else value)
    )


def for_sending(data: Any) -> Any:
    """``data`` with rows in files for memory maps and the like, which would be sent as all of their numbers."""
    return _changed(data, lambda value: on_disk(value) if is_on_disk(value) else value)


def as_received(data: Any) -> Any:
    """What `for_sending` was given: the arrays themselves, which recipes may compute with."""
    return _changed(data, lambda v: v.source if isinstance(v, RowsOnDisk) and v.index is None else v)


def _changed(data: Any, change: Callable[[Any], Any]) -> Any:
    if type(data) is dict:
        return {name: change(value) for name, value in data.items()}
    return tuple(map(change, data)) if type(data) is tuple else change(data)


def nan_read(data: Any) -> str:
    """Which entries of a `Dataset` lie in files in which NaN was read, and where first; empty where none was."""
    found = {name: value.nan for name, value in data.entries.items() if isinstance(value, RowsOnDisk)}
    return "; ".join(f"row {row} of data {name!r} on disk holds NaN" for name, row in found.items() if row is not None)


class RowsOnDisk:
    """The rows of an array in a file, or some of them (``index``), in their order; read when they are asked for.

    It has the ``shape``, ``dtype`` and length of an array. ``value[:10]`` reads rows, as does `take`; `chosen` reads
    none. Where somebody wants all of them at once and they are more than `WHOLE` bytes, that is refused.

    >>> import tempfile, os
    >>> path = os.path.join(tempfile.mkdtemp(), "x.npy")
    >>> np.save(path, np.arange(10.0).reshape(5, 2))
    >>> rows = RowsOnDisk(np.load(path, mmap_mode="r"))
    >>> rows.take(torch.tensor([3, 0])).tolist(), rows.chosen(torch.tensor([4, 2]))[:1].tolist(), len(rows)
    ([[6.0, 7.0], [0.0, 1.0]], [[8.0, 9.0]], 5)
    """

    def __init__(self, source: Any, index: np.ndarray | None = None) -> None:
        self.source, self.index = source, index
        self.dtype = np.dtype(source.dtype)
        self.nan: int | None = None  # the first row with NaN that was read
        self._file: _File | None = None
        self._looked = False

    @property
    def shape(self) -> tuple[int, ...]:
        rows = self.source.shape[:1] if self.index is None else (len(self.index),)
        return (*rows, *self.source.shape[1:])

    @property
    def ndim(self) -> int:
        return len(self.source.shape)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"RowsOnDisk({self.shape} {self.dtype})"

    def __getitem__(self, key: Any) -> Tensor:
        if isinstance(key, slice):
            return self.take(torch.arange(*key.indices(len(self)), device="cpu"))
        if isinstance(key, int | np.integer):
            return self.take(torch.tensor([int(key) % len(self)], device="cpu"))[0]
        return self.take(torch.as_tensor(key).cpu())

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        array = self.whole("this").numpy()
        return array if dtype is None else array.astype(dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        kept = _reference(self.source)
        if kept is not None:
            return _again, (*kept, self.index)
        if self.nbytes > WHOLE:
            raise TypeError(f"data on disk: {self.nbytes / 2**30:.1f} GiB of a view that does not lie in one piece")
        return RowsOnDisk, (np.array(self.whole("another process").numpy()),)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return max(1, self.nbytes // max(1, len(self)))

    def chosen(self, index: Tensor) -> RowsOnDisk:
        """The rows of ``index`` only, still in the file."""
        which = index.cpu().numpy()
        return RowsOnDisk(self.source, which if self.index is None else self.index[which])

    def take(self, index: Tensor) -> Tensor:
        """The rows of ``index``, in memory.

        Raises:
            BadRowsError: for an infinite number; the row is named. NaN may stand for what is missing.
            IncompatibleError: for more than `WHOLE` bytes of them.
        """
        self._check_size(len(index) * self.row_bytes, f"{len(index)} rows at once")
        which = index.cpu().numpy()
        return self._checked(_tensor(self._read(which if self.index is None else self.index[which])), which)

    def whole(self, what: str) -> Tensor:
        """All rows, in memory, for ``what``: refused in words where they are more than `WHOLE` bytes."""
        self._check_size(self.nbytes, f"all {len(self)} rows at once, which {what} needs")
        return self.take(torch.arange(len(self), device="cpu"))

    def pieces(self) -> Iterator[Tensor]:
        """All rows in order, some megabytes at a time."""
        for index in torch.arange(len(self), device="cpu").split(max(1, _BLOCK // self.row_bytes)):
            yield self.take(index)

    def probe(self, count: int = _PROBED) -> Tensor:
        """``count`` rows spread over all of them, fewer of long ones."""
        count = max(1, min(count, len(self), 4 * _BLOCK // self.row_bytes))
        return self.take(torch.from_numpy(np.unique(np.linspace(0, len(self) - 1, count).astype(np.int64))))

    def same_as(self, other: Any) -> bool:
        """Whether these are the same rows: of the same place in one file, or number for number."""
        if isinstance(other, RowsOnDisk):
            mine, theirs = _reference(self.source), _reference(other.source)
            if mine is not None and mine == theirs and np.array_equal(self._rows(), other._rows()):
                return True
        if self.shape != tuple(other.shape):
            return False
        begin = 0
        for piece in self.pieces():
            rest = other[begin : begin + len(piece)]
            rest = (rest if isinstance(rest, Tensor) else torch.as_tensor(np.asarray(rest))).to(piece)
            if not bool(((piece == rest) | ((piece != piece) & (rest != rest))).all()):
                return False
            begin += len(piece)
        return True

    def _rows(self) -> np.ndarray:
        return np.arange(len(self)) if self.index is None else self.index

    def _check_size(self, size: int, what: str) -> None:
        if size > WHOLE:
            raise IncompatibleError(
                f"data on disk: {what}, are {size / 2**30:.1f} GiB, more than the {WHOLE / 2**30:g} GiB that are "
                "brought into memory unasked. Learn from minibatches (SVI(batch_size=...)) and ask about fewer rows; "
                "or, where memory allows it, pass an array in memory: np.array(x)"
            )

    def _checked(self, values: Tensor, which: np.ndarray) -> Tensor:
        if values.is_floating_point() and not bool(torch.isfinite(values).all()):
            per_row = values.reshape(len(values), -1)
            infinite, nan = per_row.isinf().any(1), per_row.isnan().any(1)
            if bool(infinite.any()):
                row = int(which[int(infinite.nonzero()[0])])
                raise BadRowsError(
                    f"row {row} of the data on disk holds an infinite number (files are looked at as they are read); "
                    "mend it or drop the row"
                )
            if self.nan is None:
                self.nan = int(which[int(nan.nonzero()[0])])
        return values

    def _read(self, which: np.ndarray) -> np.ndarray:
        if not self._looked:
            self._file, self._looked = _File.of(self.source), True
        if self._file is not None:
            return self._file.read(which)
        if isinstance(self.source, np.ndarray):
            return np.array(self.source[which])
        unique, places = np.unique(which, return_inverse=True)  # h5py wants increasing numbers
        if len(unique) and unique[-1] - unique[0] == len(unique) - 1:
            return np.asarray(self.source[int(unique[0]) : int(unique[-1]) + 1])[places]
        return np.asarray(self.source[unique])[places]


class _File:
    """Where the rows of a memory map lie in its file."""

    def __init__(self, path: str, start: int, step: int, row: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.start, self.step, self.row, self.dtype = start, step, row, dtype
        self.size = int(np.prod(row, dtype=np.int64)) * dtype.itemsize
        self.handle = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.handle, 0, 0, os.POSIX_FADV_RANDOM)  # rows come in any order: nothing is read ahead

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            os.close(self.handle)

    @classmethod
    def of(cls, value: Any) -> _File | None:
        """None where rows do not lie in the file as they are: changed in memory only, strided, or the file is gone."""
        placed = _place(value) if isinstance(value, np.memmap) and hasattr(os, "preadv") else None
        if placed is None or not len(value) or value.mode == "c" or not value[:1].flags.c_contiguous:
            return None
        try:
            file = cls(placed[0], placed[1], value.strides[0], value.shape[1:], value.dtype)
            ends = np.array([0, len(value) - 1])
            same = np.array_equal(file.read(ends).view(np.uint8), np.array(value[ends]).view(np.uint8))
        except (OSError, ValueError, TypeError):
            return None
        return file if same else None  # another file has taken its name

    def read(self, which: np.ndarray) -> np.ndarray:
        """The rows, in the order asked for; neighbours in one go, and in the order of the file."""
        rows = np.empty((len(which), *self.row), self.dtype)
        flat = rows.reshape(len(which), -1).view(np.uint8) if self.size else rows
        order = np.argsort(which, kind="stable")
        ascending = which[order]
        joined = self.step == self.size and bool((order == np.arange(len(which))).all())
        first = 0
        while first < len(which):
            last = first + 1
            if joined:
                while last < len(which) and ascending[last] == ascending[last - 1] + 1:
                    last += 1
            target = memoryview(flat[first:last].reshape(-1) if joined else flat[order[first]])  # type: ignore[arg-type]
            self._fill(target, self.start + int(ascending[first]) * self.step)
            first = last
        return rows

    def _fill(self, target: memoryview, place: int) -> None:
        done = 0
        while done < len(target):
            got = os.preadv(self.handle, [target[done:]], place + done)
            if got <= 0:
                raise OSError("data on disk: the file is shorter than it was when it was mapped")
            done += got


def _place(value: np.memmap[Any, Any]) -> tuple[str, int] | None:
    """The file of a memory map, and where in it the first of its numbers stands."""
    root: Any = value
    while isinstance(root.base, np.memmap):
        root = root.base
    if root.filename is None:
        return None
    inside = value.__array_interface__["data"][0] - root.__array_interface__["data"][0]
    return str(root.filename), int(root.offset) + inside


def _file_of(value: Tensor) -> str | None:
    """The file that a tensor was made from (`torch.from_file(..., shared=True)`)."""
    if value.layout is not torch.strided or value.dtype is torch.bfloat16 or not value.is_contiguous():
        return None
    try:
        name = value.untyped_storage().filename
    except (RuntimeError, NotImplementedError):
        return None
    return str(name) if name is not None and os.path.isfile(name) else None  # what processes share has a name, too


def _mapped(value: Tensor) -> np.ndarray:
    """A tensor made from a file, as a memory map."""
    name, dtype = _file_of(value), value.detach().numpy().dtype
    offset = value.storage_offset() * dtype.itemsize
    return np.memmap(str(name), dtype=dtype, mode="r", offset=int(offset), shape=tuple(value.shape))


def _reference(source: Any) -> tuple[Any, ...] | None:
    """What another process of this machine finds the same rows by; None where the numbers have to travel."""
    if isinstance(source, np.memmap) and source.mode != "c" and source.flags.c_contiguous:
        placed = _place(source)
        if placed is not None:
            return "map", os.path.abspath(placed[0]), placed[1], source.dtype.str, source.shape
    if hasattr(source, "file") and hasattr(source, "name") and type(source).__module__.startswith("h5py"):
        return "h5", os.path.abspath(source.file.filename), source.name, None, None
    return None


def _again(kind: str, path: str, place: Any, dtype: Any, shape: Any, index: Any) -> RowsOnDisk:
    if not os.path.exists(path):
        raise FileNotFoundError(f"data on disk: {path} is not there; every machine of a comparison has to see it")
    if kind == "h5":
        import h5py

        return RowsOnDisk(h5py.File(path, "r")[place], index)
    return RowsOnDisk(np.memmap(path, dtype, "r", place, shape), index)


def _tensor(values: np.ndarray) -> Tensor:
    return torch.as_tensor(np.require(values, values.dtype.newbyteorder("="), ["C", "W"]), device="cpu")
