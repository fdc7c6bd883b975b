"""Checks of values that were read from JSON, and checks made of checks.

>>> table_of(list_of(number))({"loc": [1.0, 2.0]}), list_of(text)(["a", 3])
(True, False)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

__all__ = ["columns_of", "list_of", "number", "numeral", "one_of", "optional", "table_of", "text"]


def text(value: Any) -> bool:
    """Any text."""
    return isinstance(value, str)


def number(value: Any) -> bool:
    """A finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def numeral(value: Any) -> bool:
    """A number written as text, NaN and infinity included."""
    try:
        return isinstance(value, str) and len(value) < 40 and isinstance(float(value), float)
    except ValueError:
        return False


def list_of(inside: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A check of lists all of whose members pass ``inside``."""
    return lambda value: isinstance(value, list) and all(map(inside, value))


def table_of(inside: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A check of objects all of whose values pass ``inside``."""
    return lambda value: isinstance(value, dict) and all(map(inside, value.values()))


def columns_of(inside: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A check of lists by name, equally long, whose members pass ``inside``."""

    def check(value: Any) -> bool:
        return table_of(list_of(inside))(value) and len({len(column) for column in value.values()}) < 2

    return check


def optional(inside: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A check that null passes too."""
    return lambda value: value is None or inside(value)


def one_of(*values: Any) -> Callable[[Any], bool]:
    """A check of texts (or null) that are among ``values``."""
    return lambda value: (value is None or isinstance(value, str)) and value in values
