"""The processes that learn one fit together: which of them this is, and what all of them agree on.

Every exchange begins with a short message of the same length, in which each process says whether it failed. What
fails anywhere between two exchanges is told in the next one, so that the others raise too and none waits for ever.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl_gen.errors import RankError
from ppl_gen.runtime.interrupts import check, taken

__all__ = ["ALONE", "Group", "Ranks", "Share", "number_of"]

_WORDS = 400  # characters of an error that the other processes are told
_ERROR, _NOT_FINITE, _AT_ONCE, _SIGNAL = range(4)  # places in the short message
_CODE = 2**24  # below this, fingerprints and their squares add up without overflow


class _NotFiniteThere(FloatingPointError):
    """What another process came to is not finite."""


class _InterruptedThere(KeyboardInterrupt):
    """Another process was interrupted in the middle of a step."""


_HEARD = (RankError, _NotFiniteThere, _InterruptedThere)  # known to all already


@dataclass(frozen=True)
class Share:
    """Which rows of a batch are this process's: ``count`` from ``first`` on, of ``whole``; what its mean weighs.

    A process without rows (a last batch smaller than the number of processes) computes with one row that weighs
    nothing.
    """

    first: int
    count: int
    whole: int
    weight: float


class Ranks:
    """One process that learns alone: it agrees with itself. `Group` is one of several.

    >>> ALONE.first, ALONE.world, ALONE.same("yes")
    (True, 1, 'yes')
    """

    rank: int = 0
    world: int = 1
    mark: int = 0  # a number that should be the same on all processes ...
    alike: bool = True  # ... and whether it was at the last exchange

    @property
    def alone(self) -> bool:
        """Whether there is nobody to agree with."""
        return self.world == 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes, warns and shows progress."""
        return self.rank == 0

    def share(self, rows: int) -> Share:
        """This process's rows of a batch of ``rows``: neighbours, as many as the others' or one fewer.

        >>> ALONE.share(5)
        Share(first=0, count=5, whole=5, weight=1.0)
        """
        first, end = rows * self.rank // self.world, rows * (self.rank + 1) // self.world
        if first == end:
            return Share(0, 1, rows, 0.0)
        return Share(first, end - first, rows, (end - first) / rows)

    def barrier(self) -> None:
        """Wait until all are here."""

    def all_reduce(self, value: Tensor) -> Tensor:
        """The sum of ``value`` over all processes, bit for bit the same on each; ``value`` may be overwritten by it."""
        return value

    def broadcast(self, value: Tensor) -> Tensor:
        """The ``value`` that the first process holds; all must hold one of that shape and dtype."""
        return value

    def same(self, text: str | None) -> str | None:
        """What the first process says."""
        return text

    def handed(self, raw: bytes | None) -> bytes | None:
        """What the first process holds; what the others hold is not asked."""
        return raw

    def agree(self, facts: Mapping[str, str]) -> None:
        """Raise on all processes if a fact is not the same on all.

        Raises:
            ValueError: naming the facts and the processes that differ from the first.
        """

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal was noted, here or, by the last exchange, in another process."""
        check()

    def taken(self) -> bool:
        """Whether a signal was noted, here or in another process; it is not any more."""
        return taken()

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Where an error is raised inside, the other processes hear of it."""
        yield

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """The same, but a KeyboardInterrupt raised inside ends the run after the next step, on all processes."""
        yield


def number_of(values: Mapping[str, Any]) -> str:
    """A number by which processes tell whether they hold the same tensors or arrays under the same names.

    >>> number_of({"x": torch.zeros(2)}) == number_of({"x": torch.ones(2)})
    False
    """
    number = 0
    for name in sorted(values):
        value = values[name]
        array = value.detach().cpu().resolve_conj().numpy() if isinstance(value, Tensor) else np.asarray(value)
        number = zlib.crc32(np.ascontiguousarray(array).tobytes(), zlib.crc32(name.encode(), number))
    return f"{number:08x}"


#: The default: no other process.
ALONE = Ranks()


class Group(Ranks):
    """One of the processes of torch's default process group, which ``torchrun`` and lightning-fabric made.

    Args:
        rank: of this process, from 0.
        world: how many there are.
        device: where what is exchanged lives; the backend decides what it can exchange.
    """

    def __init__(self, rank: int, world: int, device: torch.device) -> None:
        self.rank, self.world, self.device = rank, world, device
        self._stopping = self._asked = False
        self.broken: str | None = None  # why nothing can be exchanged any more

    def barrier(self) -> None:
        self._meet()

    def all_reduce(self, value: Tensor) -> Tensor:
        self._meet()
        return self._summed(value)

    def broadcast(self, value: Tensor) -> Tensor:
        self._meet()
        with self._unbroken():
            moved = value.detach().to(self.device, copy=True).contiguous()
            torch.distributed.broadcast(moved, 0)
            return moved.to(value.device)

    def same(self, text: str | None) -> str | None:
        raw = self.handed(None if text is None else text.encode())
        return None if raw is None else raw.decode()

    def handed(self, raw: bytes | None) -> bytes | None:
        size = int(self.broadcast(torch.tensor(-1 if raw is None else len(raw), dtype=torch.long, device="cpu")))
        if size <= 0:
            return None if size else b""
        held = torch.zeros(size, dtype=torch.uint8, device="cpu")
        if self.first and raw is not None:
            held = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        return self.broadcast(held).numpy().tobytes()

    def agree(self, facts: Mapping[str, str]) -> None:
        table = torch.zeros(self.world, len(facts), dtype=torch.long, device="cpu")
        table[self.rank] = torch.tensor([zlib.crc32(fact.encode()) for fact in facts.values()], device="cpu")
        table = self.all_reduce(table)
        wrong = {name: (table[:, j] != table[0, j]).nonzero().flatten().tolist() for j, name in enumerate(facts)}
        wrong = {name: ranks for name, ranks in wrong.items() if ranks}
        if wrong:
            said = "; ".join(f"{name} on rank(s) {', '.join(map(str, ranks))}" for name, ranks in wrong.items())
            here = "; ".join(f"{name}: {facts[name]}" for name in wrong)
            raise ValueError(
                "fabric: all processes have to call fit with the same arguments, and other than on rank 0 are: "
                f"{said}. Here, on rank {self.rank}: {here}"
            )

    def check(self) -> None:
        if self._noted():
            raise KeyboardInterrupt

    def taken(self) -> bool:
        if self.broken is None:
            self._meet()
        return self._noted()

    def _noted(self) -> bool:
        was, self._stopping = self._stopping, False
        return was

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        try:
            yield
        except _HEARD:
            raise
        except BaseException as error:
            if self.broken is None:
                self._tell(error)
            raise

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        with self.told():
            try:
                yield
            except KeyboardInterrupt:
                self._asked = True

    def _tell(self, error: BaseException) -> None:
        """Take part in the exchange that the others are in or come to, and say in it what happened."""
        place = _ERROR
        if isinstance(error, FloatingPointError):
            place = _NOT_FINITE
        elif isinstance(error, KeyboardInterrupt):
            place = _AT_ONCE
        with contextlib.suppress(*_HEARD):
            said = str(error).strip().splitlines() or [""]
            self._meet(place, f"{type(error).__name__}: {said[0]}")

    def _meet(self, place: int | None = None, text: str = "") -> None:
        """The short message that begins every exchange."""
        if self.broken is not None:
            raise RankError(self.broken)
        code = self.mark % _CODE
        message = [0, 0, 0, int(taken() or self._asked), code, code * code]
        if place is not None:
            message[place] = 1
        self._asked = False
        *counts, codes, squares = self._summed(torch.tensor(message, dtype=torch.long, device="cpu")).tolist()
        self.alike = squares * self.world == codes * codes  # equal if and only if all codes are
        self._stopping = self._stopping or counts[_SIGNAL] > 0
        if not any(counts[:_SIGNAL]):
            return
        said = self._words(text)
        if counts[_ERROR]:
            self.broken = said
            raise RankError(said)
        raise _NotFiniteThere(said) if counts[_NOT_FINITE] else _InterruptedThere

    def _words(self, text: str) -> str:
        """What the processes that failed say, one row of letters each."""
        table = torch.zeros(self.world, _WORDS, dtype=torch.long, device="cpu")
        letters = text.encode()[:_WORDS]
        table[self.rank, : len(letters)] = torch.tensor(list(letters), dtype=torch.long, device="cpu")
        rows = self._summed(table).tolist()
        words = [bytes(code for code in row if code).decode(errors="ignore") for row in rows]
        return "; ".join(f"rank {rank} failed: {said}" for rank, said in enumerate(words) if said)

    def _summed(self, value: Tensor) -> Tensor:
        with self._unbroken():
            moved = value.detach().to(self.device).contiguous()
            torch.distributed.all_reduce(moved)
            return moved.to(value.device)

    @contextlib.contextmanager
    def _unbroken(self) -> Iterator[None]:
        """An exchange that is left half done leaves the processes out of step: there is none after it."""
        try:
            yield
        except BaseException as error:
            self.broken = f"another process ended while rank {self.rank} waited for it: {error}"
            if isinstance(error, RuntimeError):
                raise RankError(self.broken) from error
            raise
