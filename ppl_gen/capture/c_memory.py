"""Where the tensors of a tape lie when it runs in C: in a workspace, with the strides that torch gave them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl_gen.capture.arrays import values_at
from ppl_gen.capture.c_loops import Operand
from ppl_gen.capture.tape import RecordingRefused, Slot, Tape

__all__ = ["Memory", "contiguous", "literal", "plain"]

_TYPES = {torch.float64: "double", torch.int64: "int64_t", torch.bool: "uint8_t"}
_ALIGNED = 64  # bytes


class Memory:
    """Operands for the leaves of a tape of one vector, and the constants that it needs as arrays.

    A storage of torch's is a place in the workspace, so that views are the same numbers under other strides; a place is
    used again after the last operation on what lay there. ``size`` is that of the workspace in bytes.
    """

    def __init__(self, tape: Tape, u: Tensor) -> None:
        self.tape, self.values = tape, values_at(tape, u)
        self.constants: list[np.ndarray] = []
        self._numbers: dict[int, int] = {}  # of constants, by identity
        self._widened: dict[int, tuple[Tensor, Tensor]] = {}
        self._places, self._end = self._planned()
        self._scratch = 0

    @property
    def size(self) -> int:
        return max(self._end + self._scratch, _ALIGNED)

    def scratch(self, numbers: int) -> str:
        """Room for one operation alone."""
        self._scratch = max(self._scratch, 8 * numbers)
        return f"((double *)(w + {self._end}))"

    def home(self, slot: Slot) -> int:
        """Which storage a tensor lies in."""
        value = self.values[slot]
        if value.numel() == 0:
            raise RecordingRefused("C: a tensor without entries")
        return value.untyped_storage().data_ptr()

    def shape(self, leaf: Any) -> tuple[int, ...]:
        value = self.values[leaf] if isinstance(leaf, Slot) else leaf.value
        return tuple(value.shape) if isinstance(value, Tensor) else ()

    def kind(self, leaf: Any) -> str:
        """The type that C reads it in."""
        value = self.values[leaf] if isinstance(leaf, Slot) else leaf.value
        if isinstance(value, Tensor):
            return _TYPES.get(value.dtype, "double" if value.is_floating_point() else "int64_t")
        return "int64_t" if isinstance(value, bool | int) else "double"

    def operand(self, leaf: Any, shape: Sequence[int] | None = None) -> Operand:
        """A leaf, spread over a shape."""
        if isinstance(leaf, Slot):
            value = self.values[leaf]
            place = self._places[self.home(leaf)]
            pointer = "x" if place < 0 else f"(({_TYPES[value.dtype]} *)(w + {place}))"
            operand = Operand(pointer, int(value.storage_offset()), tuple(value.stride()))
            return _spread(operand, tuple(value.shape), shape)
        value = leaf.value
        if not isinstance(value, Tensor):
            return Operand(literal(value))
        if value.is_complex():
            raise RecordingRefused(f"C: a constant of {value.dtype}")
        if value.dtype not in _TYPES:
            value = self._wide(value)
        if value.numel() == 1 and shape is not None:
            return Operand(literal(value.item()))
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self.constants)
            self.constants.append(np.array(value.detach().numpy(), order="C"))
        pointer = f"((const {_TYPES[value.dtype]} *)k[{self._numbers[id(value)]}])"
        return _spread(Operand(pointer, 0, contiguous(value.shape)), tuple(value.shape), shape)

    def _wide(self, value: Tensor) -> Tensor:
        """A constant of fewer bits, as it takes part in operations that give doubles; one for all of its uses."""
        if id(value) not in self._widened:
            wide = value.to(torch.float64 if value.is_floating_point() else torch.int64)
            self._widened[id(value)] = (value, wide)
        return self._widened[id(value)][1]

    def _planned(self) -> tuple[dict[int, int], int]:
        calls = self.tape.calls
        last: dict[int, int] = {}
        for number, call in enumerate(calls):
            last |= {self.home(leaf): number for leaf in (*call.inputs, *call.outputs) if isinstance(leaf, Slot)}
        last |= {self.home(leaf): len(calls) for leaf in self.tape.results if isinstance(leaf, Slot)}
        places, end = {self.home(Slot(0)): -1}, 0
        free: dict[int, list[int]] = {}
        held: dict[int, int] = {}
        for number, call in enumerate(calls):
            for slot in call.outputs:
                if slot is None or (home := self.home(slot)) in places:
                    continue
                size = -(-self.values[slot].untyped_storage().nbytes() // _ALIGNED) * _ALIGNED
                if free.get(size):
                    places[home] = free[size].pop()
                else:
                    places[home], end = end, end + size
                held[home] = size
            for home in [home for home in held if last[home] <= number]:
                free.setdefault(held.pop(home), []).append(places[home])
        return places, end


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of an array that lies row by row."""
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))


def literal(value: Any) -> str:
    """A number as C reads it, to the last bit."""
    if isinstance(value, bool | int):
        return str(int(value))
    if not isinstance(value, float):
        raise RecordingRefused(f"C: {value!r} as an argument")
    if math.isnan(value):
        return "NAN"
    return value.hex() if math.isfinite(value) else ("INFINITY" if value > 0 else "(-INFINITY)")


def plain(leaf: Any) -> Any:
    """The value of an argument that is a constant.

    Raises:
        RecordingRefused: where it is computed.
    """
    if isinstance(leaf, Slot):
        raise RecordingRefused("C: a computed argument where a number is expected")
    return leaf.value.item() if isinstance(leaf.value, Tensor) else leaf.value


def _spread(operand: Operand, shape: tuple[int, ...], over: Sequence[int] | None) -> Operand:
    if over is None:
        return operand
    assert operand.strides is not None
    ahead = len(over) - len(shape)
    strides = [0 if size == 1 else stride for size, stride in zip(shape, operand.strides, strict=True)]
    return Operand(operand.pointer, operand.offset, (*[0] * ahead, *strides))
