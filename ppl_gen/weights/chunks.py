"""Log weights of many particles, chunk after chunk: a chunk fits the cache, and what it computes is replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ppl_gen.capture.repeated import Repeated
from ppl_gen.data.batching import Batch
from ppl_gen.program.info import ProgramInfo
from ppl_gen.weights.log_weights import traced_together
from ppl_gen.weights.particles import can_vectorise, local_log_weights, most_at_once
from ppl_gen.weights.sizes import Largest
from ppl_gen.workspace.isolation import without_side_effects

__all__ = ["Chunks"]

CACHED = 2**20  # numbers of the largest tensor: it is read again from the cache, and Python is paid for seldom enough


@dataclass
class Chunks:
    """Weights of particles of the latents of rows, for batch after batch, at draw after draw of the globals.

    Chunks are of the same size whether they are replayed or not, so that both draw the same random numbers.

    Args:
        model, guide, info: of the program; a guide of None draws from the prior.
        sums: finite sites that are summed out.
        particles: how many for each row and draw.
        times: for how many batches and draws, about.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any] | None
    info: ProgramInfo
    sums: tuple[str, ...]
    particles: int
    times: int
    repeated: Repeated | None = None
    _sizes: dict[int | None, tuple[bool, int]] = field(default_factory=dict)
    _chooses: bool = False  # the program takes some rows of a plate by chance

    def __call__(self, batch: Batch, draws: Sequence[Mapping[str, Tensor]]) -> Iterator[tuple[int, Tensor]]:
        """The place of a draw among ``draws``, and log weights of some of its particles, n x rows, in nats."""
        vectorise, most = self._looked(batch)
        new = True
        for place, values in enumerate(draws):
            left, known = self.particles, dict(values)
            while left > 0:
                count = min(most, left)
                yield place, self._weights(batch, known, count, vectorise, new)
                left, new = left - count, False

    def _looked(self, batch: Batch) -> tuple[bool, int]:
        """Whether particles go together, and how many of them at a time."""
        if batch.rows not in self._sizes:
            together = can_vectorise(self.model, self.guide, self.info, batch, self.sums)
            self._sizes[batch.rows] = together, self._most(batch) if together else 1
        together, most = self._sizes[batch.rows]
        if self.repeated is None:
            self.repeated = Repeated(-(-self.particles // most) * self.times)
        return together, most

    def _most(self, batch: Batch) -> int:
        with without_side_effects(), Largest() as largest:
            traced_together(self.model, self.guide, self.info, batch, 2, {})
        return max(1, min(most_at_once(batch), 2 * CACHED // largest.numbers))

    def _weights(self, batch: Batch, known: dict[str, Tensor], count: int, vectorise: bool, new: bool) -> Tensor:
        """Of ``count`` particles; ``known`` takes what the program chose itself, for the particles that follow."""
        chosen: dict[str, Tensor] = {}
        names, parts = tuple(known), (batch.args, batch.kwargs, batch.index)
        leaves, structure = tree_flatten((parts, list(known.values())))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        fixed = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)

        def run(given: Sequence[Tensor]) -> Tensor:
            following = iter(given)
            filled = [next(following) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            (args, kwargs, index), values = tree_unflatten(filled, structure)
            found = local_log_weights(
                self.model,
                self.guide,
                self.info,
                replace(batch, args=args, kwargs=kwargs, index=index),
                count,
                values=dict(zip(names, values, strict=True)),
                sums=self.sums,
                vectorise=vectorise,
            )
            chosen.update({name: rows for name, rows in found.subsample.items() if not _in_order(rows)})
            assert found.rows is not None
            return found.rows.detach()

        assert self.repeated is not None
        if self._chooses or not all(leaf is None or isinstance(leaf, bool | int | float | str) for leaf in fixed):
            weights = run(tensors)
        else:  # what is no tensor tells by its value what the program does with it
            kind = (count, names, str(structure), fixed, *map(type, fixed), batch.rows, batch.total)
            weights = self.repeated(tensors, kind, run, new=new)
        self._chooses = self._chooses or bool(chosen)  # seen at the first call, which is never a replay
        known |= chosen
        return weights


def _in_order(rows: Tensor) -> bool:
    """Whether these are all rows of a plate, as they come."""
    return torch.equal(rows, torch.arange(len(rows), device=rows.device, dtype=rows.dtype))
