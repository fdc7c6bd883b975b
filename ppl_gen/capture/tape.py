"""A tape: the tensor operations of a function in order, and what it read from outside.

A Pyro program spends most of a small step in effect handlers and distribution objects. The tape
(`ppl_gen.capture.recorder` makes it) keeps only the operations that depend on the inputs or on random draws, gradients
included; everything else becomes a constant. It is replayed as a straight line of Python (`ppl_gen.capture.replay`) or
compiled (`ppl_gen.capture.compiled`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec

__all__ = ["WRITES_STATISTICS", "Call", "Constant", "Leaf", "Outside", "RecordingRefused", "Slot", "Tape"]

_aten = torch.ops.aten
#: These write running averages although their schema does not say so.
WRITES_STATISTICS = {_aten.native_batch_norm, _aten.cudnn_batch_norm, _aten.miopen_batch_norm}
_SMALL = 10_000  # numbers


class RecordingRefused(RuntimeError):
    """The function cannot be replayed from a tape; the message says which operation stands in the way."""


@dataclass(frozen=True)
class Slot:
    """The place of a tensor that differs from replay to replay."""

    number: int


@dataclass(frozen=True)
class Constant:
    """What is the same in every replay: a tensor, a number, a dtype ..."""

    value: Any


Leaf = Slot | Constant


@dataclass(frozen=True)
class Call:
    """One operation: its arguments, flattened, and the slots of its results (None for those that are no tensors)."""

    operation: Any
    inputs: tuple[Leaf, ...]
    structure: TreeSpec
    outputs: tuple[Slot | None, ...]

    @property
    def draws(self) -> bool:
        """Whether it draws random numbers."""
        return torch.Tag.nondeterministic_seeded in self.operation.tags

    @property
    def writes(self) -> bool:
        """Whether it changes one of its arguments."""
        return bool(self.operation._schema.is_mutable) or self.operation.overloadpacket in WRITES_STATISTICS


class Outside:
    """A tensor that a recording has read, and how it was then: numbers of small ones, versions of others."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor, _version(tensor)
        self.numbers = tensor.detach().clone() if tensor.numel() <= _SMALL else None

    @property
    def changed(self) -> bool:
        """Whether it was written into, and holds other numbers where these are known."""
        now = _version(self.tensor)
        if now == self.version:
            return False
        if self.numbers is None or not torch.equal(self.tensor, self.numbers):
            return True
        self.version = now
        return False


@dataclass(frozen=True)
class Tape:
    """The operations of a function in order; the first ``inputs`` slots are its inputs.

    ``results`` are the leaves of what it returned, of the tree ``structure``; ``large`` the bytes of large tensors that
    the operations make, which each go through memory, ``numbers`` how many numbers they make in all. ``outside`` are
    the tensors that it read and that were neither inputs nor made inside, frozen as they were.
    """

    inputs: int
    calls: tuple[Call, ...]
    results: tuple[Leaf, ...]
    structure: TreeSpec
    outside: tuple[Outside, ...]
    large: int = 0
    numbers: int = 0

    @property
    def stale(self) -> bool:
        """Whether a tensor whose numbers were frozen was written into since."""
        return any(outside.changed for outside in self.outside)

    @functools.cached_property
    def used(self) -> tuple[int, ...]:
        """The places of the inputs that take part."""
        leaves = [leaf for call in self.calls for leaf in call.inputs] + list(self.results)
        read = {leaf.number for leaf in leaves if isinstance(leaf, Slot)}
        return tuple(place for place in range(self.inputs) if place in read)

    @property
    def draws(self) -> bool:
        """Whether a replay draws random numbers."""
        return any(call.draws for call in self.calls)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
