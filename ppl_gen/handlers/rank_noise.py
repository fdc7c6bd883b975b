"""Which random numbers the draws of a program take where several processes learn it together.

A draw outside of the plate of the rows is the same on all processes. One inside is the share of the draw that one
process would make for the whole batch, where its noise does not depend on the rows: normal, uniform and other fills,
and single draws of Bernoulli and categorical sites. What rejects and tries again (gamma, beta, Dirichlet, Poisson) has
no such share, and is drawn from the process's own stream: independent from process to process, of the same law.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ppl_gen.handlers.sites import in_plate, is_subsample
from ppl_gen.runtime.ranks import Share

if TYPE_CHECKING:
    from ppl_gen.workspace.streams import Streams

__all__ = ["RankNoise", "rows_noise"]

_ATEN = torch.ops.aten
_FILLS = {
    _ATEN.normal_.default,
    _ATEN.uniform_.default,
    _ATEN.exponential_.default,
    _ATEN.cauchy_.default,
    _ATEN.log_normal_.default,
    _ATEN.geometric_.default,
}
_MADE = {_ATEN.rand.default, _ATEN.randn.default}
_RANDOM = torch.Tag.nondeterministic_seeded


class RankNoise(Messenger):
    """Draws the sites of a program in a process that holds the ``share`` of a batch; inside of ``streams.own``."""

    def __init__(self, plate: str | None, share: Share, streams: Streams) -> None:
        super().__init__()
        self.plate, self.share, self.streams = plate, share, streams

    def _pyro_sample(self, msg: Any) -> None:
        if msg["done"] or msg["is_observed"] or msg["value"] is not None:
            return
        if is_subsample(msg):
            if getattr(msg["fn"], "size", None) == self.share.count and msg["name"] == self.plate:
                return  # a choice among rows: each process chooses among its own
            rows: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        elif in_plate(msg, self.plate):
            frame = next(f for f in msg["cond_indep_stack"] if f.name == self.plate)
            shape = getattr(msg["fn"], "batch_shape", ())
            if frame.dim is None or len(shape) + frame.dim < 0:
                return
            rows = _RowNoise(len(shape) + frame.dim, self.share, self.streams)
        else:
            rows = contextlib.nullcontext()
        with self.streams.common(), rows:
            msg["value"] = msg["fn"](*msg["args"], **msg["kwargs"])


@contextlib.contextmanager
def rows_noise(share: Share, streams: Streams) -> Iterator[None]:
    """Around what draws for the rows of a batch, which come first: these random numbers are a share too."""
    with streams.common(), _RowNoise(0, share, streams):
        yield


class _RowNoise(TorchDispatchMode):
    """Random numbers for all rows of the batch, along ``axis``, of which this process's are kept."""

    def __init__(self, axis: int, share: Share, streams: Streams) -> None:
        super().__init__()
        self.axis, self.share, self.streams = axis, share, streams

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _RANDOM not in func.tags:
            return func(*args, **kwargs)
        if func in _FILLS and self._by_row(args[0].shape):
            every = args[0].new_empty(self._whole(args[0].shape))
            return args[0].copy_(self._own(func(every, *args[1:], **kwargs)))
        if func in _MADE and self._by_row(args[0]):
            return self._own(func(self._whole(args[0]), *args[1:], **kwargs)).contiguous()
        if func is _ATEN.bernoulli.default and self._by_row(args[0].shape):
            return self._own(func(self._padded(args[0]), *args[1:], **kwargs)).contiguous()
        if func is _ATEN.multinomial.default and self._one_category_each(args):
            return self._own(func(self._padded(args[0]), *args[1:], **kwargs)).contiguous()
        with self.streams.apart():
            return func(*args, **kwargs)

    def _by_row(self, shape: Any) -> bool:
        return len(shape) > self.axis and shape[self.axis] == self.share.count

    def _one_category_each(self, args: Any) -> bool:
        """Rows x categories, one draw each: rows of other plates beside these would be folded in among them."""
        return bool(self.axis == 0 and args[0].dim() == 2 and args[1] == 1 and self._by_row(args[0].shape))

    def _whole(self, shape: Any) -> list[int]:
        return [self.share.whole if i == self.axis else size for i, size in enumerate(shape)]

    def _padded(self, probs: Tensor) -> Tensor:
        every = probs.new_full(self._whole(probs.shape), 0.5)
        self._own(every).copy_(probs)
        return every

    def _own(self, value: Tensor) -> Tensor:
        return value.narrow(self.axis, self.share.first, self.share.count)
