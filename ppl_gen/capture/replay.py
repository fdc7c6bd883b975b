"""Replaying a tape: a straight line of tensor operations, written as Python source, that travels as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_unflatten

from ppl_gen.capture.recorder import record
from ppl_gen.capture.tape import Call, Constant, RecordingRefused, Slot, Tape

__all__ = ["Recording", "agrees", "record_checked", "recording"]

Replay = Callable[..., tuple[Any, ...]]
_PLAIN = (bool, int, str, type(None))


@dataclass(frozen=True)
class Recording:
    """A tape as source text, the names of its operations, and its constants; it can be pickled.

    ``results`` tells which leaves of the result are computed (None) and what the others are.
    """

    source: str
    operations: tuple[str, ...]
    constants: tuple[Any, ...]

    def load(self) -> Replay:
        """The function of the inputs that the text defines; without gradients."""
        space: dict[str, Any] = {f"c{i}": value for i, value in enumerate(self.constants)}
        space |= {f"f{i}": _operation(name) for i, name in enumerate(self.operations)}
        space["no_grad"] = torch.no_grad
        exec(compile(self.source, "<recording>", "exec"), space)  # its own text, of operations and numbers alone
        replay: Replay = space["replay"]
        return replay


def recording(tape: Tape, inputs: Sequence[int] | None = None) -> Recording:
    """The text of a tape: a function of its inputs, or of those at some places, that returns the leaves of the result.

    >>> x = torch.tensor([1.0, 3.0])
    >>> text = recording(record(lambda: (x.exp(), x.sum() * 2), [x]))
    >>> text.load()(torch.tensor([0.0, 1.0]))[1]
    tensor(2.)
    """
    return _Writer(tape, range(tape.inputs) if inputs is None else inputs).written()


def record_checked(function: Callable[[Tensor], tuple[Tensor, ...]], points: Sequence[Tensor]) -> Recording:
    """A recording of a function of one tensor, made at the first of ``points``, that agrees with it at all of them.

    Raises:
        RecordingRefused: as `record` does, and where the replay gives other numbers.
    """
    made = recording(record(lambda: function(points[0]), [points[0]]))
    agrees(made.load(), function, points)
    return made


def agrees(replay: Replay, function: Callable[[Tensor], tuple[Tensor, ...]], points: Sequence[Tensor]) -> None:
    """Compare a replay with what it was made of.

    Raises:
        RecordingRefused: where they differ at one of the points, by more than rounding.
    """
    for point in points:
        for ours, theirs in zip(replay(point), function(point), strict=True):
            # Fused operations may round differently, by a few units in the last place of the largest entry.
            scale = 1.0 + float(theirs.abs().nan_to_num(0.0, 0.0, 0.0).amax()) if theirs.numel() else 1.0
            close = torch.isclose(
                ours, theirs, rtol=0.0, atol=1e3 * torch.finfo(theirs.dtype).eps * scale, equal_nan=True
            )
            if not bool(close.all()):
                raise RecordingRefused("the replay gives other numbers than the program at another point")


def _operation(name: str) -> Callable[..., Any]:
    """The operation of a name such as ``aten::add.Tensor``, as the dispatcher has it: one call of Python less."""
    space, _, rest = name.partition("::")
    packet, _, overload = rest.partition(".")
    found: Callable[..., Any] = getattr(getattr(getattr(torch.ops, space), packet), overload or "default")._op
    return found


class _Writer:
    """Writes one tape down."""

    def __init__(self, tape: Tape, inputs: Sequence[int]) -> None:
        self.tape, self.inputs = tape, inputs
        self.operations: dict[str, int] = {}
        self.constants: list[Any] = []
        self.places: dict[int, int] = {}  # of constants, by identity

    def written(self) -> Recording:
        """Source, operations, constants."""
        tape = self.tape
        last: dict[Slot, int] = {}
        for place, call in enumerate(tape.calls):
            last |= {leaf: place for leaf in call.inputs if isinstance(leaf, Slot)}
            last |= {slot: place for slot in call.outputs if slot is not None}
        results = {leaf for leaf in tape.results if isinstance(leaf, Slot)}
        dying: dict[int, list[str]] = {}
        for slot, place in last.items():
            if slot not in results:
                dying.setdefault(place, []).append(self._name(slot))
        lines = [f"def replay({', '.join(f'v{i}' for i in self.inputs)}):", "  with no_grad():"]
        for place, call in enumerate(tape.calls):
            lines.append(f"    {self._call(call)}")
            if place in dying:
                lines.append(f"    del {', '.join(dying[place])}")
        given = "".join(f"{self._result(leaf)}, " for leaf in tape.results)
        lines.append(f"    return ({given})")
        return Recording("\n".join(lines), tuple(self.operations), tuple(self.constants))

    def _name(self, slot: Slot) -> str:
        return f"v{slot.number}"

    def _call(self, call: Call) -> str:
        number = self.operations.setdefault(call.operation.name(), len(self.operations))
        args, kwargs = tree_unflatten([_Text(self._leaf(leaf)) for leaf in call.inputs], call.structure)
        given = [repr(arg) for arg in args] + [f"{name}={value!r}" for name, value in kwargs.items()]
        text = f"f{number}({', '.join(given)})"
        names = ["_" if slot is None else self._name(slot) for slot in call.outputs]
        returns = call.operation._schema.returns
        if not names or (call.writes and self._unneeded(call)):
            return text
        several = len(returns) > 1 or isinstance(returns[0].type, torch.ListType)
        return f"{', '.join(names)}{',' if several and len(names) == 1 else ''} = {text}"

    def _unneeded(self, call: Call) -> bool:
        """Whether what it returns is what it was given: in-place operations return their argument."""
        return all(slot is None or slot in call.inputs for slot in call.outputs)

    def _leaf(self, leaf: Slot | Constant) -> str:
        return self._name(leaf) if isinstance(leaf, Slot) else self._constant(leaf.value)

    def _result(self, leaf: Slot | Constant) -> str:
        if isinstance(leaf, Constant) and isinstance(leaf.value, Tensor):
            return f"{self._constant(leaf.value)}.clone()"  # whoever gets it may write into it
        return self._leaf(leaf)

    def _constant(self, value: Any) -> str:
        if isinstance(value, _PLAIN) or (isinstance(value, float) and math.isfinite(value)):
            return repr(value)
        place = self.places.get(id(value))
        if place is None:
            place = self.places[id(value)] = len(self.constants)
            self.constants.append(value)
        return f"c{place}"


class _Text(str):
    """A piece of source that stands for itself inside lists and tuples."""

    def __repr__(self) -> str:
        return str(self)
