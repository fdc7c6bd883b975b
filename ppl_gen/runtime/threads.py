"""How many threads torch takes: for a while, and by the size of the work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["ParallelWork", "torch_threads"]

_aten = torch.ops.aten
#: Products, and the place of the argument whose last dimension is summed over.
_PRODUCTS = {_aten.mm: 0, _aten.bmm: 0, _aten.addmm: 1, _aten.baddbmm: 1, _aten.mv: 0, _aten.addmv: 1}

# Seconds, measured: a floating-point operation of a matrix product, a number that another operation reads or makes,
# the meeting of threads after an operation, and the Python of one. Which number of threads is quicker hangs on ratios,
# and those differ little between machines.
_FLOP, _NUMBER, _MEETING, _CALL = 1e-11, 1e-9, 1.5e-5, 8e-6
_SHARED_NUMBERS, _SHARED_FLOPS = 32_768, 1_000_000  # from which torch parts an operation among threads
_WORTH = 0.2  # of the time of a step that threads have to save: where other work waits for them, they cost more


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Torch on so many threads inside: the last bits of a sum depend on how it was shared out.

    >>> before = torch.get_num_threads()
    >>> with torch_threads(1):
    ...     torch.get_num_threads()
    1
    >>> torch.get_num_threads() == before
    True
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class ParallelWork(TorchDispatchMode):
    """Counts the work of the operations inside, and how much of it several threads can share.

    Sizes alone are counted, and no clock is read: the same step gives the same answer on every machine.

    >>> with ParallelWork() as small:
    ...     _ = torch.ones(50, 50) @ torch.ones(50, 50)
    >>> with ParallelWork() as large:
    ...     _ = torch.ones(500, 500) @ torch.ones(500, 500)
    >>> small.threads(2), large.threads(2)
    (1, 2)
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls, self._seconds = 0, 0.0
        self._shared: list[float] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True would import the compiler to switch it off

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._calls += 1
        aliases = (returned.alias_info for returned in func._schema.returns)
        if any(alias is not None and not alias.is_write for alias in aliases):
            return result  # a view
        flops = _flops(func.overloadpacket, args, result)
        if flops:
            self._add(flops * _FLOP, flops >= _SHARED_FLOPS)
        else:
            numbers = max((leaf.numel() for leaf in tree_leaves((args, result)) if isinstance(leaf, Tensor)), default=0)
            self._add(numbers * _NUMBER, numbers >= _SHARED_NUMBERS)
        return result

    def _add(self, seconds: float, shared: bool) -> None:
        self._seconds += seconds
        if shared:
            self._shared.append(seconds)

    def threads(self, most: int) -> int:
        """``most`` where so many threads save a good part of the time of a single one, else 1."""
        saved = sum(seconds * (1 - 1 / most) - _MEETING for seconds in self._shared)
        return most if saved > _WORTH * (self._seconds + _CALL * self._calls) else 1


def _flops(operation: Any, args: Any, result: Any) -> int:
    """Of a product or a convolution; 0 for everything else."""
    if operation in _PRODUCTS:
        return int(2 * result.numel() * args[_PRODUCTS[operation]].shape[-1])
    if operation is _aten.convolution:
        return int(2 * result.numel() * args[1][0].numel())
    if operation is _aten.convolution_backward:
        return int(4 * args[0].numel() * args[2][0].numel())
    return 0
