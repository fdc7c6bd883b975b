"""Functions that name their arguments otherwise than the model, called by the order of the data's values instead."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

__all__ = ["ordered"]


def ordered(function: Any, order: Sequence[str], *, lead: int = 0) -> Any:
    """``function`` as it is where it names its arguments as the data do, else one that takes their values in order.

    ``order``: names of the model's arguments that a tuple of data fills; ``lead``: arguments of ``function`` before
    them. Modules, classes and functions that take any keyword stay as they are.

    >>> guide = ordered(lambda inputs, outputs=None: (inputs, outputs), ["x", "y"])
    >>> guide(x=1, y=2), guide(x=1)
    ((1, 2), (1, None))
    """
    made = isinstance(getattr(function, "func", function), type)  # a class, perhaps with options, is called otherwise
    if not order or not callable(function) or made or isinstance(function, nn.Module):
        return function
    parameters = [p for p in inspect.signature(function).parameters.values()][lead:]
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    missing = any(p.default is p.empty and p.name not in order for p in named)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if open_ended or not missing:
        return function
    return _by_order(function, tuple(order))


def _by_order(function: Callable[..., Any], order: tuple[str, ...]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        values = []
        for name in order:
            if name not in kwargs:  # rows without an outcome end before it
                break
            values.append(kwargs.pop(name))
        return function(*args, *values, **kwargs)

    # What a caller may pass are the data's names.
    call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL),
            *(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in order),
        ]
    )
    return call
