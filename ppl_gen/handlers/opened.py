"""Programs inside handlers of Pyro: ``@poutine.scale(scale=0.1)`` above a model hides its arguments and its networks.

Called with the model, ``poutine.scale(model, scale=0.1)``, a handler takes over its signature; as a decorator it does
not, and what it returns can be called with anything. Around a module neither of them is a module, whose parameters
could be found, copied and put back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from pyro.contrib.easyguide import EasyGuide
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.effect import AutoMessenger
from pyro.poutine.messenger import Messenger
from torch import nn

from ppl_gen.handlers.private import BoundHandler

__all__ = ["called_through", "opened", "within"]

_OF_A_FIT = (AutoGuide, AutoMessenger, EasyGuide)  # they hold a model of their own, and a fit copies them with it


def opened(function: Any) -> Any:
    """``function`` as it is, unless it is a handler around a model: then the same, called as that model is called.

    >>> import inspect, pyro.poutine as poutine
    >>> @poutine.scale(scale=0.1)
    ... def model(x, y=None):
    ...     pass
    >>> opened(model).__name__, str(inspect.signature(opened(model)))
    ('model', '(x, y=None)')
    """
    layers, inner = _layers(function)
    if not layers or not callable(inner):
        return function
    if isinstance(inner, nn.Module) and not isinstance(inner, _OF_A_FIT):
        return called_through(inner, lambda call: functools.reduce(lambda made, layer: layer(made), layers, call))
    if hasattr(function, "__wrapped__"):
        return function

    @functools.wraps(inner)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return call


def called_through(module: nn.Module, handler: Callable[[Callable[..., Any]], Callable[..., Any]]) -> nn.Module:
    """A module of its own class that is called through ``handler``; the one given stays as it is.

    Both have parameters, buffers and parts in common; guides that hold the one given call it without the handler.
    """
    kind = type(module)

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        return handler(functools.partial(kind.__call__, self))(*args, **kwargs)

    named = {"__call__": called, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    meta: Any = type(kind)
    made: nn.Module = object.__new__(meta(kind.__name__, (kind,), named))
    vars(made).update(vars(module))
    return made


def within(function: Callable[..., Any], context: Callable[..., AbstractContextManager[Any]]) -> Callable[..., Any]:
    """``function`` called inside ``context(args, kwargs)``; a module is one of its own class still."""
    if not isinstance(function, nn.Module):

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with context(args, kwargs):
                return function(*args, **kwargs)

        return call

    def handler(inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with context(args, kwargs):
                return inner(*args, **kwargs)

        return call

    return called_through(function, handler)


def _layers(function: Any) -> tuple[list[Messenger], Any]:
    """The handlers around a model, the innermost first, and the model."""
    layers: list[Messenger] = []
    while True:
        if isinstance(function, BoundHandler):
            function = function.func
        elif _is_bound(function):
            layers, function = [function.args[0], *layers], function.args[1]
        elif isinstance(getattr(function, "msngr", None), Messenger):  # of reparam and trace
            layers, function = [function.msngr, *layers], function.fn
        else:
            return layers, function


def _is_bound(function: Any) -> bool:
    """Whether it is ``partial(call within a handler, handler, model)``, as every messenger of Pyro wraps a model."""
    if not isinstance(function, functools.partial) or len(function.args) != 2:
        return False
    return isinstance(function.args[0], Messenger) and not function.keywords
