"""What of a batch is an input of a captured step: its tensors. What else it holds is part of what was captured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from ppl_gen.data.batching import Batch

__all__ = ["constants_of", "shape_of", "tensors_of", "with_tensors"]


def tensors_of(batch: Batch) -> list[Tensor]:
    """The tensors of a batch, in a fixed order."""
    return [leaf for leaf in _leaves(batch) if isinstance(leaf, Tensor)]


def constants_of(batch: Batch) -> list[Any]:
    """All else that it holds."""
    return [leaf for leaf in _leaves(batch) if not isinstance(leaf, Tensor)]


def shape_of(batch: Batch) -> tuple[Any, ...]:
    """What batches have in common that one captured step serves: rows, shapes, dtypes, and all that is no tensor.

    Objects are told apart by their address: whoever keeps it keeps `constants_of` too.
    """
    return (batch.rows, batch.total, *map(_kind, _leaves(batch)))


def with_tensors(batch: Batch, names: Sequence[str], positional: Sequence[str], like: Tensor) -> Batch:
    """The batch with the floats among its arguments ``names`` as tensors, so that they are inputs and not constants."""
    args, kwargs = list(batch.args), dict(batch.kwargs)
    for name in names:
        place: Any = positional.index(name) if name in positional else name
        where: Any = args if isinstance(place, int) else kwargs
        if type(where[place]) is float:
            where[place] = torch.tensor(where[place], dtype=like.dtype, device=like.device)
    return replace(batch, args=tuple(args), kwargs=kwargs)


def _leaves(batch: Batch) -> list[Any]:
    top = [*batch.args, *batch.kwargs.values()]
    if any(isinstance(value, dict | list | tuple) for value in top):
        top = tree_flatten(top)[0]
    return top if batch.index is None else [*top, batch.index]


def _kind(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype
    return leaf if isinstance(leaf, bool | int | float | str | None) else id(leaf)
