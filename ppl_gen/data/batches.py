"""Batches: the rows in an order of their own, that can be stopped and gone on with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl_gen.data.arrays import shared
from ppl_gen.data.batching import Batch, Dataset
from ppl_gen.data.calls import ByStep
from ppl_gen.data.streamed import StreamedRows, Walk
from ppl_gen.errors import IncompatibleError
from ppl_gen.runtime.ranks import ALONE, Ranks, Share

__all__ = ["Batches"]


class Batches:
    """An endless source of batches under a generator of its own, so that data order depends on the seed alone.

    What `Iterative.source` returns: ``Batches(run.data, 100, run.seed)`` gives 100 rows at a time; a size of None gives
    all rows. Where several processes learn together, ``ranks=run.ranks`` gives each its share of every batch.

    >>> import torch
    >>> from ppl_gen.data.batching import as_dataset
    >>> source = Batches(as_dataset(torch.arange(5.0), lambda x: None), 2, seed=0)
    >>> [source.next().rows for _ in range(source.per_epoch)]
    [2, 2, 1]
    """

    def __init__(
        self, data: Dataset, size: int | None, seed: int, stratify: str | None = None, *, ranks: Ranks = ALONE
    ) -> None:
        self.data, self.size, self.ranks = data, size, ranks
        # Not the seed itself: the order of rows would share its random bits with the first weights of the networks.
        own = int(np.random.SeedSequence([seed, 1]).generate_state(1, np.uint64)[0] >> 1)
        self._generator = torch.Generator("cpu").manual_seed(own)
        self._order = torch.empty(0, dtype=torch.long, device="cpu")
        self._strata = _strata(data, stratify)
        self._drawn = 0
        self._walk = self._walked()
        self._moving = data.on_batch is not None or any(isinstance(value, ByStep) for value in data.constants.values())
        #: Around what is drawn anew for the rows of a share, where several processes learn together.
        self.around: Callable[[Share], contextlib.AbstractContextManager[object]] = lambda share: (
            contextlib.nullcontext()
        )
        if size is not None:
            if data.rows is None:
                raise ValueError("batch_size: minibatches need rows, and this data has none (entries are constants)")
            if not 1 <= size:
                raise ValueError(f"batch_size: expected at least 1, got {size}")
            self.size = min(size, data.rows)

    @cached_property
    def whole(self) -> Batch | None:
        """The one batch of a source that always gives the same; made when it is first asked for."""
        return self._all_rows() if self.size is None and not self._moving and self._walk is None else None

    @property
    def per_epoch(self) -> int:
        """Batches in one pass over the rows."""
        size = self.data.streamed or self.size
        return 1 if size is None or self.data.rows is None else -(-self.data.rows // size)

    def next(self) -> Batch:
        """The next batch; the last one of an epoch may be shorter."""
        self._drawn += 1
        if self._walk is not None:
            return self._walk.next(self._drawn - 1)
        if self.size is None:
            return self.whole if self.whole is not None else self._all_rows(self._drawn - 1)
        if not len(self._order):
            self._order = self._shuffled()
        index, self._order = self._order[: self.size], self._order[self.size :]
        return self._part(index, self._drawn - 1)

    def _walked(self) -> Walk | None:
        """Through a stream, whose batches are as they come."""
        if not isinstance(self.data, StreamedRows):
            return None
        if self.size is not None:
            raise ValueError("batch_size: the batches of a stream are as they come; leave it out")
        if not self.ranks.alone:
            raise IncompatibleError("fabric: a stream hands whole batches to one process; pass rows that can be shared")
        return Walk(self.data)

    @property
    def drawn(self) -> int:
        """How many batches have been drawn."""
        return self._drawn

    def _all_rows(self, step: int | None = None) -> Batch:
        if self.ranks.alone or self.data.rows is None:
            return self._seen(self.data.batch(step=step), step)
        return self._part(torch.arange(self.data.rows, device="cpu"), step)

    def _part(self, index: Tensor, step: int | None) -> Batch:
        """The rows of ``index`` that are this process's."""
        if self.ranks.alone:
            return self._seen(self.data.batch(index, step=step), step)
        share = self.ranks.share(len(index))
        drawing = contextlib.nullcontext() if self.data.on_batch is None else self.around(share)
        with drawing:
            batch = self.data.batch(index[share.first : share.first + share.count], step=step)
        return replace(self._seen(batch, step), share=share)

    def _seen(self, batch: Batch, step: int | None) -> Batch:
        """Rows of files are looked at in the first pass over them, rows that a hook makes whenever they come."""
        data = self.data
        if data.domains is None or not data.unseen or (data.on_batch is None and (step or 0) >= self.per_epoch):
            return batch
        return data.looked_at(batch, step or 0)

    def state_dict(self) -> dict[str, Any]:
        """Where the source stands: how many batches were drawn, what is left of this epoch, and its generator.

        >>> import torch
        >>> from ppl_gen.data.batching import as_dataset
        >>> source, other = (Batches(as_dataset(torch.arange(5.0), lambda x: None), 2, seed) for seed in (0, 1))
        >>> _ = source.next()
        >>> other.load_state_dict(source.state_dict())
        >>> [torch.equal(source.next().index, other.next().index) for _ in range(9)].count(False)
        0
        """
        own = {"generator": self._generator.get_state(), "order": self._order.clone(), "drawn": self._drawn}
        return own if self._walk is None else own | {"walk": self._walk.state_dict()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on where the source of the same data stood that gave ``saved``."""
        self._generator.set_state(saved["generator"])
        self._order, self._drawn = saved["order"].clone(), int(saved["drawn"])
        if self._walk is not None:
            self._walk.load_state_dict(saved["walk"])

    def _shuffled(self) -> Tensor:
        assert self.data.rows is not None
        if self._strata is None:
            return torch.randperm(self.data.rows, generator=self._generator, device="cpu")
        # Each stratum is spread evenly over the epoch, so that every batch holds its share of every stratum.
        # Dtype and device are written out: the order is the same whatever a fit's defaults are.
        places = torch.empty(self.data.rows, dtype=torch.float64, device="cpu")
        for rows in self._strata:
            offset = torch.rand((), generator=self._generator, dtype=torch.float64, device="cpu")
            order = torch.randperm(len(rows), generator=self._generator, device="cpu")
            places[rows[order]] = (torch.arange(len(rows), dtype=torch.float64, device="cpu") + offset) / len(rows)
        return places.argsort(stable=True)


def _strata(data: Dataset, stratify: str | None) -> list[Tensor] | None:
    if stratify is None:
        return None
    if data.streamed is not None:
        raise ValueError("stratify: the order of a stream is its own; leave it out")
    if not isinstance(stratify, str) or stratify not in data.entries:
        raise ValueError(f"stratify: no entry {stratify!r} in the data; there is {', '.join(data.entries)}")
    value = data.entries[stratify]
    labels = value.cpu() if isinstance(value, Tensor) else shared(value)
    if labels.ndim != 1:
        raise ValueError(f"stratify: expected one label per row in {stratify!r}, got shape {tuple(labels.shape)}")
    return [torch.nonzero(labels == value).squeeze(-1) for value in labels.unique()]
