"""Progress bars where somebody is looking: how far, for how long, how fast, and what runs beside it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

__all__ = ["Part", "ProgressBar", "Shown", "called", "rate", "watched"]

_CALLED: ContextVar[str] = ContextVar("called", default="")


@dataclass(frozen=True)
class Part:
    """One of several things that go on at once: ``done`` of ``total`` in the phase that its ``label`` names."""

    label: str
    done: int
    total: int


def watched(wanted: bool | None) -> bool:
    """Whether to show a bar: in terminals and notebooks, unless told."""
    return wanted if wanted is not None else sys.stderr.isatty() or "ipykernel" in sys.modules


@contextlib.contextmanager
def called(name: str) -> Iterator[None]:
    """Bars that begin inside bear a ``name`` instead of their algorithm's.

    >>> with called("EM, seed 0 (1 of 6)"), ProgressBar(False, "EM") as shown:
    ...     shown is None
    True
    """
    token = _CALLED.set(name)
    try:
        yield
    finally:
        _CALLED.reset(token)


def rate(speed: float | None) -> str:
    """Steps per second, or seconds per step where they are slow.

    >>> rate(1234.0), rate(2.5), rate(0.125), rate(None)
    ('1,234/s', '2.5/s', '8.0 s each', '')
    """
    if not speed:
        return ""
    if speed < 1:
        return f"{1 / speed:.1f} s each"
    return f"{speed:,.0f}/s" if speed >= 10 else f"{speed:.1f}/s"


class Shown:
    """A bar on the screen: ``shown(done, total, text)`` moves it, `parts` those of what runs side by side."""

    def __init__(self, label: str, running: Callable[[], str] | None = None) -> None:
        self.bar = _bar(running)
        self.bar.start()
        self.whole = self.bar.add_task(label, total=None, text="")
        self.rows: list[Any] = []
        self.labels: list[str] = []

    def __call__(self, done: int, total: int, text: str) -> None:
        self.bar.update(self.whole, completed=done, total=total, text=text)

    def parts(self, parts: Sequence[Part]) -> None:
        """A bar for each; one whose label changes has begun another phase, with a clock of its own."""
        for i, part in enumerate(parts):
            if i == len(self.rows):
                self.rows.append(self.bar.add_task(f"  {part.label}", total=part.total, text=""))
                self.labels.append(part.label)
            if self.labels[i] != part.label:
                self.labels[i] = part.label
                self.bar.reset(self.rows[i], total=part.total, description=f"  {part.label}")
            self.bar.update(self.rows[i], completed=part.done)


def _bar(running: Callable[[], str] | None) -> Any:
    from rich import progress
    from rich.console import Console
    from rich.table import Column
    from rich.text import Text

    class Rate(progress.ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text(rate(task.finished_speed or task.speed))

    class Beside(progress.ProgressColumn):
        max_refresh = 0.5

        def render(self, task: Any) -> Text:
            # Cut, and not wrapped: a bar whose height changes leaves pieces of itself on the screen.
            text = running() if running is not None else str(task.fields["text"])
            return Text(text, no_wrap=True, overflow="ellipsis")

    def whole() -> Column:
        return Column(no_wrap=True)

    # On a narrow screen the bar and the text beside it give way, not the numbers.
    columns: list[progress.ProgressColumn] = [
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=20),
        progress.MofNCompleteColumn(table_column=whole()),
        progress.TimeElapsedColumn(table_column=whole()),
    ]
    if running is None:  # fits that run side by side end in bursts: their rate says nothing of the time that is left
        columns += [Rate(table_column=whole()), progress.TimeRemainingColumn(table_column=whole())]
    return progress.Progress(*columns, Beside(), console=Console(stderr=True))


class ProgressBar:
    """The bar of one run; entering gives its `Shown`, or None where nobody looks.

    ``running`` tells, while the bar is shown, what goes on.
    """

    def __init__(self, wanted: bool | None, label: str, running: Callable[[], str] | None = None) -> None:
        self.wanted, self.label, self.running = watched(wanted), label, running
        self.shown: Shown | None = None

    def __enter__(self) -> Shown | None:
        if self.wanted:
            self.shown = Shown(_CALLED.get() or self.label, self.running)
        return self.shown

    def __exit__(self, *exception: object) -> None:
        if self.shown is not None:
            self.shown.bar.stop()
