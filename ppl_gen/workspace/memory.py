"""What modules remember between calls, apart from their parameters and buffers: put back after a look or a question."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

__all__ = ["remembered", "unremembered"]


@contextlib.contextmanager
def unremembered() -> Iterator[None]:
    """What modules keep in Python between calls (cached plates, counters) is on exit what it was before.

    A module that makes its parameters inside (autoguides do when they are first called) keeps all it then set up.
    """
    kept: dict[int, tuple[nn.Module, dict[str, tuple[Any, Any]], int]] = {}

    def keep(module: nn.Module, _inputs: object) -> None:
        if id(module) not in kept:
            state = {name: (value, _shallow(value)) for name, value in _remembered(module)}
            kept[id(module)] = module, state, _made_so_far(module)

    hook = register_module_forward_pre_hook(keep)
    try:
        yield
    finally:
        hook.remove()
        for module, state, made in kept.values():
            if _made_so_far(module) == made:
                _put_back(module, state)


def remembered(module: nn.Module) -> dict[str, Any]:
    """A module's attributes that are not torch's own, containers copied: for `watch` to compare."""
    return {name: _shallow(value) for name, value in _remembered(module)}


def _remembered(module: nn.Module) -> list[tuple[str, Any]]:
    """A module's attributes that are not torch's own: its parameters, buffers, parts and hooks."""
    return [(name, value) for name, value in vars(module).items() if name not in _TORCH_ATTRIBUTES]


_TORCH_ATTRIBUTES = frozenset(vars(nn.Module()))


def _made_so_far(module: nn.Module) -> int:
    return sum(len(part._parameters) + len(part._buffers) for part in module.modules())


def _shallow(value: Any) -> Any:
    return value.copy() if type(value) in (dict, list, set) else value


def _put_back(module: nn.Module, state: Mapping[str, tuple[Any, Any]]) -> None:
    for name, _ in _remembered(module):
        if name not in state:
            del module.__dict__[name]
    for name, (value, contents) in state.items():
        if type(value) in (dict, list, set):
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(contents)
        module.__dict__[name] = value
