"""Blocks of calls that take turns, so that what else the machine does falls on every kind; medians and quartiles."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from versions import table, write

__all__ = ["Block", "Ends", "Result", "Timed", "alternate", "block_of", "run", "shown", "tell"]

Timed = Mapping[str, Callable[[], object]]


class Ends:
    """In front of an algorithm: notes when each step ends, without a callback, which would be watched at a cost."""

    ends: ClassVar[list[float]] = []

    def step(self, state: Any, source: Any) -> Any:
        result = super().step(state, source)  # type: ignore[misc]
        self.ends.append(time.perf_counter())
        return result


@dataclass(frozen=True)
class Block:
    """What one kind took: milliseconds of a call in each of its blocks."""

    ms: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.ms)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.ms) < 2:
            return self.ms[0], self.ms[0]
        low, _, high = statistics.quantiles(self.ms, n=4, method="inclusive")
        return low, high


def block_of(ms: list[float]) -> Block:
    """Of times that a callable measured by itself (steps of a fit without its set-up)."""
    return Block(tuple(ms))


def alternate(kinds: Timed, blocks: int, calls: int, warm: int = 1) -> dict[str, Block]:
    """Milliseconds per call of every kind: ``blocks`` rounds in which each kind makes ``calls`` calls in a row.

    Each is called ``warm`` times before, which is not counted. A callable that returns a float has measured itself: the
    float is taken for its seconds, so that set-up can be left out; anything else is measured from outside.
    """
    for call in kinds.values():
        for _ in range(warm):
            call()
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(blocks):
        for name, call in kinds.items():
            found[name].append(1000 * _seconds(call, calls))
    return {name: Block(tuple(ms)) for name, ms in found.items()}


def _seconds(call: Callable[[], object], calls: int) -> float:
    """Seconds per call."""
    began, own = time.perf_counter(), []
    for _ in range(calls):
        result = call()
        if isinstance(result, float):
            own.append(result)
    return sum(own) / calls if len(own) == calls else (time.perf_counter() - began) / calls


@dataclass(frozen=True)
class Result:
    """One row of the benchmark: what was timed, ours first, and the largest ratio to each peer that was aimed at."""

    title: str
    blocks: Mapping[str, Block]
    targets: Mapping[str, float] = field(default_factory=dict)
    memory: Mapping[str, float] = field(default_factory=dict)  # MB, largest resident set of a process of its own
    note: str = ""

    @property
    def own(self) -> str:
        return next(iter(self.blocks))

    def ratio(self, peer: str) -> float:
        """Our median in units of the peer's."""
        return self.blocks[self.own].median / self.blocks[peer].median

    def met(self, peer: str) -> bool | None:
        """Whether the target is met; None where there is none."""
        return None if peer not in self.targets else self.ratio(peer) <= self.targets[peer]


def shown(result: Result) -> str:
    """The result as a heading and a table in Markdown."""
    head = ["what", "ms, median", "quartiles", "ours, in units of it", "target", *(["MB"] if result.memory else [])]
    lines = []
    for name, block in result.blocks.items():
        low, high = block.quartiles
        met = result.met(name)
        aim = "" if met is None else f"{result.targets[name]:.2f} ({'met' if met else '**missed**'})"
        memory = [f"{result.memory[name]:.0f}" if name in result.memory else ""] if result.memory else []
        lines.append(
            [name, f"{block.median:.3g}", f"{low:.3g} to {high:.3g}", f"{result.ratio(name):.2f}", aim, *memory]
        )
    return f"## {result.title}\n\n{table(head, lines)}\n" + (f"\n{result.note}\n" if result.note else "")


def run(name: str, title: str, rows: Callable[[bool], Sequence[Result]], about: str | None) -> None:
    """The command line of one file of rows; ``about`` is its docstring."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--quick", action="store_true", help="small sizes, short blocks; nothing is written")
    tell(name, title, rows, parser.parse_args().quick)


def tell(name: str, title: str, rows: Callable[[bool], Sequence[Result]], quick: bool, note: str = "") -> None:
    """Measure the rows and write them to ``results/<name>.md``; print them only where it is ``quick``."""
    began = time.perf_counter()
    body = "\n".join(map(shown, rows(quick)))
    if quick:
        print(body)
    else:
        write(name, title, f"{note}\n\n{body}", time.perf_counter() - began)
