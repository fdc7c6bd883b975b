"""Tensors of two precisions in one program: what is said of them, and what holds the other one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MixedDtypesError", "of_another_dtype", "speaks_of_dtypes"]

#: What torch says of operands whose dtypes do not go together.
_WORDS = ("same dtype", "expected scalar type", "can't be cast", "not implemented for '", "dtypes", "dtype of")


class MixedDtypesError(TypeError):
    """A program computes with tensors of two dtypes, which torch does not do."""


def speaks_of_dtypes(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def of_another_dtype(function: Callable[..., Any]) -> dict[str, torch.dtype]:
    """Floating tensors that a function holds from outside, by name, of another dtype than the fit computes in."""
    return {name: value.dtype for name, value in _held(function) if _another(value)}


def _another(value: Tensor) -> bool:
    return value.is_floating_point() and value.dtype is not torch.get_default_dtype()


def _held(function: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors and the tensors of distributions in a function's closure and globals, or in a module's attributes."""
    if isinstance(function, nn.Module):
        attributes = {
            f"{path}.{key}".lstrip("."): v for path, m in function.named_modules() for key, v in vars(m).items()
        }
        yield from _tensors(attributes)
        return
    function = inspect.unwrap(getattr(function, "func", function))
    if inspect.isfunction(function):
        outside = inspect.getclosurevars(function)
        yield from _tensors({**outside.globals, **outside.nonlocals})


def _tensors(values: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in values.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, torch.distributions.Distribution):
            yield from ((name, part) for part in vars(value).values() if isinstance(part, Tensor))
