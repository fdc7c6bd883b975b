"""Whether what a captured step has frozen still is what the program would read: its Python, and its modules' modes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ppl_gen.workspace.closures import Remembered
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
    """The same object, or plain values that are equal: a container that was filled again is another."""
    if type(one) in (dict, list, set):
        return type(one) is type(other) and len(one) == len(other) and bool(_parts(one) == _parts(other))
    return one is other or (isinstance(one, bool | int | float | str) and type(one) is type(other) and one == other)


def _parts(container: Any) -> list[int]:
    values = container.items() if isinstance(container, dict) else [(0, value) for value in container]
    return [hash((key, id(value))) for key, value in values]
