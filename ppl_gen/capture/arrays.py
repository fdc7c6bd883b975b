"""Replaying a tape of small tensors in NumPy, where an operation costs a fraction of what it costs in torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_unflatten

from ppl_gen.capture.array_operations import FUNCTIONS, TEXT
from ppl_gen.capture.replay import Recording
from ppl_gen.capture.tape import Call, RecordingRefused, Slot, Tape

__all__ = ["ArrayRecording", "array_recording", "values_at"]

#: Operations that give the numbers of their first argument another shape.
_RESHAPED = {
    "aten::view",
    "aten::_unsafe_view",
    "aten::reshape",
    "aten::squeeze",
    "aten::squeeze.dim",
    "aten::squeeze.dims",
    "aten::unsqueeze",
    "aten::detach",
    "aten::alias",
}
#: Operations and second arguments that leave the first as it is.
_NOTHING = {
    "aten::mul.Tensor": 1,
    "aten::mul.Scalar": 1,
    "aten::div.Tensor": 1,
    "aten::div.Scalar": 1,
    "aten::add.Tensor": 0,
    "aten::add.Scalar": 0,
    "aten::sub.Tensor": 0,
    "aten::sub.Scalar": 0,
    "aten::pow.Tensor_Scalar": 1,
}
#: Those whose arguments may change places.
_EITHER = {"aten::mul.Tensor", "aten::add.Tensor"}
_EVERYTHING = 2**62  # the end of a slice that has none
_DTYPES = (torch.float64, torch.int64, torch.bool)

Arrays = Callable[[np.ndarray], tuple[Any, ...]]


@dataclass(frozen=True)
class ArrayRecording(Recording):
    """A tape in NumPy's operations; `load` gives it as a function of tensors, `load_arrays` as one of arrays."""

    def load_arrays(self) -> Arrays:
        """The function of an array that the text defines; it gives arrays or numbers."""
        space: dict[str, Any] = {f"c{i}": value for i, value in enumerate(self.constants)}
        space |= {f"f{i}": FUNCTIONS[name] for i, name in enumerate(self.operations)}
        space |= {"errstate": np.errstate}
        exec(compile(self.source, "<recording>", "exec"), space)  # its own text, of operations and numbers alone
        replay: Arrays = space["replay"]
        return replay

    def load(self) -> Callable[..., tuple[Any, ...]]:
        replay = self.load_arrays()

        def function(u: Tensor) -> tuple[Any, ...]:
            return tuple(torch.from_numpy(np.array(result, np.float64)) for result in replay(u.detach().numpy()))

        return function


def array_recording(tape: Tape, u: Tensor) -> ArrayRecording:
    """The text of a tape with one input, such as ``u``, in NumPy's operations.

    >>> from ppl_gen.capture.recorder import record
    >>> u = torch.tensor([1.0, 3.0], dtype=torch.float64)
    >>> text = array_recording(record(lambda: ((u * u).sum(), 2.0 * u), [u]), u)
    >>> value, gradient = text.load_arrays()(np.array([3.0, 4.0]))
    >>> float(value), gradient
    (25.0, array([6., 8.]))

    Raises:
        RecordingRefused: for operations that are not known in NumPy, other numbers than float64, int64 and bool, and
            what is changed in place where another name may see it.
    """
    return _Writer(tape, u).written()


class _Writer:
    """Writes one tape down, with the shapes of its tensors at hand."""

    def __init__(self, tape: Tape, u: Tensor) -> None:
        if tape.inputs != 1 or u.device.type != "cpu":
            raise RecordingRefused("NumPy replays functions of one tensor on a CPU")
        self.tape = tape
        self.values = values_at(tape, u)
        self.operations: dict[str, int] = {}
        self.constants: list[Any] = []
        self.places: dict[int, int] = {}
        self.read = {leaf for call in tape.calls for leaf in call.inputs} | set(tape.results)

    def written(self) -> ArrayRecording:
        lines = ["def replay(v0):", "  with errstate(all='ignore'):"]
        for call in self.tape.calls:
            lines += [f"    {line}" for line in self._lines(call)]
        given = "".join(f"{self._leaf(leaf)}, " for leaf in self.tape.results)
        lines.append(f"    return ({given})")
        return ArrayRecording("\n".join(lines), tuple(self.operations), tuple(self.constants))

    def _lines(self, call: Call) -> list[str]:
        name = call.operation.name()
        given: list[Any] = [_Text(self._leaf(leaf)) for leaf in call.inputs]
        args, kwargs = tree_unflatten(given, call.structure)
        kwargs.pop("memory_format", None)  # how the same numbers lie in memory
        if call.writes:
            self._refuse_aliases(call)
        if name in ("aten::split_with_sizes", "aten::split.Tensor", "aten::unbind.int"):
            return self._parts(name, call, args)
        outputs = [f"v{slot.number}" if slot in self.read and slot is not None else "_" for slot in call.outputs]
        return [f"{', '.join(outputs)} = {self._expression(name, call, args, kwargs)}"]

    def _expression(self, name: str, call: Call, args: Sequence[Any], kwargs: dict[str, Any]) -> str:
        first = args[0]
        shape = tuple(self.values[call.outputs[0]].shape) if call.outputs[0] is not None else ()
        if name in _RESHAPED:
            return str(first) if self._shape(call.inputs[0]) == shape else f"{first}.reshape({shape})"
        if name == "aten::expand":
            if self.values[call.outputs[0]].dtype != torch.float64:
                raise RecordingRefused(f"NumPy: {name} of other numbers than float64")
            return str(first) if self._shape(call.inputs[0]) == shape else f"{first} + {self._zeros(shape)}"
        if name == "aten::select.int":
            return f"{first}[{':, ' * _axis(args[1], self._shape(call.inputs[0]))}{args[2]}]"
        if name == "aten::slice.Tensor":
            defaults: list[Any] = [0, None, None, 1]
            dim, start, end, step = [*args[1:], *defaults[len(args) - 1 :]]
            return f"{first}[{':, ' * _axis(dim, self._shape(call.inputs[0]))}{_range(start, end, step)}]"
        if name == "aten::max.dim" and call.outputs[1] not in self.read:
            return f"{self._function('aten::amax')}({first}, ({args[1]},), {args[2] if len(args) > 2 else False}), None"
        if not kwargs and (shorter := self._shorter(name, call, args, shape)):
            return shorter
        if name in TEXT and not kwargs:
            return TEXT[name].format(*args)
        if name not in FUNCTIONS or kwargs:
            raise RecordingRefused(f"NumPy: {name}{' with ' + ', '.join(kwargs) if kwargs else ''} is not known")
        return f"{self._function(name)}({', '.join(map(repr, args))})"

    def _shorter(self, name: str, call: Call, args: Sequence[Any], shape: tuple[int, ...]) -> str:
        """What constants make simpler; "" where there is nothing. No value is changed in place: names may be shared."""
        first, second = str(args[0]), str(args[1]) if len(args) > 1 else ""
        if name in _NOTHING and len(args) == 2:
            if self._is(call.inputs[0], shape) and _all(call.inputs[1], _NOTHING[name]):
                return first
            if name in _EITHER and self._is(call.inputs[1], shape) and _all(call.inputs[0], _NOTHING[name]):
                return second
        if name == "aten::pow.Tensor_Scalar" and second in ("2", "2.0"):
            return f"{first} * {first}"
        if (
            name == "aten::xlogy.Tensor"
            and not isinstance(call.inputs[0], Slot)
            and bool((call.inputs[0].value != 0).all())
        ):
            return f"{first} * {self._function('aten::log')}({second})"
        if name in ("aten::clamp", "aten::clamp_"):
            low, high = second or "None", str(args[2]) if len(args) > 2 else "None"
            floor = first if low == "None" else f"{self._function('aten::clamp_min')}({first}, {low})"
            return floor if high == "None" else f"{self._function('aten::clamp_max')}({floor}, {high})"
        return ""

    def _is(self, leaf: Any, shape: tuple[int, ...]) -> bool:
        """Whether it is of this shape, in the numbers of results."""
        value = self.values.get(leaf) if isinstance(leaf, Slot) else None
        return value is not None and value.dtype == torch.float64 and tuple(value.shape) == shape

    def _parts(self, name: str, call: Call, args: Sequence[Any]) -> list[str]:
        """Pieces along a dimension, each under its own name."""
        given = self._shape(call.inputs[0])
        if name == "aten::unbind.int":
            axis = _axis(args[1] if len(args) > 1 else "0", given)
            places = [str(place) for place in range(given[axis])]
        else:
            axis = _axis(args[2] if len(args) > 2 else "0", given)
            if name == "aten::split_with_sizes":
                sizes = [int(size) for size in args[1]]
            else:
                whole, size = given[axis], int(args[1])
                sizes = [min(size, whole - start) for start in range(0, whole, size)]
            ends = np.cumsum(sizes)
            places = [f"{end - size}:{end}" for size, end in zip(sizes, ends, strict=True)]
        return [
            f"v{slot.number} = {args[0]}[{':, ' * axis}{place}]"
            for slot, place in zip(call.outputs, places, strict=True)
            if slot is not None and slot in self.read
        ]

    def _refuse_aliases(self, call: Call) -> None:
        """What is written gets a new value under its name, which no view of it would see."""
        written = call.inputs[0]
        if not isinstance(written, Slot) or call.outputs[:1] != (written,) or call.operation.name() not in FUNCTIONS:
            raise RecordingRefused(f"NumPy: {call.operation.name()} writes")
        storage = self.values[written].untyped_storage().data_ptr()
        shared = [value for value in self.values.values() if value.untyped_storage().data_ptr() == storage]
        if len(shared) > 1:
            raise RecordingRefused(f"NumPy: {call.operation.name()} writes into what has a view")

    def _shape(self, leaf: Any) -> tuple[int, ...]:
        return tuple(self.values[leaf].shape if isinstance(leaf, Slot) else np.shape(leaf.value))

    def _function(self, name: str) -> str:
        return f"f{self.operations.setdefault(name, len(self.operations))}"

    def _zeros(self, shape: tuple[int, ...]) -> str:
        self.constants.append(np.zeros(shape))
        return f"c{len(self.constants) - 1}"

    def _leaf(self, leaf: Any) -> str:
        if isinstance(leaf, Slot):
            return f"v{leaf.number}"
        value = leaf.value
        if isinstance(value, bool | int | str | type(None)) or (isinstance(value, float) and np.isfinite(value)):
            return repr(value)
        if isinstance(value, Tensor):
            if value.dtype not in _DTYPES:
                raise RecordingRefused(f"NumPy: a constant of {value.dtype}")
        elif not isinstance(value, float):
            return "None"  # a dtype or device: the operations that take one are refused
        if id(value) not in self.places:
            self.places[id(value)] = len(self.constants)
            self.constants.append(value.numpy()[()] if isinstance(value, Tensor) else value)
        return f"c{self.places[id(value)]}"


def _all(leaf: Any, number: int) -> bool:
    """Whether it is this number in every entry."""
    if isinstance(leaf, Slot) or not isinstance(leaf.value, Tensor | int | float):
        return False
    return bool((torch.as_tensor(leaf.value) == number).all())


class _Text(str):
    """A piece of source that stands for itself inside lists and tuples."""

    def __repr__(self) -> str:
        return str(self)


def _axis(axis: str, shape: Sequence[int]) -> int:
    return int(axis) % len(shape)


def _range(start: Any, end: Any, step: Any) -> str:
    last = "" if str(end) == "None" or int(end) >= _EVERYTHING else str(end)
    return f"{'' if str(start) == 'None' else start}:{last}:{step}"


def values_at(tape: Tape, u: Tensor) -> dict[Slot | None, Tensor]:
    """Every tensor of the tape at one input, so that shapes and shared memory are known."""
    values: dict[Slot | None, Tensor] = {Slot(0): u.detach()}
    with torch.no_grad():
        for call in tape.calls:
            inputs = [values[leaf] if isinstance(leaf, Slot) else leaf.value for leaf in call.inputs]
            args, kwargs = tree_unflatten(inputs, call.structure)
            results = tree_leaves(call.operation(*args, **kwargs))
            values |= {slot: value for slot, value in zip(call.outputs, results, strict=True) if slot is not None}
    for value in values.values():
        if value.dtype not in _DTYPES:
            raise RecordingRefused(f"neither NumPy nor C: numbers of {value.dtype}")
    return values
