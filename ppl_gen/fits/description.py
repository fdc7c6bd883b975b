"""A walk through what a program refers to, in numbers and words that can be kept and compared.

Described are code by what it does and constants by their numbers. Not described: comments, docstrings, names of local
variables, the place of a file, the code of installed packages.
"""

from __future__ import annotations

import ast
import dis
import enum
import functools
import hashlib
import inspect
import sys
import sysconfig
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from ppl_gen.data.on_disk import RowsOnDisk, is_on_disk, on_disk

__all__ = ["SHOWN", "Description", "Entries"]

Entries = dict[str, list[Any]]

SHOWN = 16  # numbers of a tensor that are kept as they are
_MOST, _DEEPEST, _ITEMS = 5000, 8, 100
_PLAIN = (type(None), bool, int, str, bytes, complex, enum.Enum, torch.dtype, torch.device, slice, range)
_LOCAL_NAMES = ("LOAD_FAST", "STORE_FAST", "DELETE_FAST")
_INSTALLED = tuple(sysconfig.get_paths()[key] for key in ("purelib", "platlib", "stdlib", "platstdlib"))


class Description:
    """Walks through what a program refers to; everything is described once, under the name it is first met by."""

    def __init__(self, learned: set[int]) -> None:
        self.entries: Entries = {}
        self._learned = learned
        self._seen: dict[int, Any] = {}  # holds what it has seen, so that identities are not used twice

    def add(self, name: str, value: Any, depth: int = 0) -> None:
        """Describe ``value`` and what it refers to."""
        if isinstance(value, float | np.floating):
            self.entries[name] = ["number", float(value) if np.isfinite(value) else repr(float(value))]
        elif isinstance(value, _PLAIN) or isinstance(value, np.generic):
            text = repr(value.item() if isinstance(value, np.generic) else value)
            self.entries[name] = ["value", text if len(text) <= 200 else _hash(text)]
        elif id(value) not in self._seen and len(self.entries) < _MOST and depth <= _DEEPEST:
            self._seen[id(value)] = value
            self._add_object(name, value, depth + 1)

    def _add_object(self, name: str, value: Any, depth: int) -> None:
        if isinstance(value, Tensor | np.ndarray | RowsOnDisk):
            self.entries[name] = _shape(value) if id(value) in self._learned else _tensor(value)
        elif isinstance(value, types.FunctionType):
            self._function(name, value, depth)
        elif isinstance(value, types.MethodType):
            self.add(name, value.__func__, depth)
            self.add(f"{name}.self", value.__self__, depth)
        elif isinstance(value, functools.partial):
            for part in ("func", "args", "keywords"):
                self.add(name if part == "func" else f"{name}.{part}", getattr(value, part), depth)
        elif isinstance(value, type):
            self._class(name, value, depth)
        elif isinstance(value, nn.Module):
            self._module(name, value, depth)
        elif isinstance(value, Mapping):
            for key in list(value)[:_ITEMS]:
                self.add(f"{name}[{key!r}]" if isinstance(key, _PLAIN) else f"{name}[...]", value[key], depth)
        elif isinstance(value, list | tuple):
            self._sequence(name, value, depth)
        elif isinstance(value, set | frozenset):
            self.entries[name] = ["value", str(sorted(repr(item) for item in value if isinstance(item, _PLAIN)))[:500]]
        elif isinstance(value, torch.distributions.Distribution):
            self._named(name, value, [*value.arg_constraints, "base_dist", "transforms"], depth)
        elif not isinstance(value, types.ModuleType | PurePath):
            self._object(name, value, depth)

    def _sequence(self, name: str, value: list[Any] | tuple[Any, ...], depth: int) -> None:
        if len(value) > SHOWN and all(isinstance(item, int | float) for item in value):
            self.entries[name] = _tensor(np.asarray(value))
        elif all(isinstance(item, _PLAIN) or isinstance(item, float) for item in value):
            self.entries[name] = ["value", repr(value)[:500]]
        else:
            for i, item in enumerate(value[:_ITEMS]):
                self.add(f"{name}[{i}]", item, depth)

    def _function(self, name: str, function: types.FunctionType, depth: int) -> None:
        code, own = function.__code__, _is_own(function.__module__)
        self.entries[name] = ["code", _code_hash(code), _source_hash(function)] if own else ["value", _label(function)]
        for free, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                if free != "__class__":  # what `super()` reads
                    self.add(f"{name}.{free}", cell.cell_contents, depth)
            except ValueError:  # not filled yet
                continue
        for argument, default in _defaults(function):
            self.add(f"{name}({argument})", default, depth)
        if own:
            for path, value in _globals(code, function.__globals__):
                self.add(f"{name}.{path}", value, depth)

    def _class(self, name: str, made: type, depth: int) -> None:
        """The user's own classes by their methods and constants, others by name."""
        self.entries.setdefault(f"{name}: class", ["value", _label(made)])
        for part in made.__mro__:
            if not _is_own(part.__module__):
                continue
            for key, value in vars(part).items():
                inside = getattr(value, "__func__", getattr(value, "fget", value))
                if isinstance(inside, types.FunctionType) or (not key.startswith("__") and isinstance(inside, _PLAIN)):
                    self.add(f"{name}.{key}", inside, depth)

    def _module(self, name: str, module: nn.Module, depth: int) -> None:
        if isinstance(module, AutoGuide):  # it holds the model, and what it learns
            self.entries[f"{name}: class"] = ["value", _label(type(module))]
            return
        for path, part in module.named_modules():
            here = f"{name}.{path}" if path else name
            self._seen[id(part)] = part
            self._class(here, type(part), depth)
            for key, value in {**part._parameters, **part._buffers}.items():
                if value is not None:
                    self.add(f"{here}.{key}", value, depth)
            kept = {k: v for k, v in vars(part).items() if not k.startswith("_") and k != "training"}
            for key, value in kept.items():
                self.add(f"{here}.{key}", value, depth)

    def _object(self, name: str, value: Any, depth: int) -> None:
        self._class(name, type(value), depth)
        own = _is_own(type(value).__module__) or type(value).__module__.startswith("ppl_gen")
        for key, inside in getattr(value, "__dict__", {}).items():
            if own or (not key.startswith("_") and isinstance(inside, (*_PLAIN, float, Tensor, np.ndarray))):
                self.add(f"{name}.{key}", inside, depth)

    def _named(self, name: str, value: Any, names: list[str], depth: int) -> None:
        self.entries[f"{name}: class"] = ["value", _label(type(value))]
        for key in names:
            if key in vars(value):
                self.add(f"{name}.{key}", vars(value)[key], depth)


def _defaults(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    code, values = function.__code__, function.__defaults__ or ()
    yield from zip(code.co_varnames[code.co_argcount - len(values) : code.co_argcount], values, strict=True)
    yield from (function.__kwdefaults__ or {}).items()


def _globals(code: types.CodeType, namespace: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The globals that code reads, functions inside it included; of a module of the user's, the attributes it reads."""
    instructions = list(dis.get_instructions(code))
    for i, instruction in enumerate(instructions):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME") and instruction.argval in namespace:
            path, value = str(instruction.argval), namespace[instruction.argval]
            for later in instructions[i + 1 :]:
                if not isinstance(value, types.ModuleType) or not later.opname.startswith(("LOAD_ATTR", "LOAD_METHOD")):
                    break
                if not _is_own(value.__name__) or not hasattr(value, later.argval):
                    break
                path, value = f"{path}.{later.argval}", getattr(value, later.argval)
            yield path, value
        elif isinstance(instruction.argval, types.CodeType):
            yield from _globals(instruction.argval, namespace)


def _is_own(module: str | None) -> bool:
    """Whether a module is the user's: neither Python's, nor this package's, nor installed."""
    top = (module or "").partition(".")[0]
    if not top or top in sys.stdlib_module_names or top in ("ppl_gen", "builtins"):
        return top == "__main__"
    file = getattr(sys.modules.get(top), "__file__", None) or next(
        iter(getattr(sys.modules.get(top), "__path__", [])), ""
    )
    return not str(file).startswith(_INSTALLED)


def _code_hash(code: types.CodeType) -> str:
    """What the code does, whatever its local names, comments, docstring, line numbers and file."""
    parts: list[str] = [f"{code.co_argcount} {code.co_kwonlyargcount} {code.co_flags & 0x2F}"]
    for instruction in dis.get_instructions(code):
        value = instruction.arg if instruction.opname in _LOCAL_NAMES else instruction.argval
        parts.append(f"{instruction.opname} {_constant(value)}")
    return _hash("\n".join(parts))


def _constant(value: Any) -> str:
    if isinstance(value, types.CodeType):
        return _code_hash(value)
    if isinstance(value, frozenset):
        return str(sorted(map(_constant, value)))
    return f"({', '.join(map(_constant, value))})" if isinstance(value, tuple) else f"{type(value).__name__} {value!r}"


def _source_hash(function: Callable[..., Any]) -> str | None:
    """Of the syntax tree without docstrings, where the source can be found and stands by itself."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    if not isinstance(tree.body[0], ast.FunctionDef):
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return _hash(ast.unparse(tree))


def _shape(value: Tensor | np.ndarray | RowsOnDisk) -> list[Any]:
    return ["value", f"{str(value.dtype).removeprefix('torch.')} of shape {list(value.shape)}"]


def _tensor(value: Tensor | np.ndarray | RowsOnDisk) -> list[Any]:
    """Shape and numbers; of many numbers their norm and projections on fixed signs, which differ where they do."""
    if is_on_disk(value):
        rows = on_disk(value)
        return ["tensor", rows.dtype.kind, list(rows.shape), _tensor(rows.probe())[3]]
    assert not isinstance(value, RowsOnDisk)  # which is on disk
    if isinstance(value, Tensor):
        if value.is_meta or value.layout is not torch.strided:
            return _shape(value)
        value = value.detach().cpu()
        value = (value.float() if value.dtype is torch.bfloat16 else value).numpy()
    kind, shape = value.dtype.kind, list(value.shape)
    if kind not in "f":
        exact = kind in "biu" and value.size <= SHOWN
        return ["tensor", kind, shape, value.ravel().astype(int).tolist() if exact else _hash(repr(value.tobytes()))]
    flat = value.ravel().astype(np.float64)
    odd = ~np.isfinite(flat)
    if flat.size > SHOWN:
        flat = np.where(odd, 0.0, flat)
        signs = np.random.default_rng(0).integers(0, 2, (4, flat.size), dtype=np.int8) * 2 - 1
        numbers = [float(np.linalg.norm(flat)), *(float(row @ flat) for row in signs), float(odd.sum())]
        return ["tensor", kind, shape, numbers if np.isfinite(numbers).all() else str(numbers)]
    return ["tensor", kind, shape, str(flat.tolist()) if odd.any() else flat.tolist()]


def _label(value: Any) -> str:
    module = "" if _is_own(value.__module__) else f"{value.__module__}."  # the user's may be moved
    return f"{module}{value.__qualname__}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
