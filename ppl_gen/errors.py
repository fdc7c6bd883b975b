"""Errors that carry what a user needs to go on."""

from __future__ import annotations

import math
import numbers
import operator
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ppl_gen.fits.result import Fit

__all__ = [
    "PROGRAM_ERRORS",
    "FitWarning",
    "IncompatibleError",
    "MissingExtraError",
    "NonFiniteError",
    "RankError",
    "is_number",
    "require_callable",
    "require_device",
    "require_dtype",
    "require_flag",
    "require_number",
    "require_path",
    "require_positive",
    "require_seed",
    "require_spelt",
    "require_whole",
]


class IncompatibleError(ValueError):
    """A program and an algorithm (or objective, or yardstick) do not fit; the message prints both sides."""


class FitWarning(UserWarning):
    """A fit is bad: chains that diverge, disagree or hardly move, columns on scales apart, a guide that is far off.

    One when the fit ends, with all that was seen; a guide's weights cost something and warn when first looked at.
    """


class MissingExtraError(ImportError):
    """An optional package is needed; the message names the extra that installs it."""


class RankError(RuntimeError):
    """Another of the processes that learn one fit together failed, or is gone; its own error says more."""


#: What a user's program may raise when it is run on rows, values or shapes that it was not written for.
PROGRAM_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


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
    """Whether ``value`` is a real number; True and False are not.

    >>> is_number(0.5), is_number(True), is_number("0.5")
    (True, False, False)
    """
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def require_whole(name: str, value: Any, least: int = 1, most: int | None = None) -> None:
    """Raise ValueError, naming the argument, unless ``value`` is a whole number, Python's or numpy's, in the range.

    >>> require_whole("particles", 2.5)
    Traceback (most recent call last):
    ...
    ValueError: particles: expected a whole number of at least 1, got 2.5
    """
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or int(value) < least or (most is not None and int(value) > most):
        bound = "" if most is None else f" and at most {most}"
        raise ValueError(f"{name}: expected a whole number of at least {least}{bound}, got {value!r}")


def require_number(name: str, value: Any, low: float = 0.0, below: float = math.inf, expected: str = "") -> None:
    """Raise ValueError, naming the argument, unless ``value`` is a finite number, at least ``low`` and ``below`` that.

    >>> require_number("jitter", math.inf)
    Traceback (most recent call last):
    ...
    ValueError: jitter: expected a finite number of at least 0, got inf
    """
    if not is_number(value) or not low <= float(value) < below:
        bound = f"a finite number of at least {low:g}" + ("" if below == math.inf else f" and below {below:g}")
        raise ValueError(f"{name}: expected {expected or bound}, got {value!r}")


def require_flag(name: str, value: Any, *, optional: bool = False) -> None:
    """Raise ValueError, naming the argument, unless ``value`` is True or False (or None, where that is a choice).

    >>> require_flag("full_mass", "yes")
    Traceback (most recent call last):
    ...
    ValueError: full_mass: expected True or False, got 'yes'
    """
    if not (optional and value is None) and not (isinstance(value, bool) or type(value).__name__ in ("bool_", "bool")):
        raise ValueError(f"{name}: expected True{', False or None' if optional else ' or False'}, got {value!r}")


def require_callable(name: str, value: Any, what: str = "a function") -> None:
    """Raise TypeError, naming the argument, unless ``value`` can be called; a class cannot stand for its instance.

    >>> require_callable("schedule", 3)
    Traceback (most recent call last):
    ...
    TypeError: schedule: expected a function, got int
    """
    if not callable(value):
        raise TypeError(f"{name}: expected {what}, got {type(value).__name__}")


def require_dtype(value: Any) -> None:
    """Raise TypeError unless ``value`` is None or a dtype in which fits are computed.

    >>> require_dtype("float32")
    Traceback (most recent call last):
    ...
    TypeError: dtype: expected torch.float32 or torch.float64, got 'float32'
    """
    import torch

    if value is not None and not (isinstance(value, torch.dtype) and value in (torch.float32, torch.float64)):
        raise TypeError(f"dtype: expected torch.float32 or torch.float64, got {value!r}")


def require_device(value: Any) -> torch.device | None:
    """The device, or None; raises ValueError unless numbers can be put there.

    >>> require_device("meta")
    Traceback (most recent call last):
    ...
    ValueError: device: expected one that holds numbers, such as 'cpu' or 'cuda', got 'meta'
    """
    import torch

    if value is None:
        return None
    if isinstance(value, bytes):  # torch reads them as text
        raise ValueError(f"device: expected one such as 'cpu' or 'cuda', got {value!r}")
    try:
        place = torch.device(value)
        if place.type != "meta":
            torch.empty(1, device=place)
    except Exception as error:  # every backend has a way of its own to be absent
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"device: {text}, got {value!r}; expected one of this machine, such as 'cpu'") from error
    if place.type == "meta":
        raise ValueError(f"device: expected one that holds numbers, such as 'cpu' or 'cuda', got {value!r}")
    return place


def require_spelt(name: str, value: str | os.PathLike[str]) -> None:
    """Raise ValueError, naming the argument, for a path that no file system takes: empty, too long, with a zero byte.

    >>> require_spelt("path", "")
    Traceback (most recent call last):
    ...
    ValueError: path: expected a path, got ''
    """
    text = os.fspath(value)
    if not text.strip() or "\0" in text or any(len(part.encode(errors="replace")) > 255 for part in Path(text).parts):
        raise ValueError(f"{name}: expected a path, got {text[:40]!r}")


def require_path(name: str, value: Any, *, file: bool = False) -> Path:
    """The absolute path, to a ``file`` or a folder that can be made or is there.

    Raises TypeError, naming the argument, for what is no path, and ValueError where something else is in the way.

    >>> require_path("path", 3)
    Traceback (most recent call last):
    ...
    TypeError: path: expected a path, as text or pathlib.Path, got int
    """
    if not isinstance(value, str | os.PathLike) or isinstance(os.fspath(value), bytes):
        raise TypeError(f"{name}: expected a path, as text or pathlib.Path, got {type(value).__name__}")
    require_spelt(name, value)
    path = Path(value).expanduser().absolute()
    if file and path.is_dir():
        raise ValueError(f"{name}: expected a file, but {path} is a folder; name a file in it")
    if not file and path.is_file():
        raise ValueError(f"{name}: expected a folder, but {path} is a file")
    if above := next((part for part in path.parents if part.exists() and not part.is_dir()), None):
        raise ValueError(f"{name}: {path} cannot be made, as {above} is a file")
    return path


def require_positive(name: str, value: Any) -> None:
    """Raise ValueError, naming the argument, unless ``value`` is a positive finite number.

    >>> require_positive("lr", 0.0)
    Traceback (most recent call last):
    ...
    ValueError: lr: expected a positive number, got 0.0
    """
    if not is_number(value) or not 0 < float(value) < math.inf:
        raise ValueError(f"{name}: expected a positive number, got {value!r}")


def require_seed(value: Any, name: str = "seed") -> int:
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
        raise ValueError(f"{name}: expected a whole number of at least 0 and below 2**32, got {value!r}")
    return seed
