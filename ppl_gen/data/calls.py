"""From what a user passes as data to the arguments of the model: by order, by name, by column."""

from __future__ import annotations

import argparse
import inspect
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Number, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ppl_gen.data.arrays import as_array
from ppl_gen.data.names import refuse_misspelt
from ppl_gen.data.sources import Columns

__all__ = ["ByStep", "Call", "Constant", "as_call", "by_step", "is_number", "is_whole", "may_be_data"]


@dataclass(frozen=True)
class Constant:
    """A value that has no rows and is passed whole with every batch."""

    value: Any


@dataclass(frozen=True)
class ByStep:
    """A constant that changes as training goes on; see `by_step`."""

    function: Callable[[int], Any]
    final: Any

    def at(self, step: int | None) -> Any:
        """The value at a step of training, or (None) in every question about the fit."""
        if step is None:
            return self.final
        value = self.function(step)
        if not isinstance(value, bool | int | float | Tensor):
            raise TypeError(f"by_step: expected a number or a tensor for step {step}, got {type(value).__name__}")
        return value


def by_step(function: Callable[[int], Any], *, final: Any) -> ByStep:
    r"""An entry of the data that changes by step, such as an annealing factor :math:`\beta_t`.

    Args:
        function: from the number of batches drawn before, 0 for the first, to the value of the argument.
        final: its value in every question about the fit (evidence, predictions), and in the dry run.

    Raises:
        TypeError: if ``function`` cannot be called.

    Example:
        >>> factor = by_step(lambda step: min(1.0, step / 100), final=1.0)
        >>> factor.at(50), factor.at(None)
        (0.5, 1.0)
    """
    if not callable(function):
        raise TypeError(f"function: expected a function of the step, got {type(function).__name__}")
    return ByStep(function, final)


@dataclass(frozen=True)
class Call:
    """Arguments of the model by name: what has rows, what is passed whole, and which of them are passed by position.

    ``order``: the arguments that a tuple filled, in order; ``left_out``: what no argument takes; ``taken``: what was
    taken for a constant without being marked as one.
    """

    entries: dict[str, Any]
    constants: dict[str, Any]
    positional: tuple[str, ...] = ()
    order: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    taken: dict[str, str] = field(default_factory=dict)


#: What has no rows, whoever passes it: settings, networks, functions, what torch itself keeps apart from tensors.
_WHOLE = (
    ByStep | bool | int | float | str | bytes | np.generic | Mapping | argparse.Namespace | types.SimpleNamespace
    | nn.Module | nn.utils.rnn.PackedSequence | torch.dtype | torch.device | torch.Size
    | torch.distributions.Distribution
)  # fmt: skip


def is_whole(value: Any) -> bool:
    """Whether ``value`` can have no rows and is passed as it is.

    >>> is_whole({"width": 3}), is_whole(None), is_whole(torch.zeros(2)), is_whole([1.0, 2.0])
    (True, True, False, False)
    """
    if value is None or isinstance(value, _WHOLE) or callable(value):
        return True
    return isinstance(value, Tensor | np.ndarray) and value.ndim == 0


def as_call(data: Any, model: Callable[..., Any], read: Collection[str] = ()) -> Call:
    """The arguments of ``model`` that ``data`` fills; entries named in ``read`` may be nobody's argument.

    A tuple, and the columns of a torch Dataset, fill the arguments in order, as ``model(*data)`` would (a column no
    argument whose default is a value); a mapping fills
    them by name; a table with named columns does so where the model's arguments are names of its columns. Anything
    else is the first argument.

    Raises:
        ValueError: for a missing argument, a misspelt entry, or more values than arguments.
        TypeError: for an entry that holds no numbers.
    """
    signature = inspect.signature(model.forward if isinstance(model, nn.Module) else model)
    parameters = [p for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    names = [p.name for p in parameters]
    kinds = {p.kind for p in signature.parameters.values()}
    data = data._asdict() if hasattr(data, "_asdict") else data
    if data is None and not signature.parameters:
        data = ()
    elif data is None and all(p.default is not p.empty for p in parameters):
        raise TypeError(
            "data: expected rows, got None; where the program is a density without data, pass an empty tuple"
        )
    if isinstance(data, tuple) and data and len(parameters) == 1 and all(isinstance(v, Real | np.bool_) for v in data):
        data = list(data)  # rows of a model of one argument
    named = isinstance(data, Mapping) or _has_columns(data, parameters)
    open_kind = inspect.Parameter.VAR_KEYWORD if named else inspect.Parameter.VAR_POSITIONAL
    if not names and open_kind not in kinds and not (isinstance(data, Mapping | tuple) and not data):
        raise ValueError("the model takes no arguments, so data cannot reach it; give it one, e.g. `def model(x):`")
    if isinstance(data, tuple):
        ordered = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
        call = _by_order(data, ordered)
    elif named:
        data = data if isinstance(data, Mapping) else {name: data[name].to_numpy() for name in data.columns}
        call = _by_name(data, signature, names, read, open_kind in kinds)
    else:
        name = names[0] if names else "data"
        call = _alone(name, data)
    there = [*call.entries, *call.constants]
    empty = there and not call.entries and all(value is None for value in call.constants.values())
    _require_arguments(signature, set() if empty else set(there), [*there, *call.left_out])
    return call


def _alone(name: str, data: Any) -> Call:
    if isinstance(data, argparse.Namespace | types.SimpleNamespace):
        return Call({}, {name: data}, (name,), (name,))
    if isinstance(data, Constant | ByStep):  # marked as having no rows, as in a tuple or by name
        marked: dict[str, Any] = {}
        _sorted_out(name, data, {}, marked)
        return Call({}, marked, (name,), (name,))
    if is_number(data):
        value = as_array(data, name) if isinstance(data, Tensor | np.ndarray) else data
        value = value.item() if isinstance(value, np.generic) else value  # distributions take Python's numbers
        return Call({}, {name: value}, (name,), (name,), taken={name: type(data).__name__})
    return Call({name: as_array(data, name)}, {}, (name,), (name,))


def is_number(value: Any) -> bool:
    """A single number or truth value, of Python, numpy or torch: it has no rows.

    >>> is_number(8.5), is_number(torch.tensor(True)), is_number([8.5]), is_number("8.5")
    (True, True, False, False)
    """
    if isinstance(value, Tensor | np.ndarray):
        return value.ndim == 0 and not isinstance(value, np.ma.MaskedArray)
    return isinstance(value, bool | int | float | np.number | np.bool_)


def _has_columns(data: Any, parameters: Sequence[inspect.Parameter]) -> bool:
    """A data frame (of pandas or another library) whose columns the model names; else it is one table of numbers."""
    if isinstance(data, Tensor | np.ndarray | Mapping) or not hasattr(data, "columns") or not hasattr(data, "shape"):
        return False
    columns = {str(name) for name in data.columns}
    needed = {p.name for p in parameters if p.default is p.empty}
    found = {p.name for p in parameters} & columns
    if found and needed - columns:
        raise ValueError(
            f"data: the table has columns {', '.join(sorted(found))}, which the model names, and lacks "
            f"{', '.join(sorted(needed - columns))}; rename its columns, or pass a mapping"
        )
    return bool(found)


def _sorted_out(name: str, value: Any, entries: dict[str, Any], constants: dict[str, Any]) -> bool:
    """Put one value among the entries with rows or the constants; True if nobody had marked it as a constant."""
    if isinstance(value, Constant):
        inside = value.value
        constants[name] = as_array(inside, name) if isinstance(inside, Tensor | np.ndarray) else inside
    elif isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
        constants[name] = as_array(value, name)
    elif is_whole(value):
        constants[name] = value
        return not isinstance(value, ByStep | bool | int | float | str | np.generic | None)
    else:
        entries[name] = as_array(value, name)
    return False


def _by_order(data: tuple[Any, ...], parameters: list[inspect.Parameter]) -> Call:
    names = [p.name for p in parameters]
    columns = isinstance(data, Columns)
    left_out: tuple[str, ...] = ()
    if columns:  # a labelled dataset: what the model does not take is left out, and a mask is no label
        count = 0
        while count < min(len(data), len(parameters)) and _takes(parameters[count], data[count]):
            count += 1
        left_out = tuple(f"column {i} of the dataset" for i in range(count, len(data)))
        data = tuple(data[:count])
    if len(data) > len(names):
        raise ValueError(
            f"data: a tuple of {len(data)} values, and the model takes {len(names)} ({', '.join(names)}); they fill "
            "its arguments in order"
        )
    entries: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    taken = {}
    for name, value in zip(names, data, strict=False):
        if _sorted_out(name, value, entries, constants):
            taken[name] = type(value).__name__
    order = tuple(names[: len(data)])
    # By name wherever that can be: what a program offers beside its model may take fewer arguments, or others first.
    single = len(order) == 1 and not constants
    positional = order if single or any(p.kind is p.POSITIONAL_ONLY for p in parameters) else ()
    return Call(entries, constants, positional, order, left_out, taken)


def _takes(parameter: inspect.Parameter, value: Tensor) -> bool:
    """Whether a column may be meant: one with a default other than None is a setting, and a label is no value of it."""
    if parameter.default is not None and parameter.default is not parameter.empty:
        return False
    return value.dtype is torch.bool if "mask" in parameter.name else "length" not in parameter.name


def _by_name(
    data: Mapping[Any, Any], signature: inspect.Signature, names: list[str], read: Collection[str], open_ended: bool
) -> Call:
    entries: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    taken: dict[str, str] = {}
    known = signature.parameters
    left_out = () if open_ended else tuple(str(name) for name in data if name not in known and name not in read)
    for name, value in data.items():
        if not open_ended and name not in known:
            continue
        if value is None and (name not in known or known[name].default is not inspect.Parameter.empty):
            continue
        if _sorted_out(name, value, entries, constants):
            taken[name] = type(value).__name__
    given = [str(name) for name, value in data.items() if value is not None]
    if data and not open_ended and not known.keys() & data.keys():
        _require_arguments(signature, set(), given)
        raise ValueError(
            f"data: none of its entries ({', '.join(map(str, data))}) is an argument of the model "
            f"({', '.join(names)}); give them the names of the model's arguments"
        )
    refuse_misspelt(left_out, names, given)
    return Call(entries, constants, (), (), left_out, taken)


def _require_arguments(signature: inspect.Signature, given: set[str], there: list[str]) -> None:
    for p in signature.parameters.values():
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) or p.default is not p.empty or p.name in given:
            continue
        held = ", ".join(name for name in there if name != p.name) or "nothing"
        raise ValueError(
            f"the model needs the argument {p.name!r}, which the data does not hold (it holds {held}); "
            f"add the entry (None if it is to be drawn), or give the argument a default such as `{p.name}=None`"
        )


def may_be_data(value: Any) -> bool:
    """Numbers, texts, settings and networks are what a density is made of; anything else may hold observations."""
    if isinstance(value, argparse.Namespace | types.SimpleNamespace):
        return may_be_data(vars(value))
    if isinstance(value, Mapping):
        return any(map(may_be_data, value.values()))
    if isinstance(value, list | tuple):
        return bool(value)
    if isinstance(value, Tensor | np.ndarray):
        return value.ndim > 0
    return not (value is None or isinstance(value, Number | str | nn.Module) or callable(value))
