"""What functions remember in Python between calls: counters, lists, caches and generators in closures and the like."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import random
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Remembered", "alike", "functions_of", "same", "same_again"]

_DEPTH = 4  # of containers and objects within each other
_ITEMS = 10_000  # of one container, numbers of one array, objects behind one variable: beyond that it is data,
# and nothing that counts calls; every question looks at all of it
_CONTAINERS = (
    dict,
    list,
    set,
    collections.OrderedDict,
    collections.defaultdict,
    collections.Counter,
    collections.deque,
)
_PLAIN = frozenset({bool, int, float, complex, str, bytes, frozenset, type(None)})
_FUNCTIONS = (types.FunctionType, types.MethodType, partial)
_APART = (nn.Module, nn.Parameter, type, types.ModuleType)
_ARRAYS = (Tensor, np.ndarray)
_OTHERS = sys.stdlib_module_names | {"torch", "pyro", "numpy", "scipy", "pandas", "xarray", "arviz", "ppl_gen"}


class Remembered:
    """A record of all that functions can see and change from one call to the next, parameters and networks apart.

    Networks that a program makes when it first runs are kept, in variables as in dictionaries.

    >>> def counting():
    ...     calls = []
    ...     return lambda: calls.append(1) or len(calls)
    >>> count = counting()
    >>> before = Remembered([count])
    >>> count(), before.changed(), before.put_back(), count()
    (1, ['calls'], None, 1)
    """

    def __init__(self, functions: Iterable[Any]) -> None:
        self._known: dict[int, Any] = {}  # by identity; held, so that no other object gets the same
        self._kept: list[tuple[str, Callable[..., bool], Callable[..., None], tuple[Any, ...]]] = []
        self._left = _ITEMS
        for function in functions:
            self._function(function)

    def changed(self) -> list[str]:
        """Names of what is not now as it was."""
        return sorted({name for name, same, _, held in self._kept if not same(*held)})

    def put_back(self) -> None:
        """Make all as it was, in place."""
        for _, same, undo, held in self._kept:
            if not same(*held):
                undo(*held)

    # ------------------------------------------------------------------------------------------ what is looked at
    def _first(self, value: Any) -> bool:
        first = id(value) not in self._known
        self._known[id(value)] = value
        return first

    def _function(self, function: Any, depth: int = 0) -> None:
        if function is None or depth > _DEPTH or not self._first(function):
            return
        if isinstance(function, partial):
            for part in (function.func, *function.args, *function.keywords.values()):
                self._value(getattr(part, "__name__", "an argument"), part, depth + 1)
        elif isinstance(function, types.MethodType):
            self._object("self", function.__self__, depth)
            self._function(function.__func__, depth)
        elif isinstance(function, types.FunctionType):
            self._closure(function, depth)
        elif not isinstance(function, type | nn.Module):
            self._object(type(function).__name__, function, depth)
            call = vars(type(function)).get("__call__")
            if isinstance(call, types.FunctionType):
                self._function(call, depth)

    def _closure(self, function: types.FunctionType, depth: int) -> None:
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # a cell that is still empty
                self._cell(name, cell)
                self._variable(name, cell.cell_contents, depth + 1)
        for name, value in (function.__kwdefaults__ or {}).items():
            self._variable(name, value, depth + 1)
        arguments = function.__code__.co_varnames[: function.__code__.co_argcount]
        defaults = function.__defaults__ or ()
        for name, value in zip(arguments[len(arguments) - len(defaults) :], defaults, strict=True):
            self._variable(name, value, depth + 1)
        self._items(function.__name__, vars(function), depth + 1)
        if function.__module__ is None or function.__module__.split(".")[0] in _OTHERS:
            return
        for name in function.__code__.co_names:
            if name in function.__globals__:
                value = function.__globals__[name]
                self._entry(name, function.__globals__, name)
                self._variable(name, value, depth + 1)

    def _variable(self, name: str, value: Any, depth: int) -> None:
        """A value and what it holds: a large one, which is not looked at to its end, takes nothing from the next."""
        before, self._left = self._left, _ITEMS
        self._value(name, value, depth)
        self._left = before

    def _value(self, name: str, value: Any, depth: int) -> None:
        if type(value) in _PLAIN:
            return
        if isinstance(value, _FUNCTIONS):
            if (getattr(value, "__module__", None) or "").split(".")[0] not in _OTHERS or depth <= 1:
                self._function(value, depth)
            return
        if self._left <= 0 or isinstance(value, _APART) or not self._first(value):
            return
        self._left -= 1
        if isinstance(value, _ARRAYS):
            self._array(name, value)
        elif isinstance(value, torch.Generator):
            state = value.get_state()
            self._keep(name, lambda: torch.equal(value.get_state(), state), partial(_set_state, value, state))
        elif isinstance(value, random.Random):
            kept = value.getstate()
            self._keep(name, lambda: value.getstate() == kept, lambda: value.setstate(kept))
        elif isinstance(value, np.random.Generator):
            bits, numbers = value.bit_generator, value.bit_generator.state
            self._keep(name, lambda: bits.state == numbers, lambda: setattr(bits, "state", numbers))
        elif depth <= _DEPTH and isinstance(value, tuple):
            self._parts(name, value[:_ITEMS], depth)
        elif depth <= _DEPTH and type(value) in _CONTAINERS:
            self._container(name, value, depth)
        elif depth <= _DEPTH:
            self._object(name, value, depth)

    def _object(self, name: str, value: Any, depth: int) -> None:
        """The attributes of an object of the user's own; a network's are looked after where it is called."""
        own = type(value).__module__.split(".")[0] not in _OTHERS or isinstance(value, types.SimpleNamespace)
        if own and not isinstance(value, nn.Module) and isinstance(getattr(value, "__dict__", None), dict):
            self._first(value)
            self._items(name, vars(value), depth)

    # ----------------------------------------------------------------------------------------------- what is kept
    def _keep(self, name: str, same: Callable[..., bool], undo: Callable[..., None], *held: Any) -> None:
        self._kept.append((name, same, undo, held))

    def _cell(self, name: str, cell: Any) -> None:
        if not self._first(cell):
            return
        value = cell.cell_contents

        def undo() -> None:
            if not isinstance(cell.cell_contents, nn.Module):
                cell.cell_contents = value

        self._keep(name, lambda: same(cell.cell_contents, value), undo)

    def _entry(self, name: str, where: dict[str, Any], key: str) -> None:
        value = where[key]

        def undo() -> None:
            if not isinstance(where.get(key), nn.Module):
                where[key] = value

        self._keep(name, lambda: same(where.get(key), value), undo)

    def _items(self, name: str, where: dict[str, Any], depth: int) -> None:
        """A namespace: which names it has, and what each stands for."""
        kept = dict(where)

        def undo() -> None:
            made = _networks(where, kept)
            where.clear()
            where.update(kept | made)

        self._keep(name, lambda: alike(where, kept), undo)
        look = (
            self._variable if depth <= 1 else self._value
        )  # attributes of a model that is an object are its variables
        for key, value in kept.items():
            look(f"{name}.{key}", value, depth + 1)

    def _container(self, name: str, value: Any, depth: int) -> None:
        if len(value) > _ITEMS:
            return
        kept = value.copy()
        self._keep(name, alike, _refill, value, kept)
        self._parts(name, kept.values() if isinstance(kept, dict) else kept, depth)

    def _parts(self, name: str, parts: Iterable[Any], depth: int) -> None:
        for part in parts:
            if self._left > 0 and type(part) not in _PLAIN:
                self._value(name, part, depth + 1)

    def _array(self, name: str, value: Any) -> None:
        if isinstance(value, np.ndarray) and value.dtype != object and value.size <= _ITEMS and value.flags.writeable:
            kept = value.copy()
            same = partial(np.array_equal, value, kept, equal_nan=value.dtype.kind in "fc")
            self._keep(name, lambda: bool(same()), lambda: np.copyto(value, kept))
        if isinstance(value, Tensor) and not value.requires_grad and value.numel() <= _ITEMS:
            version, copy = value._version, value.detach().clone()

            def undo() -> None:
                with torch.no_grad():
                    value.copy_(copy)

            self._keep(name, lambda: value._version == version or torch.equal(value, copy), undo)


def _set_state(generator: torch.Generator, state: Tensor) -> None:
    generator.set_state(state)


def _refill(container: Any, kept: Any) -> None:
    made = _networks(container, kept)
    container.clear()
    container.extend(kept) if isinstance(container, list | collections.deque) else container.update(kept)
    if isinstance(container, dict):
        container.update(made)


def _networks(now: Any, before: Any) -> dict[Any, Any]:
    """Entries that hold networks made since: what was learned of them would be lost with them."""
    if not isinstance(now, dict):
        return {}
    return {key: value for key, value in now.items() if isinstance(value, nn.Module) and key not in before}


def alike(one: Any, other: Any) -> bool:
    """Whether two containers hold the same objects, or equal plain values: nothing is asked of the objects."""
    if len(one) != len(other):
        return False
    if isinstance(one, dict):
        return all(same(a, b) and same(one[a], other[b]) for a, b in zip(one, other, strict=True))
    return one == other if isinstance(one, set) else all(map(same, one, other))


def same(one: Any, other: Any) -> bool:
    """The same object, or equal plain values."""
    return one is other or (type(one) in _PLAIN and type(one) is type(other) and bool(one == other))


@contextlib.contextmanager
def same_again(*parts: Any) -> Iterator[None]:
    """What the functions of programs and guides remember is on exit what it was before."""
    before = Remembered(functions_of(*parts))
    try:
        yield
    finally:
        before.put_back()


def functions_of(*parts: Any) -> list[Any]:
    """The functions that programs offer, of these among the ``parts``, and the others as they are."""
    found: list[Any] = []
    for part in parts:
        if dataclasses.is_dataclass(part) and not isinstance(part, type) and not callable(part):
            inside = [getattr(part, field.name) for field in dataclasses.fields(part)]
            inside += [value for group in inside if isinstance(group, dict) for value in group.values()]
            found += functions_of(*(value for value in inside if callable(value) or dataclasses.is_dataclass(value)))
        elif callable(part):
            found.append(part)
    return found
