"""A tape in two parts: what hangs on the inputs alone, computed once, and what random draws change each time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ppl_gen.capture.tape import Call, Leaf, Slot, Tape

__all__ = ["hoisted"]


def hoisted(tape: Tape) -> tuple[Tape, Tape]:
    """The part that no draw reaches, and the rest as a function of the same inputs followed by the first's results.

    >>> import torch
    >>> from ppl_gen.capture.recorder import record
    >>> x = torch.ones(3)
    >>> first, rest = hoisted(record(lambda: x.exp() + torch.rand(3), [x], draws=True))
    >>> [call.operation.name() for call in first.calls], rest.inputs
    (['aten::exp'], 2)
    """
    early = _undrawn(tape.calls)
    made = {slot for place in early for slot in tape.calls[place].outputs if slot is not None}
    late = [call for place, call in enumerate(tape.calls) if place not in early]
    read = {leaf for call in late for leaf in call.inputs if isinstance(leaf, Slot)}
    read |= {leaf for leaf in tape.results if isinstance(leaf, Slot)}
    given = tuple(sorted(made & read, key=lambda slot: slot.number))
    calls = tuple(call for place, call in enumerate(tape.calls) if place in early)
    first = Tape(tape.inputs, calls, given, tape.structure, tape.outside)
    return first, _renumbered(tape, late, given)


def _undrawn(calls: Sequence[Call]) -> set[int]:
    """Places of the calls that no random draw reaches, through what they read or what is written into shared memory."""
    memory = _memory(calls)
    touched: list[set[int]] = [{memory[slot] for slot in _slots((*call.inputs, *call.outputs))} for call in calls]
    last_write: dict[int, int] = {}
    for place, call in enumerate(calls):
        if call.writes:
            last_write |= dict.fromkeys(touched[place], place)
    late = {place for place, call in enumerate(calls) if call.draws}
    while True:
        # Memory that late calls make or write into, or that they read before it is written into for the last time.
        reached = {memory[slot] for place in late for slot in _slots(calls[place].outputs)}
        for place in late:
            reached |= {m for m in touched[place] if calls[place].writes or place < last_write.get(m, -1)}
        more = {place for place in range(len(calls)) if place not in late and not touched[place].isdisjoint(reached)}
        if not more:
            return set(range(len(calls))) - late
        late |= more


def _memory(calls: Sequence[Call]) -> dict[Slot, int]:
    """Slots that may share memory have one number: arguments and results of views and of calls that write."""
    numbers: dict[Slot, int] = {}
    for call in calls:
        slots = _slots((*call.inputs, *call.outputs))
        for slot in slots:
            numbers.setdefault(slot, slot.number)
        if call.writes or any(result.alias_info is not None for result in call.operation._schema.returns):
            joined = {numbers[slot] for slot in slots}
            if joined:
                one = min(joined)
                numbers = {slot: one if number in joined else number for slot, number in numbers.items()}
    return numbers


def _slots(leaves: Iterable[Leaf | None]) -> list[Slot]:
    return [leaf for leaf in leaves if isinstance(leaf, Slot)]


def _renumbered(tape: Tape, calls: Sequence[Call], given: Sequence[Slot]) -> Tape:
    """These calls as a tape whose inputs are followed by what is ``given``."""
    names = {slot: Slot(tape.inputs + place) for place, slot in enumerate(given)}
    beyond = tape.inputs + len(given)

    def named(leaf: Leaf) -> Leaf:
        if not isinstance(leaf, Slot) or leaf.number < tape.inputs:
            return leaf
        return names.setdefault(leaf, Slot(beyond + len(names) - len(given)))

    made = []
    for call in calls:
        inputs = tuple(named(leaf) for leaf in call.inputs)
        outputs = tuple(None if slot is None else named(slot) for slot in call.outputs)
        made.append(replace(call, inputs=inputs, outputs=outputs))  # type: ignore[arg-type]
    results = tuple(named(leaf) for leaf in tape.results)
    return Tape(beyond, tuple(made), results, tape.structure, tape.outside, tape.large)
