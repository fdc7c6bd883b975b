"""Errors that carry what a user needs to go on."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ppl_gen.result import Fit

__all__ = ["IncompatibleError", "MissingExtraError", "NonFiniteError"]


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
