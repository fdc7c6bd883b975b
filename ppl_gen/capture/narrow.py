"""Expansions are put off until they are needed: what few numbers give is computed once, and then spread over many.

A scale that all rows share is expanded to the rows before its logarithm is taken, by the program or by autograd: as
many logarithms as rows. On a tape it is seen that one would do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ppl_gen.capture.tape import Call, Constant, Leaf, Slot, Tape

__all__ = ["narrowed"]

_aten = torch.ops.aten
_EXPANSIONS = {_aten.expand.default}
_VIEWS = {
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.unsqueeze.default,
    _aten.squeeze.default,
    _aten.squeeze.dim,
    _aten.squeeze.dims,
    _aten.slice.Tensor,
}
_TURNS = {_aten.transpose.int, _aten.permute.default}


def narrowed(tape: Tape, inputs: Sequence[Tensor]) -> Tape:
    """The same function, with operations on single entries before these are expanded, and not after it.

    ``inputs`` are such as the tape is replayed on; what the operations give is compared at them.

    >>> from ppl_gen.capture.recorder import record
    >>> scale = torch.tensor([2.0])
    >>> tape = narrowed(record(lambda: scale.expand(1000).log() * torch.arange(1000.0), [scale]), [scale])
    >>> [call.operation.name() for call in tape.calls], tape.numbers
    (['aten::log', 'aten::mul.Tensor'], 1001)
    """
    return _Narrowing(tape, inputs).tape()


class _Narrowing:
    """Goes through a tape once, with every tensor of it and of the new one at hand."""

    def __init__(self, tape: Tape, inputs: Sequence[Tensor]) -> None:
        self.old = tape
        self.whole: dict[Slot, Tensor] = {Slot(place): value.detach() for place, value in enumerate(inputs)}
        self.narrow: dict[Slot, Tensor] = dict(self.whole)  # of the slots of the new tape
        self.stands: dict[Slot, Slot] = {}  # for the slots of expansions: what was expanded
        self.expanded: dict[Slot, Slot] = {}
        self.calls: list[Call] = []
        self.following = 1 + max((s.number for call in tape.calls for s in call.outputs if s is not None), default=0)
        self.following = max(self.following, tape.inputs)

    def tape(self) -> Tape:
        with torch.no_grad():
            for call in self.old.calls:
                self._learn(call)
            pinned = self._pinned()
            for call in self.old.calls:
                if not self._free(call, pinned) or not (
                    self._put_off(call) or self._seen_narrow(call) or self._narrower(call)
                ):
                    self._keep(call)
            results = tuple(self._full(leaf) for leaf in self.old.results)
            made = self._numbers()
        old = self.old
        if (made, len(self.calls)) >= (old.numbers, len(old.calls)):
            return old
        return Tape(old.inputs, tuple(self.calls), results, old.structure, old.outside, old.large, made)

    def _numbers(self) -> int:
        """How many numbers the new tape makes; views make none."""
        values = {Slot(place): self.whole[Slot(place)] for place in range(self.old.inputs)}
        total = 0
        for call in self.calls:
            seen = {_memory(values[leaf]) for leaf in call.inputs if isinstance(leaf, Slot)}
            for slot, value in zip(call.outputs, self._made(call, values), strict=True):
                if slot is not None:
                    values[slot] = value
                    total += 0 if _memory(value) in seen else value.numel()
        return total

    def _learn(self, call: Call) -> None:
        """What the old tape computes."""
        for slot, value in zip(call.outputs, self._made(call, self.whole), strict=True):
            if slot is not None:
                self.whole[slot] = value

    def _made(self, call: Call, values: dict[Slot, Tensor]) -> list[Any]:
        leaves = [values[leaf] if isinstance(leaf, Slot) else leaf.value for leaf in call.inputs]
        args, kwargs = tree_unflatten(leaves, call.structure)
        return tree_leaves(call.operation(*args, **kwargs))

    def _pinned(self) -> set[int]:
        """Memory that is written into: it has to be there, whole."""
        return {
            _memory(self.whole[leaf])
            for call in self.old.calls
            if call.writes
            for leaf in call.inputs
            if isinstance(leaf, Slot)
        }

    def _free(self, call: Call, pinned: set[int]) -> bool:
        slots = [leaf for leaf in (*call.inputs, *call.outputs) if isinstance(leaf, Slot)]
        return len(call.outputs) == 1 and all(_memory(self.whole[slot]) not in pinned for slot in slots)

    def _put_off(self, call: Call) -> bool:
        """Whether it is an expansion that whoever needs it can make."""
        given, made = call.inputs[0], call.outputs[0]
        if call.operation not in _EXPANSIONS or not isinstance(given, Slot) or made is None:
            return False
        self.stands[made] = self.stands.get(given, given)
        return True

    def _seen_narrow(self, call: Call) -> bool:
        """Whether it is another view of an expansion, which is an expansion of a view."""
        given, made = call.inputs[0], call.outputs[0]
        if call.operation not in _VIEWS | _TURNS or not isinstance(given, Slot) or made is None:
            return False
        slot = self.stands.get(given, given)
        before, after, value = self.whole[given], self.whole[made], self.narrow[slot]
        if value.shape == before.shape or after.numel() == 0:
            return False
        shape = [1] * (before.dim() - value.dim()) + list(value.shape)
        if call.operation in _TURNS or (call.operation is _aten.slice.Tensor and not _across(call, before, shape)):
            slot = slot if len(shape) == value.dim() else self._call(_aten.view.default, slot, shape)
            places = [leaf.value if isinstance(leaf, Constant) else None for leaf in call.inputs[1:]]
            _, *rest = tree_unflatten([None, *places], call.structure)[0]
            self.stands[made] = self._call(call.operation, slot, *rest)
            return True
        seen = _viewed(call, before, after, shape)
        if seen is None:
            return False
        self.stands[made] = slot if seen == list(value.shape) else self._call(_aten.view.default, slot, seen)
        return True

    def _narrower(self, call: Call) -> bool:
        """Whether it is done entry by entry, and was done on the entries that are there before expansions."""
        if torch.Tag.pointwise not in call.operation.tags or call.writes or call.draws:
            return False
        inputs = tuple(self._entries(leaf) for leaf in call.inputs)
        if not any(self._is_narrow(new, old) for new, old in zip(inputs, call.inputs, strict=True)):
            return False
        slot = call.outputs[0]
        assert slot is not None
        short = Call(call.operation, inputs, call.structure, call.outputs)
        (value,) = self._made(short, self.narrow)
        whole = self.whole[slot]
        # A number is weaker than a tensor where dtypes meet: then the expansion mattered.
        if value.dtype != whole.dtype or not _same(value, whole):
            return False
        self.calls.append(short)
        self.narrow[slot] = value
        return True

    def _keep(self, call: Call) -> None:
        inputs = tuple(self._full(leaf) for leaf in call.inputs)
        self.calls.append(Call(call.operation, inputs, call.structure, call.outputs))
        for slot in call.outputs:
            if slot is not None:
                self.narrow[slot] = self.whole[slot]

    def _is_narrow(self, new: Leaf, old: Leaf) -> bool:
        if isinstance(old, Slot) and isinstance(new, Slot):
            return self.narrow[new].shape != self.whole[old].shape
        return new is not old

    def _entries(self, leaf: Leaf) -> Leaf:
        """The leaf without its expansion."""
        if isinstance(leaf, Slot):
            return self.stands.get(leaf, leaf)
        value = leaf.value
        if not isinstance(value, Tensor) or value.numel() < 2 or 0 not in value.stride():
            return leaf
        return Constant(value[tuple(slice(1) if step == 0 else slice(None) for step in value.stride())])

    def _full(self, leaf: Leaf) -> Leaf:
        """The leaf in its whole size."""
        if not isinstance(leaf, Slot):
            return leaf
        slot, whole = self.stands.get(leaf, leaf), self.whole[leaf]
        if self.narrow[slot].shape == whole.shape:
            return slot
        if leaf not in self.expanded:
            made = self._call(_aten.expand.default, slot, list(whole.shape))
            if whole.stride() != self.narrow[made].stride():  # somebody may want another view of it
                made = self._call(_aten.clone.default, made, memory_format=torch.contiguous_format)
            self.expanded[leaf] = made
        return self.expanded[leaf]

    def _call(self, operation: Any, slot: Slot, *args: Any, **kwargs: Any) -> Slot:
        """An operation that the old tape did not have; the slot of its result."""
        leaves, structure = tree_flatten(((self.narrow[slot], *args), kwargs))
        made = Slot(self.following)
        self.following += 1
        self.calls.append(Call(operation, (slot, *map(Constant, leaves[1:])), structure, (made,)))
        self.narrow[made] = operation(self.narrow[slot], *args, **kwargs)
        return made


def _across(call: Call, before: Tensor, shape: Sequence[int]) -> bool:
    """Whether a slice takes some of the places over which one entry is spread."""
    dim = int(call.inputs[1].value) % before.dim() if len(call.inputs) > 1 else 0  # type: ignore[union-attr]
    return bool(shape[dim] == 1 != before.shape[dim])


def _viewed(call: Call, before: Tensor, after: Tensor, shape: Sequence[int]) -> list[int] | None:
    """The shape that expands to ``after``, of what has ``shape`` and expands to ``before``; None where it may not."""
    if call.operation is _aten.slice.Tensor:
        return list(shape)
    if [size for size in before.shape if size != 1] != [size for size in after.shape if size != 1]:
        return None
    sizes = iter([short for short, size in zip(shape, before.shape, strict=True) if size != 1])
    return [1 if size == 1 else next(sizes) for size in after.shape]


def _memory(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


def _same(value: Tensor, whole: Tensor) -> bool:
    """Up to rounding, which differs with the number of entries that are computed together."""
    if not value.is_floating_point():
        return torch.equal(value.expand(whole.shape), whole)
    close = 1e2 * torch.finfo(value.dtype).eps
    return bool(torch.isclose(value.expand(whole.shape), whole, rtol=close, atol=0.0, equal_nan=True).all())
