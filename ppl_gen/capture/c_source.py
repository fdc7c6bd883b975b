"""A tape in C: every operation a loop over the memory that torch would use, in one function of one array.

Intermediate results live in a workspace that the caller brings, so that several threads can evaluate the function at
once; constants are handed over as arrays, so that the text, and with it the compiled library, is the same for other
data of the same shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_unflatten

from ppl_gen.capture.c_loops import Operand, each
from ppl_gen.capture.c_memory import Memory, contiguous, plain
from ppl_gen.capture.c_operations import EXPRESSIONS, PRELUDE
from ppl_gen.capture.c_special import SPECIAL
from ppl_gen.capture.tape import Call, Constant, RecordingRefused, Slot, Tape

__all__ = ["CSource", "c_source"]

_SEEN = {"memory_format", "dtype", "layout", "device", "pin_memory", "non_blocking"}  # from the result
_POWERS = {2: "{0} * {0}", 3: "{0} * {0} * {0}", -1: "1.0 / {0}", 0.5: "sqrt({0})", 1: "{0}"}


@dataclass(frozen=True)
class CSource:
    """``evaluate(x, results, workspace, constants)`` as text, and what it has to be given.

    ``workspace`` are bytes, aligned to 64; ``results`` the shapes of what it writes, all in double precision.
    """

    text: str
    workspace: int
    constants: tuple[np.ndarray, ...]
    results: tuple[tuple[int, ...], ...]


def c_source(tape: Tape, u: Tensor) -> CSource:
    """The text of a tape of one array of doubles, such as ``u``.

    Raises:
        RecordingRefused: for operations that are not known in C, other numbers than float64, int64 and bool, and
            large products of matrices.
    """
    if tape.inputs != 1 or u.device.type != "cpu" or not u.is_contiguous():
        raise RecordingRefused("C: a function of other than one array that lies in one piece on a CPU")
    memory = Memory(tape, u)
    leaves = [leaf for call in tape.calls for leaf in call.inputs] + list(tape.results)
    read = {leaf for leaf in leaves if isinstance(leaf, Slot)}
    lines = [line for call in tape.calls for line in _lines(memory, read, call)]
    for place, leaf in enumerate(tape.results):
        shape = memory.shape(leaf)
        lines += _entries(memory, Operand(f"r[{place}]", 0, contiguous(shape)), "double", shape, [leaf], "{0}")
    head = "static void evaluate(const double *x, double *const *r, char *w, const char *const *k) {"
    body = "\n".join(f"  {line}" for line in ["(void)x, (void)w, (void)k;", *lines])
    shapes = tuple(memory.shape(leaf) for leaf in tape.results)
    return CSource(f"{PRELUDE}\n{head}\n{body}\n}}\n", memory.size, tuple(memory.constants), shapes)


def _lines(memory: Memory, read: set[Slot], call: Call) -> list[str]:
    slots = [slot for slot in call.outputs if slot is not None]
    if not call.writes and all(_is_view(memory, call, slot) for slot in slots):
        return []
    packet, dot, overload = call.operation.name().partition(".")
    name = packet.rstrip("_") + dot + overload
    given, kwargs = tree_unflatten(list(call.inputs), call.structure)
    if unknown := sorted(set(kwargs) - _SEEN):
        raise RecordingRefused(f"C: {name} with {', '.join(unknown)}")
    if name != "aten::log_sigmoid_forward" and not read.isdisjoint(slots[1:]):
        raise RecordingRefused(f"C: more than one result of {name}")
    out = slots[0]
    if call.writes and call.inputs[0] != out:
        raise RecordingRefused(f"C: {name} writes")
    if name in SPECIAL:
        return SPECIAL[name](memory, out, given)
    if name == "aten::bitwise_not" and memory.kind(out) != "uint8_t":
        raise RecordingRefused("C: the bits of whole numbers")
    expression, leaves = _expression(name, given)
    return _entries(memory, memory.operand(out), memory.kind(out), memory.shape(out), leaves, expression)


def _is_view(memory: Memory, call: Call, slot: Slot) -> bool:
    return memory.home(slot) in {memory.home(leaf) for leaf in call.inputs if isinstance(leaf, Slot)}


def _expression(name: str, given: Sequence[Any]) -> tuple[str, list[Any]]:
    """The expression of an operation, and the arguments that it takes."""
    if name == "aten::clamp":
        low, high = given[1], given[2] if len(given) > 2 else Constant(None)
        if plain(low) is not None and plain(high) is not None:
            return "{0} < {1} ? {1} : {0} > {2} ? {2} : {0}", [given[0], low, high]
        name, given = ("aten::clamp_max", [given[0], high]) if plain(low) is None else ("aten::clamp_min", given[:2])
    if name == "aten::pow.Tensor_Scalar" and plain(given[1]) in _POWERS:
        return _POWERS[plain(given[1])], [given[0]]
    if name == "aten::log_sigmoid_backward":
        given = given[:2]  # the third is scratch of torch's
    if name == "aten::softplus":
        given = [*given, *[Constant(1.0), Constant(20.0)][len(given) - 1 :]]
    if name not in EXPRESSIONS:
        raise RecordingRefused(f"C: {name} is not known")
    expression = EXPRESSIONS[name]
    if f"{{{len(given)}}}" in expression or any(isinstance(leaf, list | tuple) for leaf in given):
        raise RecordingRefused(f"C: {name} with such arguments")
    return expression, [leaf for place, leaf in enumerate(given) if f"{{{place}}}" in expression or place == 0]


def _entries(
    memory: Memory, out: Operand, kind: str, shape: Sequence[int], leaves: Sequence[Any], expression: str
) -> list[str]:
    """The expression for every entry."""
    kinds = [memory.kind(leaf) for leaf in leaves]
    operands = [memory.operand(leaf, shape) for leaf in leaves]
    names = [f"a{place}" for place in range(len(leaves))]

    def body(texts: Sequence[str]) -> str:
        loads = "".join(
            f"const {kind} {name} = {text}; " for kind, name, text in zip(kinds, names, texts[1:], strict=True)
        )
        return f"{{ {loads}{texts[0]} = ({kind})({expression.format(*names)}); }}"

    return each(shape, [out, *operands], body)
