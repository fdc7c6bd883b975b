"""Progress and callbacks of several chains, from what they have drawn so far."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from ppl_gen.fitting.run import Run
from ppl_gen.inference.mcmc.kernel import DrawTable
from ppl_gen.runtime.progress import Part

__all__ = ["Report", "counted"]

BARS = 16  # chains beyond that are shown together


def counted(number: int, noun: str) -> str:
    """The number with its noun, which has a plural.

    >>> counted(1, "draw"), counted(2, "draw")
    ('1 draw', '2 draws')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"


class Report:
    """Progress and callbacks from the tables of the chains."""

    def __init__(self, run: Run, chains: int, iterations: int, warmup: int, done: int = 0) -> None:
        self.run, self.total = run, chains * iterations
        self.iterations, self.warmup = iterations, warmup
        self.done, self.shown = done, 0.0  # iterations that callbacks have been told of; when the bar was moved

    def __call__(self, tables: Sequence[DrawTable]) -> None:
        if self.run.progress is None and not self.run.hooks:
            return
        done = sum(table.done for table in tables)
        divergences = sum(table.divergences for table in tables)
        info: Mapping[str, float] = {"divergences": float(divergences)}
        while self.done < done:  # every iteration, also where several have come since the last look
            self.done += 1
            for hook in self.run.hooks:
                hook(self.done, info)
        now = time.monotonic()
        if self.run.progress is not None and (now - self.shown > 0.1 or done == self.total):
            self.shown = now
            self.run.progress(done, self.total, counted(divergences, "divergence"))
            if 1 < len(tables) <= BARS and (parts := getattr(self.run.progress, "parts", None)):
                parts([self._part(i, table) for i, table in enumerate(tables, 1)])

    def _part(self, number: int, table: DrawTable) -> Part:
        if table.done < self.warmup:
            return Part(f"chain {number} warm-up", table.done, self.warmup)
        return Part(f"chain {number} sampling", table.done - self.warmup, self.iterations - self.warmup)
