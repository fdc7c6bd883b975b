"""A stream as a data set: its first batch to look at, all others as they come by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ppl_gen.data.dataset import FEW, Batch, Dataset
from ppl_gen.data.on_disk import BadRowsError
from ppl_gen.data.streams import Stream
from ppl_gen.errors import IncompatibleError

__all__ = ["StreamedRows", "Walk", "as_stream_dataset"]


@dataclass(frozen=True)
class StreamedRows(Dataset):
    """A data set of which the first batch is at hand, and ``rows`` come by in a pass."""

    stream: Stream | None = None
    made: Callable[[Any], Dataset] | None = None  # of a batch as the user passes it

    @property
    def held(self) -> int:
        """Rows of the first batch."""
        return min(len(value) for value in self.entries.values())

    @property
    def streamed(self) -> int | None:
        return self.held

    @property
    def elements(self) -> int:
        return super().elements * (self.rows or 1) // self.held

    @property
    def beyond_memory(self) -> str:
        return "which come as a stream"

    def batch(self, index: Tensor | None = None, total: int | None = None, step: int | None = None) -> Batch:
        if index is None or (len(index) and int(index.max()) >= self.held):
            raise IncompatibleError(
                f"data: this takes all {self.rows} rows at once, and a stream hands out batches. Learn with SVI, and "
                "ask about rows of which you pass an array: fit.evidence(rows), fit.predict(rows)"
            )
        return super().batch(index, total, step)

    def head(self, rows: int) -> Batch:
        count = min(rows, self.held)
        return self.batch(torch.arange(count, device="cpu"), total=count)

    def glimpse(self) -> Batch:
        return self.head(FEW)

    def template(self, rows: int) -> Batch:
        return self.batch(torch.arange(rows, device="cpu") % self.held, total=rows)

    def excerpt(self) -> Dataset:
        assert self.made is not None and self.stream is not None
        return self.made(self.stream.first)

    def chunks(self, size: int) -> Iterator[Batch]:
        yield self.batch()  # refuses

    def subset(self, index: Tensor) -> Dataset:
        return self.excerpt().subset(index)

    def same_rows(self, other: Dataset) -> bool:
        return self is other or (isinstance(other, StreamedRows) and other.stream is self.stream)

    def arriving(self, item: Any, step: int) -> Batch:
        """A batch of the stream as a call of the model.

        Raises:
            BadRowsError: for numbers that are not finite, where the first batch has none; for values outside of the
                support of the site that observes them.
        """
        assert self.made is not None
        try:
            rows = self.made(item)
        except ValueError as error:
            raise BadRowsError(f"a batch of the stream, at step {step + 1}: {error}") from error
        if missing := [text for name, text in rows.missing.items() if name not in self.missing]:
            raise BadRowsError(f"a batch of the stream, at step {step + 1}: {missing[0]}")
        batch = replace(rows.batch(step=step), total=self.rows)
        if self.domains is not None and (said := self.domains(rows, batch)):
            said = said.replace("of the data", "of the batch", 1)
            raise BadRowsError(f"a batch of the stream, at step {step + 1}: {said}. Mend the value, or drop the row")
        return batch


def as_stream_dataset(data: Stream, made: Callable[[Any], Dataset]) -> StreamedRows:
    """The first batch checked as data are, and all others to come."""
    first = made(data.first)
    if first.rows is None:
        raise ValueError("data: the batches of a stream need rows, and its first has none (entries are constants)")
    if first.rows > data.rows:
        raise ValueError(
            f"rows: expected those of one pass, got {data.rows}, and the first batch alone has {first.rows}"
        )
    kept = {name: getattr(first, name) for name in first.__dataclass_fields__}
    settled: Any = {"dtype": first.dtype}  # of the first, whatever the others hold
    return StreamedRows(**kept | {"rows": data.rows, "original": data}, stream=data, made=partial(made, **settled))


class Walk:
    """Where one is in a stream: the batches of one pass after another, which can be gone on with."""

    def __init__(self, data: StreamedRows) -> None:
        assert data.stream is not None
        self.data, self.stream = data, data.stream
        self._pass: Iterator[Any] | None = None
        self._began = torch.get_rng_state()
        self._batches, self._seen = 0, 0

    def next(self, step: int) -> Batch:
        if self._pass is None:
            self._begin()
        assert self._pass is not None
        item = next(self._pass, None)
        if item is None:
            self._check()
            self._begin()
            item = next(self._pass, None)
            if item is None:
                raise ValueError("data: a pass over the stream held no batch; an iterable has to begin again each time")
        batch = self.data.arriving(item, step)
        self._batches, self._seen = self._batches + 1, self._seen + (batch.rows or 0)
        return batch

    def _begin(self) -> None:
        self._began = torch.get_rng_state()
        self._pass, self._batches, self._seen = self.stream.walk(), 0, 0

    def _check(self) -> None:
        rows = self.stream.rows
        if not rows - self.data.held < self._seen <= rows:
            raise ValueError(
                f"rows: one pass over the stream held {self._seen}, and rows={rows} was given, by which every batch "
                f"was weighed; give rows={self._seen}"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"began": self._began.clone(), "batches": self._batches, "seen": self._seen}

    def load_state_dict(self, saved: Any) -> None:
        """Walk again, from where torch's generator stood, to where it was."""
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(saved["began"])
            self._begin()
            assert self._pass is not None
            for _ in range(int(saved["batches"])):
                next(self._pass, None)
        if not int(saved["batches"]):
            self._pass = None
        self._batches, self._seen = int(saved["batches"]), int(saved["seen"])
