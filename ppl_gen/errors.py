"""Errors that carry what a user needs to go on."""

from __future__ import annotations

import math
import numbers
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppl_gen.result import Fit

__all__ = ["IncompatibleError", "MissingExtraError", "NonFiniteError", "require_positive", "require_whole"]


class IncompatibleError(ValueError):
    """A program and an algorithm (or objective, or yardstick) do not fit; the message prints both sides."""


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
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < float(value) < math.inf:
        raise ValueError(f"{name}: expected a positive number, got {value!r}")
