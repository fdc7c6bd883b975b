"""What arguments may be: a word out of several, text, a function, a fit, a picture's axes. One place says each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["require_axes", "require_choice", "require_function", "require_instance", "require_mapping", "require_text"]


def require_choice(name: str, value: Any, choices: Iterable[str], *, optional: bool = False) -> None:
    """Raise ValueError, naming the argument, unless ``value`` is one of the words (or None, where that is a choice).

    Only text is compared: a list cannot be looked up, and an array is equal to nothing.

    >>> require_choice("kind", ["a"], ("a", "b"))
    Traceback (most recent call last):
    ...
    ValueError: kind: expected one of 'a', 'b', got ['a']
    """
    known = tuple(choices)
    if not (optional and value is None) and not (isinstance(value, str) and value in known):
        words = ", ".join(map(repr, known))
        raise ValueError(f"{name}: expected one of {words}{' or None' if optional else ''}, got {value!r}")


def require_text(name: str, value: Any, what: str = "text") -> None:
    """Raise TypeError, naming the argument, unless ``value`` is text.

    >>> require_text("name", 3)
    Traceback (most recent call last):
    ...
    TypeError: name: expected text, got int
    """
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected {what}, got {type(value).__name__}")


def require_function(name: str, value: Any) -> None:
    """Raise TypeError, naming the argument, unless ``value`` is a function or None.

    >>> require_function("relabel", "by size")
    Traceback (most recent call last):
    ...
    TypeError: relabel: expected a function or None, got str
    """
    if value is not None and not callable(value):
        raise TypeError(f"{name}: expected a function or None, got {type(value).__name__}")


def require_mapping(name: str, value: Any, what: str = "a mapping") -> None:
    """Raise TypeError, naming the argument, unless ``value`` is a mapping whose keys are text.

    >>> require_mapping("entries", {3: 1.0})
    Traceback (most recent call last):
    ...
    TypeError: entries: expected names as keys, got 3
    """
    if not isinstance(value, Mapping):
        raise TypeError(f"{name}: expected {what}, got {type(value).__name__}")
    for key in value:
        if not isinstance(key, str):
            raise TypeError(f"{name}: expected names as keys, got {key!r}")


def require_instance(name: str, value: Any, kind: type) -> None:
    """Raise TypeError, naming the argument, unless ``value`` is None or of that class.

    >>> require_instance("em", 3, dict)
    Traceback (most recent call last):
    ...
    TypeError: em: expected dict(...) or None, got int
    """
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"{name}: expected {kind.__name__}(...) or None, got {type(value).__name__}")


def require_axes(value: Any) -> None:
    """Raise TypeError unless ``value`` is None or one pair of axes of matplotlib.

    >>> require_axes([1, 2])
    Traceback (most recent call last):
    ...
    TypeError: axes: expected the axes of matplotlib (one pair) or None, got list
    """
    if value is None:
        return
    from matplotlib.axes import Axes

    if not isinstance(value, Axes):
        raise TypeError(f"axes: expected the axes of matplotlib (one pair) or None, got {type(value).__name__}")
