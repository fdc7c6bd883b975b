"""Whether what a captured step has frozen still is what the program would read: its Python, and its modules' modes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pyro
from torch import nn

from ppl_gen.workspace.closures import Remembered, alike, same
from ppl_gen.workspace.memory import remembered

__all__ = ["Watch"]


class Watch:
    """All that functions and modules hold in Python, apart from parameters and buffers, as it was when this was made.

    >>> def program(settings):
    ...     return lambda: settings["beta"]
    >>> layer, settings = nn.Dropout(0.5), {"beta": 0.1}
    >>> watch = Watch([program(settings)], [layer])
    >>> watch.changed()
    []
    >>> _ = layer.eval(), settings.update(beta=0.2)
    >>> watch.changed()
    ['Dropout.training', 'settings']
    """

    def __init__(self, functions: Iterable[Callable[..., Any]], modules: Iterable[nn.Module]) -> None:
        self._functions = Remembered(functions)
        self._modules = [(module, module.training, remembered(module)) for module in modules]

    def changed(self) -> list[str]:
        """Names of what is not now as it was."""
        found = self._functions.changed()
        for module, training, held in self._modules:
            name = type(module).__name__
            if module.training is not training:
                found.append(f"{name}.training")
            now = remembered(module)
            if now.keys() != held.keys():
                found += [f"{name}.{key}" for key in now.keys() ^ held.keys()]
                continue
            found += [f"{name}.{key}" for key, value in now.items() if not _same(value, held[key])]
        return sorted(set(found))


def _same(one: Any, other: Any) -> bool:
    if type(one) is dict and type(other) is dict and one.keys() == other.keys() and _plates(one) and _plates(other):
        return all(_frame(one[name]) == _frame(other[name]) for name in one)
    if type(one) in (dict, list, set):
        return type(one) is type(other) and alike(one, other)
    return same(one, other)


def _plates(values: dict[Any, Any]) -> bool:
    """Whether these are whole plates alone, as autoguides make them anew for every call."""
    return bool(values) and all(type(v) is pyro.plate and v.subsample_size == v.size for v in values.values())


def _frame(plate: Any) -> tuple[Any, ...]:
    return plate.name, plate.size, plate.dim
