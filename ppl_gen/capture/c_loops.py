"""Loops of C over arrays with strides: entry by entry, and sums and maxima along some dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["Operand", "each", "reduction"]

_SHORT, _WIDE = 16, 8  # so few terms are added up beside each other, for so many sums at once
_INDENT = "  "


@dataclass(frozen=True)
class Operand:
    """An array as C reads it: ``pointer[offset + sum_k i_k strides_k]``, or a number where there are no strides."""

    pointer: str
    offset: int = 0
    strides: tuple[int, ...] | None = None

    def at(self, names: Sequence[str]) -> str:
        if self.strides is None:
            return self.pointer
        terms = [
            name if stride == 1 else f"{name} * {stride}"
            for name, stride in zip(names, self.strides, strict=True)
            if stride
        ]
        return f"{self.pointer}[{' + '.join([*terms, *([str(self.offset)] if self.offset or not terms else [])])}]"

    def along(self, order: Sequence[int], groups: Sequence[Sequence[int]]) -> Operand:
        """Over merged dimensions: the stride of each group is that of its last one."""
        if self.strides is None:
            return self
        return Operand(self.pointer, self.offset, tuple(self.strides[order[group[-1]]] for group in groups))


Body = Callable[[Sequence[str]], str]  # from the operands' texts to a statement


def each(sizes: Sequence[int], operands: Sequence[Operand], body: Body) -> list[str]:
    """A statement for every entry; the first operand is written, and decides the order of the loops."""
    sizes, operands = _merged(sizes, operands)
    names = [f"i{place}" for place in range(len(sizes))]
    statement = body([operand.at(names) for operand in operands])
    return _nest(sizes, names, [statement], "#pragma omp simd" if sizes else "")


def reduction(
    kept: Sequence[int], reduced: Sequence[int], operands: Sequence[Operand], kind: str, term: Callable[..., str]
) -> list[str]:
    """The sum or maximum of ``term`` over the last dimensions; the first operand, over the kept ones, is the result.

    ``operands`` have strides over the kept and then the reduced dimensions, the first one zeros over the latter.
    """
    start, step = _KINDS[kind]
    if any(size == 0 for size in reduced):
        return each(kept, [_only(operands[0], len(kept))], lambda texts: f"{texts[0]} = {start};")
    split = len(kept)
    kept, outer = _merged(kept, [_part(operand, slice(split)) for operand in operands])
    reduced, inner = _merged(reduced, [_part(operand, slice(split, None)) for operand in operands[::-1]])
    joined = [_joined(one, other) for one, other in zip(outer, inner[::-1], strict=True)]
    names = [f"i{place}" for place in range(len(kept) + len(reduced))]
    first, last = names[: len(kept)], names[len(kept) :]
    out = outer[0].at(first)
    value = term(*[operand.at(names) for operand in joined[1:]])
    main = joined[-1].strides
    beside = bool(kept) and kept[-1] >= _WIDE and main is not None
    if beside and main is not None and (math.prod(reduced) <= _SHORT or main[len(kept) - 1] == 1):
        loop = [*kept[:-1], *reduced, kept[-1]]
        order = [*first[:-1], *last, first[-1]]
        begin = each(kept, [outer[0]], lambda texts: f"{texts[0]} = {start};")
        return begin + _nest(loop, order, [step.format(out, value)], "#pragma omp simd")
    pragma = "#pragma omp simd reduction(+ : a)" if kind == "sum" and reduced else ""
    body = [f"double a = {start};", *_nest(reduced, last, [step.format("a", value)], pragma), f"{out} = a;"]
    return _nest(kept, first, body, "")


_KINDS = {
    "sum": ("0.0", "{0} += {1};"),
    "max": ("-INFINITY", "{{ const double b = {1}; {0} = b > {0} || b != b ? b : {0}; }}"),
}


def _nest(sizes: Sequence[int], names: Sequence[str], body: Sequence[str], pragma: str) -> list[str]:
    """Loops around statements, the pragma before the last one."""
    lines: list[str] = []
    for depth, (size, name) in enumerate(zip(sizes, names, strict=True)):
        if pragma and depth == len(sizes) - 1:
            lines.append(pragma)
        lines.append(f"{_INDENT * depth}for (ptrdiff_t {name} = 0; {name} < {size}; {name}++) {{")
    lines += [f"{_INDENT * len(sizes)}{line}" for line in body]
    return ["{", *lines, "}" * len(sizes), "}"]


def _merged(sizes: Sequence[int], operands: Sequence[Operand]) -> tuple[list[int], list[Operand]]:
    """The same loops with as few dimensions as the strides allow, the longest strides of the first operand outside."""
    leading = next((operand.strides for operand in operands if operand.strides is not None), None)
    order = [place for place, size in enumerate(sizes) if size != 1]
    if leading is not None:
        order.sort(key=lambda place: -abs(leading[place]))
    groups: list[list[int]] = []
    for place in range(len(order)):
        if groups and all(_follow(operand, order[place - 1], order[place], sizes) for operand in operands):
            groups[-1].append(place)
        else:
            groups.append([place])
    merged = [math.prod(sizes[order[place]] for place in group) for group in groups]
    return merged, [operand.along(order, groups) for operand in operands]


def _follow(operand: Operand, one: int, other: int, sizes: Sequence[int]) -> bool:
    return operand.strides is None or operand.strides[one] == operand.strides[other] * sizes[other]


def _part(operand: Operand, places: slice) -> Operand:
    if operand.strides is None:
        return operand
    return Operand(operand.pointer, operand.offset, operand.strides[places])


def _only(operand: Operand, dimensions: int) -> Operand:
    return _part(operand, slice(dimensions))


def _joined(one: Operand, other: Operand) -> Operand:
    if one.strides is None or other.strides is None:
        return one
    return Operand(one.pointer, one.offset, one.strides + other.strides)
