"""Names and labels of axes that a user asks for, checked against the variables that there are."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from ppl_gen.diagnostics.labels import plain

__all__ = ["checked_coords", "checked_dims", "checked_lengths"]


def checked_dims(dims: Any, known: Collection[str]) -> dict[str, list[str]]:
    """``dims`` as `arviz.from_dict` takes them: variable -> names of its axes after chain and draw.

    Raises:
        TypeError: for what is no such mapping.
        ValueError: for a variable that is not ``known``, or two axes of one name; it is named.

    >>> checked_dims({"z": ("school",)}, ["z", "y"])
    {'z': ['school']}
    """
    found = {}
    for name, axes in _mapping("dims", dims, '{"z": ["school"]}').items():
        if name not in known:
            raise ValueError(f"dims: no site or entry of the data is called {name!r}; there is {', '.join(known)}")
        if isinstance(axes, str) or not isinstance(axes, Sequence) or not all(isinstance(axis, str) for axis in axes):
            raise TypeError(f"dims[{name!r}]: expected a list of names, one for every axis, got {axes!r}")
        if len(set(axes)) < len(axes):
            raise ValueError(f"dims[{name!r}]: two axes have the same name: {list(axes)}")
        found[name] = list(axes)
    return found


def checked_lengths(dims: Mapping[str, Sequence[str]], shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError, naming the variable, unless ``dims`` name every axis of the shapes (without chain and draw)."""
    for name, axes in dims.items():
        if name not in shapes:
            raise ValueError(f"dims: {name!r} has no draws in this fit; there is {', '.join(shapes)}")
        if len(axes) != len(shapes[name]):
            raise ValueError(
                f"dims[{name!r}]: expected {len(shapes[name])} name(s), one for every axis of shape "
                f"{tuple(shapes[name])}, got {list(axes)}"
            )


def checked_coords(coords: Any, rows: int | None, kept: int | None) -> dict[str, list[Any]]:
    """Labels by the name of the axis; those of all ``rows`` are cut to the rows that are ``kept``.

    Raises:
        TypeError: for what is no mapping from names to labels.

    >>> checked_coords({"school": ["a", "b"]}, 2, 2)
    {'school': ['a', 'b']}
    """
    found = {}
    for name, labels in _mapping("coords", coords, '{"school": ["a", "b"]}').items():
        if isinstance(labels, str | Mapping) or not hasattr(labels, "__iter__") or np.ndim(labels) != 1:
            raise TypeError(f"coords[{name!r}]: expected a list of labels, got {labels!r}")
        listed = plain([getattr(label, "item", lambda label=label: label)() for label in labels])
        found[name] = listed[:kept] if kept != rows and len(listed) == rows else listed
    return found


def _mapping(argument: str, given: Any, example: str) -> Mapping[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise TypeError(f"{argument}: expected a mapping such as {example}, got {given!r}")
    return given
