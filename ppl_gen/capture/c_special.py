"""Operations of torch in C that are more than an expression for every entry: sums, products, pieces."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from ppl_gen.capture.c_loops import Operand, each, reduction
from ppl_gen.capture.c_memory import Memory, contiguous, literal, plain
from ppl_gen.capture.c_places import PLACES, Given, Special, copied
from ppl_gen.capture.tape import Constant, RecordingRefused, Slot

__all__ = ["SPECIAL"]

_MOST = 4_000_000  # multiplications in one product of matrices; from there on libraries are much quicker


def _reduced(memory: Memory, out: Slot, given: Given, kind: str) -> list[str]:
    kept, along, leading, source = _split(memory, out, given)
    return reduction(kept, along, [leading, source], kind, lambda text: f"(double){text}")


def _mean(memory: Memory, out: Slot, given: Given) -> list[str]:
    share = literal(math.prod(memory.shape(out)) / math.prod(memory.shape(given[0])))
    scaled = each(memory.shape(out), [memory.operand(out)], lambda texts: f"{texts[0]} *= {share};")
    return _reduced(memory, out, given, "sum") + scaled


def _norm(memory: Memory, out: Slot, given: Given) -> list[str]:
    """Of vectors along some axes: the sum of absolute values, or the root of the sum of squares."""
    order = plain(given[1]) if len(given) > 1 else 2
    if order not in (1, 2):
        raise RecordingRefused(f"C: a norm of order {order}")
    kept, along, leading, source = _split(memory, out, [given[0], *given[2:3]])
    if order == 1:
        return reduction(kept, along, [leading, source], "sum", "fabs({0})".format)
    lines = reduction(kept, along, [leading, source], "sum", "{0} * {0}".format)
    return lines + each(memory.shape(out), [memory.operand(out)], lambda texts: f"{texts[0]} = sqrt({texts[0]});")


def _logsumexp(memory: Memory, out: Slot, given: Given) -> list[str]:
    """The largest entry, the sum of what the others are to it, and its logarithm."""
    kept, along, leading, source = _split(memory, out, given)
    none = (0,) * len(along)
    sums = Operand(memory.scratch(math.prod(kept)), 0, contiguous(kept) + none)
    finite = "(isinf({0}) ? 0.0 : {0})".format
    lines = reduction(kept, along, [leading, source], "max", lambda text: text)
    lines += reduction(kept, along, [sums, leading, source], "sum", lambda top, text: f"exp({text} - {finite(top)})")
    result, total = (Operand(one.pointer, one.offset, (one.strides or ())[: len(kept)]) for one in (leading, sums))
    return lines + each(kept, [result, total], lambda texts: f"{texts[0]} = log({texts[1]}) + {finite(texts[0])};")


def _split(memory: Memory, out: Slot, given: Given) -> tuple[list[int], list[int], Operand, Operand]:
    """Sizes that stay and sizes summed over, and the result and its source with strides over these, in this order."""
    shape, source, result = memory.shape(given[0]), memory.operand(given[0]), memory.operand(out)
    assert source.strides is not None and result.strides is not None
    axes = _axes(given[1] if len(given) > 1 else None, len(shape))
    others = [d for d in range(len(shape)) if d not in axes]
    strides = result.strides if len(result.strides) == len(others) else tuple(result.strides[d] for d in others)
    turned = Operand(source.pointer, source.offset, tuple(source.strides[d] for d in [*others, *axes]))
    leading = Operand(result.pointer, result.offset, strides + (0,) * len(axes))
    return [shape[d] for d in others], [shape[d] for d in axes], leading, turned


def _axes(given: Any, dimensions: int) -> list[int]:
    """All of them where none are named."""
    if given is None or (isinstance(given, Constant) and given.value is None):
        return list(range(dimensions))
    axes = [int(plain(leaf)) % dimensions for leaf in (given if isinstance(given, list | tuple) else [given])]
    return sorted(axes) or list(range(dimensions))


def _product(memory: Memory, out: Slot, given: Given) -> list[str]:
    """A contraction: batch, rows and columns stay."""
    shape, other = memory.shape(given[0]), memory.shape(given[1])
    columns = other[-1:] if len(other) > 1 else ()
    if math.prod(shape) * math.prod(columns) > _MOST:
        raise RecordingRefused("C: a large product of matrices")
    left, right, result = memory.operand(given[0]), memory.operand(given[1]), memory.operand(out)
    assert left.strides is not None and right.strides is not None and result.strides is not None
    none, rows = (0,) * len(columns), (0,) if len(shape) > 1 else ()
    batch = right.strides[: max(len(shape) - 2, 0)]
    through, beside = (right.strides[-2], right.strides[-1:]) if columns else (right.strides[-1], ())
    factors = [
        Operand(result.pointer, result.offset, (*result.strides, 0)),
        Operand(left.pointer, left.offset, (*left.strides[:-1], *none, left.strides[-1])),
        Operand(right.pointer, right.offset, (*batch, *rows, *beside, through)),
    ]
    return reduction([*shape[:-1], *columns], [shape[-1]], factors, "sum", lambda a, b: f"{a} * {b}")


def _cross_entropy(memory: Memory, out: Slot, given: Given) -> list[str]:
    """Of zeros and ones, from logits; the last argument is 0 for every entry, 1 for the mean, 2 for the sum."""
    if any(not isinstance(leaf, Constant) or leaf.value is not None for leaf in given[2:4]):
        raise RecordingRefused("C: weights of a cross entropy")
    shape = memory.shape(given[0])
    how = int(plain(given[4])) if len(given) > 4 else 1
    operands = [memory.operand(leaf, shape) for leaf in given[:2]]

    def term(logit: str, target: str) -> str:
        return f"(1.0 - {target}) * {logit} + ppl_log1p(exp(-fabs({logit}))) + ({logit} < 0.0 ? -{logit} : 0.0)"

    if how == 0:
        return each(shape, [memory.operand(out), *operands], lambda texts: f"{texts[0]} = {term(*texts[1:])};")
    result = Operand(memory.operand(out).pointer, memory.operand(out).offset, (0,) * len(shape))
    lines = reduction([], shape, [result, *operands], "sum", term)
    share = literal(1.0 / math.prod(shape))
    return lines + ([] if how == 2 else each([], [memory.operand(out)], lambda texts: f"{texts[0]} *= {share};"))


def _filled(memory: Memory, out: Slot, value: str) -> list[str]:
    return each(memory.shape(out), [memory.operand(out)], lambda texts: f"{texts[0]} = {value};")


def _select_backward(memory: Memory, out: Slot, given: Given) -> list[str]:
    shape, whole = memory.shape(out), memory.operand(out)
    axis = int(plain(given[2])) % len(shape)
    strides = whole.strides or ()
    offset = whole.offset + int(plain(given[3])) % shape[axis] * strides[axis]
    part = Operand(whole.pointer, offset, strides[:axis] + strides[axis + 1 :])
    return _filled(memory, out, "0.0") + _pasted(memory, part, given[0])


def _slice_backward(memory: Memory, out: Slot, given: Given) -> list[str]:
    shape, whole = memory.shape(out), memory.operand(out)
    axis, start, step = int(plain(given[2])) % len(shape), int(plain(given[3])), int(plain(given[5]))
    start = max(start + shape[axis] if start < 0 else start, 0)
    strides = list(whole.strides or ())
    offset = whole.offset + start * strides[axis]
    strides[axis] *= step
    return _filled(memory, out, "0.0") + _pasted(memory, Operand(whole.pointer, offset, tuple(strides)), given[0])


def _pasted(memory: Memory, part: Operand, leaf: Any) -> list[str]:
    shape = memory.shape(leaf)
    return copied(part, memory.operand(leaf, shape), shape)


def _padded(memory: Memory, out: Slot, given: Given) -> list[str]:
    """Pairs of widths from the last axis on; negative ones cut."""
    widths = [int(plain(leaf)) for leaf in given[1]]
    value = literal(plain(given[2])) if len(given) > 2 else "0.0"
    whole, source, shape = memory.operand(out), memory.operand(given[0]), list(memory.shape(given[0]))
    assert whole.strides is not None and source.strides is not None
    into, out_of = whole.offset, source.offset
    for axis, (low, high) in enumerate(zip(widths[::2], widths[1::2], strict=True), 1):
        into += max(low, 0) * whole.strides[-axis]
        out_of += max(-low, 0) * source.strides[-axis]
        shape[-axis] += min(low, 0) + min(high, 0)
    target = Operand(whole.pointer, into, whole.strides)
    return _filled(memory, out, value) + copied(target, Operand(source.pointer, out_of, source.strides), shape)


def _joined(memory: Memory, out: Slot, given: Given, stacked: bool) -> list[str]:
    whole, lines = memory.operand(out), []
    axis = int(plain(given[1])) % len(memory.shape(out)) if len(given) > 1 else 0
    strides, offset = whole.strides or (), whole.offset
    inner = strides[:axis] + strides[axis + 1 :] if stacked else strides
    for leaf in given[0]:
        lines += _pasted(memory, Operand(whole.pointer, offset, inner), leaf)
        offset += strides[axis] * (1 if stacked else memory.shape(leaf)[axis])
    return lines


def _flipped(memory: Memory, out: Slot, given: Given) -> list[str]:
    source, shape = memory.operand(given[0]), memory.shape(given[0])
    assert source.strides is not None
    axes = _axes(given[1], len(shape))
    offset = source.offset + sum((shape[d] - 1) * source.strides[d] for d in axes)
    strides = tuple(-stride if d in axes else stride for d, stride in enumerate(source.strides))
    return copied(memory.operand(out), Operand(source.pointer, offset, strides), shape)


def _running(memory: Memory, out: Slot, given: Given, sign: str) -> list[str]:
    """Sums or products so far, along one axis: the first entry, then every other one from the one before."""
    shape, whole, source = memory.shape(out), memory.operand(out), memory.operand(given[0], memory.shape(out))
    assert whole.strides is not None and source.strides is not None
    axis = int(plain(given[1])) % len(shape)
    lines = []
    step, reach = whole.strides[axis], source.strides[axis]
    beside, along = _without(whole.strides, axis), _without(source.strides, axis)
    for place in range(shape[axis]):
        to = Operand(whole.pointer, whole.offset + place * step, beside)
        of = Operand(source.pointer, source.offset + place * reach, along)
        before = Operand(to.pointer, to.offset - step, beside)
        operands = [to, of] if place == 0 else [to, of, before]

        def body(texts: Sequence[str]) -> str:
            return f"{texts[0]} = {f' {sign} '.join(texts[1:])};"

        lines += each(_without(shape, axis), operands, body)
    return lines


def _without(entries: Sequence[int], axis: int) -> tuple[int, ...]:
    return (*entries[:axis], *entries[axis + 1 :])


SPECIAL: dict[str, Special] = {
    "aten::sum": functools.partial(_reduced, kind="sum"),
    "aten::sum.dim_IntList": functools.partial(_reduced, kind="sum"),
    "aten::mean": _mean,
    "aten::mean.dim": _mean,
    "aten::amax": functools.partial(_reduced, kind="max"),
    "aten::max": functools.partial(_reduced, kind="max"),
    "aten::max.dim": functools.partial(_reduced, kind="max"),
    "aten::logsumexp": _logsumexp,
    "aten::linalg_vector_norm": _norm,
    "aten::mm": _product,
    "aten::mv": _product,
    "aten::bmm": _product,
    "aten::dot": _product,
    "aten::binary_cross_entropy_with_logits": _cross_entropy,
    "aten::select_backward": _select_backward,
    "aten::slice_backward": _slice_backward,
    "aten::constant_pad_nd": _padded,
    "aten::cat": functools.partial(_joined, stacked=False),
    "aten::stack": functools.partial(_joined, stacked=True),
    "aten::flip": _flipped,
    "aten::cumsum": functools.partial(_running, sign="+"),
    "aten::cumprod": functools.partial(_running, sign="*"),
    **PLACES,
}
