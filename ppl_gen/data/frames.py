"""Names that pandas objects bring along: rows and columns in another order than those beside them, or fitted to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["check_column_names", "check_indices", "frames"]

_SHOWN = 5


def frames(given: Any, order: Sequence[str], alone: str) -> dict[str, Any]:
    """The pandas objects among what was given as data, by the entry that they became; ``alone`` of one by itself."""
    if _is_pandas(given):
        return {alone: given}
    if isinstance(given, tuple) and len(given) == len(order):
        given = dict(zip(order, given, strict=True))
    parts = given.items() if isinstance(given, Mapping) else ()
    return {str(name): value for name, value in parts if _is_pandas(value)}


def check_indices(parts: Mapping[str, Any]) -> None:
    """Raise ValueError where two of them have the same index in another order: rows are taken as they come.

    >>> import pandas
    >>> check_indices({"x": pandas.Series([1, 2], index=["a", "b"]), "y": pandas.Series([4, 3], index=["b", "a"])})
    Traceback (most recent call last):
    ...
    ValueError: data: x and y have the same index in another order, and rows are taken as they come; pass
    y.loc[x.index], or .to_numpy() of both where their order is right
    """
    named = list(parts.items())
    for (one, first), (other, second) in zip(named, named[1:], strict=False):
        a, b = first.index, second.index
        if len(a) == len(b) and not a.equals(b) and a.is_unique and len(a.difference(b, sort=False)) == 0:
            raise ValueError(
                f"data: {one} and {other} have the same index in another order, and rows are taken as they come; pass\n"
                f"{other}.loc[{one}.index], or .to_numpy() of both where their order is right"
            )


def check_column_names(argument: str, parts: Mapping[str, Any], fitted: Mapping[str, Any]) -> None:
    """Raise ValueError where an entry has as many columns as the one that was fitted to, and other ones, or moved."""
    for name in parts.keys() & fitted.keys():
        now, before = (list(getattr(frame, "columns", ())) for frame in (parts[name], fitted[name]))
        words = all(isinstance(column, str) for column in [*now, *before])
        if now != before and len(now) == len(before) and (words or set(now) == set(before)):
            raise ValueError(
                f"{argument}: {name!r} has the columns {_listed(now)}, and was fitted to {_listed(before)}, in this "
                "order; columns are taken as they come: select them by name, or pass .to_numpy() if they are the same"
            )


def _listed(columns: Sequence[Any]) -> str:
    return ", ".join(map(str, columns[:_SHOWN])) + (", ..." if len(columns) > _SHOWN else "")


def _is_pandas(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "pandas" and hasattr(value, "index") and hasattr(value, "iloc")
