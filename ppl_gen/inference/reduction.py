"""One step out of the steps of several processes, each on its share of a batch.

The loss of a batch of B rows is G + N/B sum_i l_i, where G are the terms without rows (priors and divergences of
globals). A process that holds b of the rows computes G + N/b sum l_i of its own. Weighed by b/B these add up to the
loss of the batch, and so do their gradients, whatever the sizes of the shares: G counts once, as the weights sum to 1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from ppl_gen.data.batches import Batches
from ppl_gen.data.batching import Batch
from ppl_gen.fitting.run import Run
from ppl_gen.handlers.rank_noise import RankNoise, rows_noise
from ppl_gen.inference.buffers import Buffers
from ppl_gen.inference.objectives.game import Game
from ppl_gen.runtime.ranks import Ranks, Share, number_of
from ppl_gen.workspace.streams import Streams

__all__ = ["Together"]

OWN = (
    "random numbers that do not follow the rows (dropout, gamma and other draws that reject) are "
    "each process's own: the losses have the law of one process's, and other values"
)


class Together:
    """What the processes that learn one fit do around each step: noise, one sum, statistics of networks.

    Args:
        run: whose ``ranks`` learn together.
        game: what they play.
    """

    def __init__(self, run: Run, game: Game) -> None:
        self.ranks, self.run, self.networks = run.ranks, run, Buffers(run.workspace, game)
        self.streams = Streams(run.seed, run.ranks.rank, run.data.device)
        self.versions: dict[int, int] = {}
        self.stale = False  # whether random numbers were put back, to those of the first process's devices

    def begin(self, leaves: Sequence[Tensor]) -> None:
        """All start from the first process's parameters, buffers and random numbers.

        Raises:
            ValueError: where frozen weights differ: no fit holds them, so that the others' would stay with the program.
        """
        frozen = {
            f"{i}.{name}": p
            for i, module in enumerate(self.networks.modules())
            for name, p in module._parameters.items()
            if p is not None and not p.requires_grad
        }
        self.ranks.agree({"frozen weights": number_of(frozen)})
        with torch.no_grad():
            for tensor in [*leaves, *self._buffers()]:
                tensor.copy_(self.ranks.broadcast(tensor))
        self._in_step()

    @contextlib.contextmanager
    def batch(self, source: Batches) -> Iterator[Batch]:
        """This process's share of the next batch, for one update inside: draws for rows are its own, others common."""
        if self.stale:
            self._in_step()
            self.stale = False
        self.versions = {id(buffer): buffer._version for buffer in self._buffers()}
        with self.ranks.told(), self.streams.own(source.drawn):
            source.around = lambda share: rows_noise(share, self.streams)
            batch = source.next()
            assert batch.share is not None
            with RankNoise(self.run.info.data_plate, batch.share, self.streams):
                yield batch
        if self.streams.drawn:
            self.run.notes.setdefault("noise", OWN)
        if not self.ranks.alike:
            self._in_step()

    def reduced(self, values: Sequence[Tensor], share: Share) -> list[Tensor]:
        """The means of ``values`` over all rows of the batch, bit for bit the same everywhere, by one exchange.

        The running statistics of networks that this update has written are averaged in place. Whole numbers, such as
        counts, become those of the first process.
        """
        buffers = self._written()
        whole = float(self.ranks.first)
        weights = [share.weight if v.is_floating_point() else whole for v in (*values, *buffers)]
        self.ranks.mark = self.streams.fingerprint()
        means = _weighted_sums([*values, *buffers], weights, self.ranks)
        with torch.no_grad():
            for buffer, mean in zip(buffers, means[len(values) :], strict=True):
                buffer.copy_(mean)
        return means[: len(values)]

    def _in_step(self) -> None:
        for generator in self.streams.generators:
            generator.set_state(self.ranks.broadcast(generator.get_state()))

    def _written(self) -> list[Tensor]:
        """The buffers that this update wrote to: constants are not sent around."""
        # torch's norms write without counting it in the version of the tensor.
        normed = {
            id(b) for m in self.networks.modules() if isinstance(m, _NormBase) and m.training for b in m.buffers()
        }
        return [b for b in self._buffers() if id(b) in normed or self.versions.get(id(b)) != b._version]

    def _buffers(self) -> list[Tensor]:
        return list({id(b): b for b in self.networks.values()}.values())


def _weighted_sums(values: Sequence[Tensor], weights: Sequence[float], ranks: Ranks) -> list[Tensor]:
    """The sums over processes of ``weights[i] * values[i]``, each in the shape, strides and dtype of its value."""
    dtype = torch.float32
    for value in values:
        dtype = torch.promote_types(dtype, value.dtype) if value.is_floating_point() else dtype
    # Zero, and not zero times a value that may be infinite: who holds no rows has no say.
    own = [
        v.detach().flatten().to(dtype) if w else torch.zeros(v.numel(), dtype=dtype, device=v.device)
        for v, w in zip(values, weights, strict=True)
    ]
    flat = torch.cat(own)
    for piece, weight in zip(flat.split([v.numel() for v in values]), weights, strict=True):
        piece.mul_(weight)
    pieces = ranks.all_reduce(flat).split([v.numel() for v in values])
    return [_as(value, piece) for value, piece in zip(values, pieces, strict=True)]


def _as(value: Tensor, piece: Tensor) -> Tensor:
    """A flat piece in the shape, strides and dtype of a value; numbers, which histories keep, let go of the whole."""
    if piece.numel() > 1 and value.dtype is piece.dtype and value.is_contiguous():
        return piece.view(value.shape)
    return torch.empty_like(value).copy_(piece.view(value.shape))
