"""Entries at constant places along axes, in C: taken, written, gathered, added up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl_gen.capture.c_loops import Operand, each
from ppl_gen.capture.c_memory import Memory, plain
from ppl_gen.capture.tape import Constant, RecordingRefused, Slot

__all__ = ["PLACES", "Given", "Special", "copied"]

Given = Sequence[Any]  # the arguments of a call, its leaves in their lists
Special = Callable[[Memory, Slot, Given], list[str]]


def copied(target: Operand, source: Operand, shape: Sequence[int]) -> list[str]:
    """Entry by entry."""
    return each(shape, [target, source], lambda texts: f"{texts[0]} = {texts[1]};")


def _taken(memory: Memory, out: Slot, given: Given) -> list[str]:
    """``a[..., places, ...]``: entries at constant places along neighbouring axes."""
    source = memory.operand(given[0])
    first, steps, places = _places(memory, given[0], given[1])
    shape, spread = memory.shape(out), memory.shape(places[0])
    for leaf in places:
        spread = np.broadcast_shapes(spread, memory.shape(leaf))
    rest = _of_rest(source, first, len(places), len(spread))
    at = _indices(memory, places, first, spread, len(shape))
    operands = [memory.operand(out), rest, *at]

    def body(texts: Sequence[str]) -> str:
        return f"{texts[0]} = (&{texts[1]})[{_step(texts[2:], steps)}];"

    return each(shape, operands, body)


def _put(memory: Memory, out: Slot, given: Given) -> list[str]:
    """The same with values written there, or added."""
    adds = len(given) > 3 and bool(plain(given[3]))
    whole = memory.operand(out)
    first, steps, places = _places(memory, given[0], given[1])
    spread = memory.shape(places[0])
    for leaf in places:
        spread = np.broadcast_shapes(spread, memory.shape(leaf))
    given_shape = memory.shape(given[0])
    shape = (*given_shape[:first], *spread, *given_shape[first + len(places) :])
    target = _of_rest(whole, first, len(places), len(spread))
    operands = [target, memory.operand(given[2], shape), *_indices(memory, places, first, spread, len(shape))]

    def body(texts: Sequence[str]) -> str:
        return f"(&{texts[0]})[{_step(texts[2:], steps)}] {'+' if adds else ''}= {texts[1]};"

    return copied(whole, memory.operand(given[0], given_shape), given_shape) + _in_order(each(shape, operands, body))


def _places(memory: Memory, source: Any, given: Given) -> tuple[int, list[tuple[int, int]], list[Constant]]:
    """The first axis that is indexed, stride and size of all that are, and the places."""
    known = [d for d, leaf in enumerate(given) if not (isinstance(leaf, Constant) and leaf.value is None)]
    shape, strides = memory.shape(source), memory.operand(source).strides or ()
    places = [given[d] for d in known]
    if known != list(range(known[0], known[0] + len(known))):
        raise RecordingRefused("C: places along axes that are not neighbours")
    for leaf in places:
        if isinstance(leaf, Slot) or not isinstance(leaf.value, Tensor) or leaf.value.dtype != torch.int64:
            raise RecordingRefused("C: places that are computed, or a mask of them")
    return known[0], [(strides[d], shape[d]) for d in known], places


def _of_rest(operand: Operand, first: int, indexed: int, spread: int) -> Operand:
    strides = operand.strides or ()
    return Operand(operand.pointer, operand.offset, (*strides[:first], *[0] * spread, *strides[first + indexed :]))


def _indices(
    memory: Memory, places: Sequence[Constant], first: int, spread: tuple[int, ...], dimensions: int
) -> list[Operand]:
    found = []
    for leaf in places:
        operand = memory.operand(leaf, spread)
        if operand.strides is not None:
            after = dimensions - first - len(spread)
            operand = Operand(operand.pointer, operand.offset, (*[0] * first, *operand.strides, *[0] * after))
        found.append(operand)
    return found


def _step(texts: Sequence[str], steps: Sequence[tuple[int, int]]) -> str:
    """How far it is to a place; negative ones count from the end."""
    return " + ".join(
        f"({text} < 0 ? {text} + {size} : {text}) * {stride}" for text, (stride, size) in zip(texts, steps, strict=True)
    )


def _gathered(memory: Memory, out: Slot, given: Given) -> list[str]:
    shape, axis, step = _along(memory, given)
    source = memory.operand(given[0])
    strides = list(source.strides or ())
    strides[axis] = 0
    operands = [memory.operand(out), Operand(source.pointer, source.offset, tuple(strides))]
    operands.append(memory.operand(given[2], shape))
    return each(shape, operands, lambda texts: f"{texts[0]} = (&{texts[1]})[{_step(texts[2:], [step])}];")


def _scattered(memory: Memory, out: Slot, given: Given) -> list[str]:
    shape, axis, step = _along(memory, given)
    whole, before = memory.operand(out), memory.shape(given[0])
    strides = list(whole.strides or ())
    strides[axis] = 0
    values = memory.operand(given[3])
    operands = [Operand(whole.pointer, whole.offset, tuple(strides)), values, memory.operand(given[2], shape)]
    added = each(shape, operands, lambda texts: f"(&{texts[0]})[{_step(texts[2:], [step])}] += {texts[1]};")
    return copied(whole, memory.operand(given[0], before), before) + _in_order(added)


def _along(memory: Memory, given: Given) -> tuple[tuple[int, ...], int, tuple[int, int]]:
    if isinstance(given[2], Slot):
        raise RecordingRefused("C: places that are computed")
    shape = memory.shape(given[0])
    axis = int(plain(given[1])) % len(shape)
    return memory.shape(given[2]), axis, ((memory.operand(given[0]).strides or ())[axis], shape[axis])


def _in_order(lines: list[str]) -> list[str]:
    """Without the promise that no entry is written twice."""
    return [line for line in lines if not line.startswith("#pragma")]


PLACES: dict[str, Special] = {
    "aten::index.Tensor": _taken,
    "aten::index_put": _put,
    "aten::gather": _gathered,
    "aten::scatter_add": _scattered,
}
