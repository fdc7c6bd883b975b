"""Streams: batches that somebody else makes, of which no more than one is in memory."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl_gen.data.sources import Columns
from ppl_gen.errors import require_whole

__all__ = ["Stream", "stream"]


class Stream:
    """Batches of an iterable that can be walked through again and again; see `stream`.

    ``rows`` in one pass, ``first`` the first batch, by which a program is looked at. Of a recipe it is the data.
    """

    def __init__(self, batches: Any, rows: int) -> None:
        self.batches, self.rows = batches, rows
        self._first: Any = None

    def __repr__(self) -> str:
        return f"stream(rows={self.rows})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Stream, (self.batches, self.rows)

    def walk(self) -> Iterator[Any]:
        """One pass: the batches as a user would pass them."""
        again = self.batches() if callable(self.batches) and not hasattr(self.batches, "__iter__") else self.batches
        if not hasattr(again, "__iter__"):
            raise TypeError(f"batches: expected a function of no argument that gives an iterable, it gave {again!r}")
        return map(_batch, iter(again))

    @property
    def first(self) -> Any:
        """The first batch of a pass under a seed of its own; global generators stay as they are."""
        if self._first is None:
            states = random.getstate(), np.random.get_state()
            try:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(0)
                    self._first = next(self.walk(), None)
            finally:
                random.setstate(states[0])
                np.random.set_state(states[1])
            if self._first is None:
                raise ValueError("batches: the stream holds none; expected at least one in every pass")
        return self._first


def stream(batches: Iterable[Any] | Callable[[], Iterable[Any]], *, rows: int) -> Stream:
    """Data that come batch by batch, and are never in memory as a whole: for SVI, whose batches these are.

    Args:
        batches: an iterable that can be walked through again (a ``DataLoader``, also of an ``IterableDataset``; an
            object with ``__iter__``), or a function that returns one or a generator. Each item is a batch: a tensor, a
            tuple or a mapping, as `pg.fit` takes data.
        rows: how many rows one pass has, N of the plate's scale N / B. It is checked at the end of every pass; a last
            batch may be left out, as by ``drop_last=True``.

    Raises:
        TypeError: for a generator, which can be walked through once, and for what is no iterable.

    What needs all rows (EM, NUTS, SVI without minibatches, evidence of all rows, a held-out share) refuses a stream.
    The order of rows is the stream's: shuffle there. What it draws from torch's generator follows the seed of the fit.

    Example:
        >>> import pyro, pyro.distributions as dist, ppl_gen as pg
        >>> from ppl_gen.inference import SVI
        >>> def model(x):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> def read():
        ...     for start in range(0, 1000, 50):
        ...         yield torch.linspace(1.0, 3.0, 1000)[torch.arange(start, start + 50) * 7 % 1000]
        >>> fit = pg.fit(model, pg.stream(read, rows=1000), SVI(epochs=50, lr=0.02))
        >>> abs(float(fit.posterior(draws=200)["loc"].mean()) - 2.0) < 0.2
        True
    """
    require_whole("rows", rows)
    if isinstance(batches, Iterator):
        raise TypeError(
            f"batches: a {type(batches).__name__} can be walked through once, and training goes through it several "
            "times; pass the function that makes it, such as pg.stream(lambda: read(path), rows=...)"
        )
    no_batches = isinstance(batches, Tensor | np.ndarray | str | Mapping)
    if no_batches or not (hasattr(batches, "__iter__") or callable(batches)):
        raise TypeError(f"batches: expected an iterable of batches, or a function of one, got {type(batches).__name__}")
    return Stream(batches, int(rows))


def _batch(item: Any) -> Any:
    """What a loader collates to a list of tensors fills the arguments in order."""
    if isinstance(item, list | tuple) and item and all(isinstance(part, Tensor) for part in item):
        return item[0] if len(item) == 1 else item if isinstance(item, tuple) else Columns(item)
    return item
