"""Where a run keeps how far it has come, and from where it goes on."""

from __future__ import annotations

import datetime
import numbers
import re
import time
import uuid
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ppl_gen.runtime.numbered import Numbered, Record
from ppl_gen.runtime.ranks import Ranks
from ppl_gen.runtime.trees import packed, unpacked

__all__ = ["DEFAULT_EVERY", "Checkpoint", "Every", "Followed", "require_every"]

#: A number of steps, or a time.
Every = int | datetime.timedelta

DEFAULT_EVERY = datetime.timedelta(minutes=1)

_PARTS = re.compile(r"[a-z]+ \d+")


def require_every(every: Any) -> Every:
    """``every`` itself; raises TypeError or ValueError for what is neither a number of steps nor a time.

    >>> require_every(100), require_every(datetime.timedelta(seconds=30))
    (100, datetime.timedelta(seconds=30))
    >>> require_every(0.5)
    Traceback (most recent call last):
    ...
    TypeError: every: expected a whole number of steps, or a time such as datetime.timedelta(seconds=30), got 0.5
    """
    if isinstance(every, datetime.timedelta):
        if every.total_seconds() <= 0:
            raise ValueError(f"every: expected a time above 0, got {every}")
        return every
    if isinstance(every, bool) or not isinstance(every, numbers.Integral):
        raise TypeError(
            f"every: expected a whole number of steps, or a time such as datetime.timedelta(seconds=30), got {every!r}"
        )
    if every < 1:
        raise ValueError(f"every: expected at least 1 step, got {every!r}")
    return int(every)


@dataclass
class Checkpoint:
    """The checkpoints of one run: what the last one held, when the next is due, and how it is written.

    ``saved`` is the tree to go on from, None at the beginning. ``run`` names this run and no other: its parts (the
    chains of a sampler) carry it too. ``facts`` stand in every file, and ``seconds`` were spent before this run began.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     first = Checkpoint(Numbered(Path(place) / "run"), every=2)
    ...     first.write(0, {"mean": 0.0})
    ...     first.due(1), first.due(2)
    ...     again = Checkpoint(Numbered(Path(place) / "run"), every=2)
    ...     again.take(again.records.read())
    ...     again.saved
    (False, True)
    {'mean': 0.0}
    """

    records: Numbered
    every: Every = DEFAULT_EVERY
    facts: Mapping[str, Any] = field(default_factory=dict)
    run: str = field(default_factory=lambda: uuid.uuid4().hex)
    saved: Any = None
    seconds: float = 0.0
    _last: int = 0
    _kept: int = 0
    _at: float = field(default_factory=time.monotonic)
    _began: float = field(default_factory=time.perf_counter)

    def take(self, record: Record) -> None:
        """Go on from what ``record`` holds.

        Raises:
            ValueError: where it is not a record of a run.
        """
        facts = record.facts
        try:
            self.run, self._last, self.seconds = str(facts["run"]), int(facts["step"]), float(facts["seconds"])
            self._kept = self._last
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.records.argument}: {self.records.path} holds no checkpoint of a fit") from error
        self.saved = record.tree

    def begin(self) -> None:
        """Time runs from here on: in another process, say."""
        self._at, self._began = time.monotonic(), time.perf_counter()

    def due(self, step: int) -> bool:
        """Whether the steps or the time between two checkpoints have gone by."""
        if isinstance(self.every, int):
            return step - self._last >= self.every
        return time.monotonic() - self._at >= self.every.total_seconds()

    def write(self, step: int, tree: Any) -> None:
        """The run is at ``step``, and goes on from ``tree``."""
        spent = self.seconds + time.perf_counter() - self._began
        self.records.write({**self.facts, "run": self.run, "step": step, "seconds": spent}, tree)
        self._last = self._kept = step
        self._at = time.monotonic()

    def keep(self, step: int, tree: Any) -> None:
        """`write`, where a disk that is full is no reason to lose the run: it is tried again after the next interval.

        Warns:
            UserWarning: where nothing could be written.
        """
        try:
            self.write(step, tree)
        except OSError as error:
            self._last, self._at = step, time.monotonic()
            warnings.warn(
                f"checkpoint: nothing could be written after step {step} ({error}); the run goes on, and the last "
                f"checkpoint stands at step {self._kept}",
                stacklevel=2,
            )

    def part(self, name: str) -> Checkpoint:
        """The checkpoints of one part of this run, such as ``"chain 0"``, in a folder below.

        Raises:
            ValueError: if what stands there belongs to another run, or is damaged.
        """
        records = Numbered(self.records.path / name, self.records.argument, self.records.kind)
        made = Checkpoint(records, self.every, {}, self.run)
        if (record := records.read()) is not None:
            made.take(record)
            if made.run != self.run:
                raise ValueError(
                    f"{records.argument}: {records.path} belongs to another run than {self.records.path}; choose a new "
                    "folder"
                )
        return made

    def shared(self, ranks: Ranks) -> None:
        """All processes that learn one fit go on from what the first one has read."""
        if ranks.alone:
            return
        raw = ranks.handed(None if self.saved is None else packed(self.saved))
        self.saved = None if raw is None else unpacked(raw)

    @staticmethod
    def folder(path: Path, argument: str = "checkpoint") -> Numbered:
        """The records of a run at ``path``, with folders for its parts."""
        return Numbered(path, argument, others=_PARTS)


@dataclass
class Followed(Checkpoint):
    """The checkpoints of a run in a process that leaves the writing to the first one."""

    def due(self, step: int) -> bool:
        return False

    def write(self, step: int, tree: Any) -> None:
        return None
