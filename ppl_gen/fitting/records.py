"""What the steps of a run recorded, one value per step and name; read from the device when it is asked for."""

from __future__ import annotations

from array import array
from bisect import bisect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from ppl_gen.fitting.run import Info

__all__ = ["RECENT", "Column", "Records"]

RECENT = 50  # steps whose tensors are kept at least


class Column(Sequence[Any]):
    """The values of one name in the order of the steps: numbers of Python, and tensors as they were given.

    A scalar that outlives its step takes a few bytes of a piece of memory that the next step wants for a large tensor,
    so that a long run grows by such a piece with every step. Therefore only the last ones are kept as tensors; earlier
    ones are read from the device, many at once, and made anew, with the same numbers, where they are asked for.

    >>> column = Column()
    >>> for step in range(1000):
    ...     column.append(torch.tensor(0.5 * step))
    >>> len(column), column[3], column[-1], column[-2:], len(column.recent) <= 2 * RECENT
    (1000, tensor(1.5000), tensor(499.5000), [tensor(499.), tensor(499.5000)], True)
    """

    def __init__(self) -> None:
        self.recent: list[Any] = []
        self._read = array("d")
        self._kinds: list[tuple[int, str | None, torch.device | None]] = []  # up to where, of which dtype, where

    def append(self, value: Any) -> None:
        self.recent.append(value)
        if len(self.recent) >= 2 * RECENT:
            self._pack(RECENT)

    def _pack(self, count: int) -> None:
        part = self.recent[:count]
        self._read.extend(_as_float64(part).tolist())
        end = len(self._read) - len(part)
        for value in part:
            end += 1
            word = _word(value)
            kind = (word, None if word is None else value.device)
            if self._kinds and self._kinds[-1][1:] == kind:
                self._kinds.pop()
            self._kinds.append((end, *kind))
        del self.recent[:count]

    def __len__(self) -> int:
        return len(self._read) + len(self.recent)

    @overload
    def __getitem__(self, place: int) -> Any: ...
    @overload
    def __getitem__(self, place: slice) -> list[Any]: ...
    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            return [self[k] for k in range(*place.indices(len(self)))]
        k = range(len(self))[place]
        if k >= len(self._read):
            return self.recent[k - len(self._read)]
        _, word, device = self._kinds[bisect(self._kinds, k, key=lambda kind: kind[0])]
        value = self._read[k]
        return value if word is None else torch.tensor(value, dtype=getattr(torch, word), device=device)

    def cut(self, length: int) -> None:
        """Keep the first so many."""
        del self.recent[max(0, length - len(self._read)) :]
        if length < len(self._read):
            del self._read[length:]
            self._kinds = [kind for kind in self._kinds if kind[0] < length] + [
                (length, *kind[1:]) for kind in self._kinds if kind[0] >= length
            ][:1]

    def numbers(self) -> Tensor:
        """All of them in float64; what is recent is read now."""
        read = torch.tensor(self._read, dtype=torch.float64, device="cpu")
        return torch.cat([read, _as_float64(self.recent)])

    def kinds(self) -> list[list[Any]]:
        """Counts of neighbours of the same dtype (None: a number of Python)."""
        words = [(end - start, word) for start, (end, word, _) in zip([0, *self._ends()], self._kinds, strict=False)]
        found: list[list[Any]] = []
        for count, word in [*words, *((1, _word(value)) for value in self.recent)]:
            if found and found[-1][1] == word:
                found[-1][0] += count
            else:
                found.append([count, word])
        return found

    def _ends(self) -> list[int]:
        return [kind[0] for kind in self._kinds]


class Records:
    """The history of a run that grows step by step; ``values`` holds what the steps gave, tensors as tensors.

    >>> records = Records()
    >>> records.append({"loss": torch.tensor(2.0)})
    >>> records.append({"loss": torch.tensor(1.0), "norm": 0.5})
    >>> other = Records()
    >>> other.load_state_dict(records.state_dict())
    >>> other.floats(), other.values["loss"][0]
    ({'loss': [2.0, 1.0], 'norm': [nan, 0.5]}, tensor(2.))
    """

    def __init__(self) -> None:
        self.values: dict[str, Column] = {}
        self.steps = 0

    def append(self, info: Info) -> None:
        """One row; what this step did not record is missing (NaN)."""
        for name in info:
            if name not in self.values:
                self.values[name] = _column([float("nan")] * self.steps)
        for name, values in self.values.items():
            values.append(info.get(name, float("nan")))
        self.steps += 1

    def cut(self, steps: int) -> None:
        """Keep the first so many rows."""
        self.steps = min(self.steps, steps)
        for values in self.values.values():
            values.cut(self.steps)

    def floats(self) -> dict[str, list[float]]:
        """All values as numbers of Python."""
        return {name: values.numbers().tolist() for name, values in self.values.items()}

    def state_dict(self) -> dict[str, Any]:
        """All values, and of which dtype each was (None: a number of Python), as counts of neighbours."""
        return {
            "steps": self.steps,
            "values": {name: values.numbers() for name, values in self.values.items()},
            "kinds": {name: values.kinds() for name, values in self.values.items()},
        }

    def load_state_dict(self, saved: Mapping[str, Any], device: torch.device | None = None) -> None:
        """The values as they were: rules that look at them compute the same of them, to the last bit."""
        self.steps, self.values = int(saved["steps"]), {}
        for name, numbers in saved["values"].items():
            values: list[Any] = []
            for count, word in saved["kinds"][name]:
                part = numbers[len(values) : len(values) + count]
                values += part.tolist() if word is None else part.to(device, getattr(torch, word)).unbind()
            self.values[name] = _column(values)


def _column(values: Iterable[Any]) -> Column:
    column = Column()
    for value in values:
        column.append(value)
    return column


def _as_float64(values: Sequence[Any]) -> Tensor:
    """One synchronisation where all are tensors."""
    if values and all(isinstance(value, Tensor) for value in values):
        return torch.stack([value.detach().double().reshape(()) for value in values]).cpu()
    return torch.tensor([float(value) for value in values], dtype=torch.float64, device="cpu")


def _word(value: Any) -> str | None:
    return str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else None
