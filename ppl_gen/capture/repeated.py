"""A function of tensors that is called many times without gradients: by itself at first, then replayed from a tape."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ppl_gen.capture.compiled import ABORTS, CannotCompileError, compiled, worth_compiling
from ppl_gen.capture.hoisted import hoisted
from ppl_gen.capture.recorder import record
from ppl_gen.capture.replay import recording
from ppl_gen.capture.tape import RecordingRefused, Tape
from ppl_gen.errors import PROGRAM_ERRORS
from ppl_gen.workspace.isolation import generators, set_generators

__all__ = ["Repeated"]

FEW = 6  # calls: for fewer, recording costs more than it saves
KINDS = 4  # of inputs, by shape, that are recorded
VERIFY = 200  # replays from one comparison with the function to the next

Function = Callable[[Sequence[Tensor]], Tensor]


class _Way:
    """What no draw reaches is computed when the inputs are others, the rest at every call."""

    def __init__(self, tape: Tape) -> None:
        self.tape, self.replays = tape, 0
        self._first, self.rest = hoisted(tape)
        self._once = recording(self._first, self._first.used).load()
        self.replay: Callable[..., Sequence[Any]] = recording(self.rest, self.rest.used).load()
        self._inputs: Sequence[Tensor] = ()
        self._all: list[Tensor] = []

    def given(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The inputs that the rest uses, and what was computed of all inputs once."""
        if len(inputs) != len(self._inputs) or any(a is not b for a, b in zip(inputs, self._inputs, strict=True)):
            self._all = [*inputs, *self._once(*[inputs[place] for place in self._first.used])]
            self._inputs = list(inputs)
        return [self._all[place] for place in self.rest.used]

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        self.replays += 1
        result: Tensor = self.replay(*self.given(inputs))[0]
        return result


@dataclass
class Repeated:
    """Replays what a function computes, with the random numbers that the function itself would draw.

    A kind of inputs (their shapes and types) is left to the function at its first call, and recorded at its second.
    A replay has to give what the function gives from the same random numbers, and leave the generators where it does;
    else, and where recording is refused, the function runs as it is from then on. The comparison is made again at the
    first call with ``new`` inputs, and once in `VERIFY` replays. What is replayed often is compiled where that pays.

    Args:
        calls: how many there will be, about.

    Example:
        >>> twice, x = Repeated(calls=100), torch.ones(2)
        >>> found = [twice([x], "noise", lambda given: given[0] + torch.rand(2)) for _ in range(4)]
        >>> twice.path, twice.reason
        ('graph', '')
    """

    calls: int
    path: str = "eager"
    reason: str = ""
    _ways: dict[Hashable, _Way] = field(default_factory=dict)
    _seen: dict[Hashable, int] = field(default_factory=dict)

    def __call__(self, inputs: Sequence[Tensor], kind: Hashable, function: Function, *, new: bool = False) -> Tensor:
        """``function(inputs)``; it uses these very tensors, and all else that it reads is told by ``kind``."""
        self.calls -= 1
        if self.reason:
            return function(inputs)
        key = (kind, *((value.shape, value.stride(), value.dtype, value.device) for value in inputs))
        way = self._ways.get(key)
        if way is not None and (new or way.replays % VERIFY == VERIFY - 1 or way.tape.stale):
            return self._compared(way, inputs, function)
        if way is not None:
            return way(inputs)
        self._seen[key] = self._seen.get(key, 0) + 1
        if self._seen[key] != 2 or self.calls < FEW or len(self._ways) == KINDS:
            return function(inputs)
        return self._recorded(key, inputs, function)

    def _recorded(self, key: Hashable, inputs: Sequence[Tensor], function: Function) -> Tensor:
        before = generators()
        try:
            tape = record(lambda: function(inputs), inputs, draws=True)
        except (RecordingRefused, *PROGRAM_ERRORS) as error:
            set_generators(before)
            self._refuse(str(error).splitlines()[0] if str(error) else type(error).__name__)
            return function(inputs)
        set_generators(before)
        plain = _Way(tape)
        result = self._compared(plain, inputs, function)
        if not self.reason:
            self._ways[key] = self._compiled(plain, inputs, result, before)
            self.path = "inductor" if self._ways[key] is not plain else "graph"
        return result

    def _compiled(self, plain: _Way, inputs: Sequence[Tensor], result: Tensor, before: dict[str, Any]) -> _Way:
        """What is compiled, where that pays and gives the ``result`` from the generators as they were ``before``."""
        if ABORTS or not worth_compiling(plain.rest, self.calls):
            return plain
        after, faster = generators(), _Way(plain.tape)
        try:
            faster.replay = compiled(plain.rest, plain.given(inputs))
            set_generators(before)
            same = _agree(faster(inputs), result) and torch.equal(torch.get_rng_state(), after["torch"])
            return faster if same else plain
        except CannotCompileError:
            return plain
        finally:
            set_generators(after)

    def _compared(self, way: _Way, inputs: Sequence[Tensor], function: Function) -> Tensor:
        """What the function gives; if the replay gives something else, it is given up."""
        before = generators()
        result = function(inputs)
        after = generators()
        set_generators(before)
        ours = way(inputs)
        if not torch.equal(torch.get_rng_state(), after["torch"]):
            self._refuse("it draws other random numbers than the program")
        elif way.tape.stale or not _agree(ours, result):
            self._refuse("it gives other numbers than the program")
        set_generators(after)
        return result

    def _refuse(self, reason: str) -> None:
        self.path, self.reason = "eager", reason
        self._ways.clear()


def _agree(ours: Tensor, theirs: Tensor) -> bool:
    """Equal up to what rounding leaves of sums of numbers as large as these."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    if not theirs.is_floating_point():
        return torch.equal(ours, theirs)
    scale = 1.0 + float(theirs.abs().nan_to_num(0.0, 0.0, 0.0).amax()) if theirs.numel() else 1.0
    bound = 100 * torch.finfo(theirs.dtype).eps * scale
    return bool(torch.isclose(ours, theirs, rtol=0.0, atol=bound, equal_nan=True).all())
