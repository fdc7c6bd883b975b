"""Errors that carry what a user needs to go on."""

from __future__ import annotations

import math
import numbers
import operator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppl_gen.result import Fit

__all__ = [
    "FitWarning",
    "IncompatibleError",
    "MissingExtraError",
    "NonFiniteError",
    "is_number",
    "require_positive",
    "require_seed",
    "require_whole",
]


class IncompatibleError(ValueError):
    """A program and an algorithm (or objective, or yardstick) do not fit; the message prints both sides."""


class FitWarning(UserWarning):
    """A fit ended and is bad: chains that diverge, disagree or hardly move. One for a fit, with all that was seen."""


class MissingExtraError(ImportError):
    """An optional package is needed; the message names the extra that installs it."""


class NonFiniteError(ArithmeticError):
    """A loss or a gradient became infinite or NaN.

    ``fit`` is the fit rolled back to the last state whose loss and gradients were finite, so nothing learned is lost.

    >>> error = NonFiniteError("loss is nan at step 3", fit=None)
    >>> error.fit is None
    True
    """

    def __init__(self, message: str, fit: Fit | None = None) -> None:
        super().__init__(message)
        self.fit = fit


def is_number(value: Any) -> bool:
    """Whether ``value`` is a real number; True and False are none.

    >>> is_number(0.5), is_number(True), is_number("0.5")
    (True, False, False)
    """
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def require_whole(name: str, value: Any) -> None:
    """Raise ValueError, naming the argument, unless ``value`` is a whole number of at least 1.

    >>> require_whole("particles", 2.5)
    Traceback (most recent call last):
    ...
    ValueError: particles: expected a whole number of at least 1, got 2.5
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or int(value) < 1:
        raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")


def require_positive(name: str, value: Any) -> None:
    """Raise ValueError, naming the argument, unless ``value`` is a positive finite number.

    >>> require_positive("lr", 0.0)
    Traceback (most recent call last):
    ...
    ValueError: lr: expected a positive number, got 0.0
    """
    if not is_number(value) or not 0 < float(value) < math.inf:
        raise ValueError(f"{name}: expected a positive number, got {value!r}")


def require_seed(value: Any) -> int:
    """The seed as an int; raises ValueError unless it is a whole number that every generator takes.

    >>> require_seed(-1)
    Traceback (most recent call last):
    ...
    ValueError: seed: expected a whole number of at least 0 and below 2**32, got -1
    """
    try:
        seed = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        seed = -1
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: expected a whole number of at least 0 and below 2**32, got {value!r}")
    return seed
