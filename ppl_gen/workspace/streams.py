"""Two streams of random numbers in a process that learns together with others: the common one, and its own."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator

import numpy as np
import pyro
import torch
from torch import Tensor

from ppl_gen.workspace.isolation import generators, set_generators

__all__ = ["Streams"]


class Streams:
    """The common stream is that of the whole fit, the same on all processes; the own one differs from all others.

    The own stream begins anew at each update, from seed, process and number of the update: it has no state to save.

    >>> streams = Streams(0, rank=1, device=None)
    >>> with streams.own(0):
    ...     mine = torch.rand(2)
    ...     with streams.common():
    ...         ours = torch.rand(2)
    >>> torch.equal(mine, ours)
    False
    """

    def __init__(self, seed: int, rank: int, device: torch.device | None) -> None:
        self.seed, self.rank = seed, rank
        self.generators: list[torch.Generator] = [torch.default_generator]
        if device is not None and device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            self.generators.append(torch.cuda.default_generators[index])
        self.drawn = False  # whether the last update took numbers from the own stream
        self._other: list[Tensor] = []  # where the stream stands that is not in use

    @contextlib.contextmanager
    def own(self, number: int) -> Iterator[None]:
        """Everything inside draws from the own stream of the update of that ``number``."""
        kept, self._other = generators(), self._states()
        entropy = np.random.SeedSequence([self.seed, 2, self.rank, number])
        pyro.set_rng_seed(int(entropy.generate_state(1, np.uint32)[0]))
        fresh = self._states()
        try:
            yield
        finally:
            self.drawn = not all(map(torch.equal, fresh, self._states()))
            set_generators(kept)
            self._set(self._other)

    @contextlib.contextmanager
    def common(self) -> Iterator[None]:
        """Inside of `own`: back to the common stream, where it stands."""
        with self._swapped():
            yield

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Inside of `common`: the own stream after all."""
        with self._swapped():
            yield

    @contextlib.contextmanager
    def _swapped(self) -> Iterator[None]:
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        mine = self._states()
        self._set(self._other)
        self._other = mine

    def fingerprint(self) -> int:
        """A number that tells where the common stream stands; asked for inside of `own`."""
        return zlib.crc32(b"".join(state.numpy().tobytes() for state in self._other))

    def _states(self) -> list[Tensor]:
        return [generator.get_state() for generator in self.generators]

    def _set(self, states: list[Tensor]) -> None:
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state)
