"""Entries of the data that nothing reads: which they are, and whether one is a misspelt argument."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator
from typing import Any

__all__ = ["Read", "refuse_misspelt"]

_ALIKE = 0.8  # of difflib's ratio: one letter of five or more, two exchanged of six; x1 and x2 are two names


class Read(dict[str, Any]):
    """A dictionary that remembers which of its entries were asked for; one that is walked through is read whole.

    >>> data = Read({"x": 1, "y": 2})
    >>> data["x"], sorted(data.names)
    (1, ['x'])
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)

    def __contains__(self, name: object) -> bool:
        self.names.add(str(name))
        return super().__contains__(name)

    def __iter__(self) -> Iterator[str]:
        self.names.update(super().keys())
        return super().__iter__()

    def keys(self) -> Any:
        self.names.update(super().keys())
        return super().keys()

    def values(self) -> Any:
        self.names.update(super().keys())
        return super().values()

    def items(self) -> Any:
        self.names.update(super().keys())
        return super().items()


def refuse_misspelt(left_out: Collection[str], arguments: Collection[str], given: Collection[str]) -> None:
    """Raise ValueError for an entry that nothing reads and that looks like an argument which has none.

    >>> refuse_misspelt(["label"], ["x"], ["x"])
    >>> refuse_misspelt(["sigm"], ["x", "sigma"], ["x"])
    Traceback (most recent call last):
    ...
    ValueError: data 'sigm': neither model nor recipe reads it; did you mean the argument 'sigma', which has no entry?
    """
    free = [name for name in arguments if name not in given]
    for entry in left_out:
        meant = next((name for name in free if _alike(entry, name)), None)
        if meant is not None:
            raise ValueError(
                f"data {entry!r}: neither model nor recipe reads it; did you mean the argument {meant!r}, which has no "
                "entry?"
            )


def _alike(one: str, other: str) -> bool:
    one, other = (name.lower().replace("_", "").replace("-", "").replace(" ", "") for name in (one, other))
    if one == other or one.removesuffix("s") == other.removesuffix("s"):
        return True
    return min(len(one), len(other)) >= 3 and difflib.SequenceMatcher(None, one, other).ratio() >= _ALIKE
