"""Rows in two parts: one to train on, one held out."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl_gen.data.batching import Constant, Dataset, as_dataset
from ppl_gen.data.on_disk import is_on_disk, on_disk
from ppl_gen.data.rows import Rows
from ppl_gen.data.sources import collected
from ppl_gen.data.streams import Stream
from ppl_gen.program.program import Program, Recipe
from ppl_gen.workspace.isolation import isolated

__all__ = ["SPLIT_SEED", "frozen_draws", "split_rows"]

SPLIT_SEED = 0  # of the one split that all algorithms and seeds share


def split_rows(data: Any, share: float, program: Any = None) -> tuple[Any, Any]:
    """``data`` in two parts, the second of round(share * rows) rows drawn under `SPLIT_SEED`; both in their old order.

    Args:
        data: whatever `pg.fit` takes.
        share: of the rows that are held out, in (0, 1).
        program: where its model names its arguments, other entries of a mapping are left out, as a fit does.

    Raises:
        ValueError: if entries differ in their rows, or either part would have fewer than two of them.

    Example:
        >>> train, test = split_rows(torch.arange(10.0), 0.2)
        >>> train.shape, test.shape, sorted([*train.tolist(), *test.tolist()]) == list(range(10))
        (torch.Size([8]), torch.Size([2]), True)
    """
    if isinstance(data, Stream):
        raise ValueError("holdout: rows of a stream are not at hand to be held out; give test=..., or holdout=0")
    data = collected(data)
    model = program.model if isinstance(program, Program) else program
    if model is not None and not isinstance(model, Recipe):
        dim = program.data_dim if isinstance(program, Program) else 0
        checked = as_dataset(
            data, model, data_dim=dim, missing=True
        )  # what is wrong with the data is said as a fit says it
        if isinstance(data, Mapping) and not isinstance(data, Rows):
            data = _named(data, model)
        if dim or not isinstance(data, Mapping | Tensor | np.ndarray):
            data = checked
    rows = row_count(data)
    held = round(share * rows)
    if held < 2 or rows - held < 2:
        raise ValueError(
            f"holdout: {share:g} of {rows} rows is {held} held out and {rows - held} to train on; at least two of each "
            "are needed. Choose another share, give test=..., or holdout=0 for in-sample values"
        )
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(SPLIT_SEED))
    return _taken(data, order[held:].sort().values), _taken(data, order[:held].sort().values)


def frozen_draws(data: Any) -> Any:
    """``data`` as a yardstick: what is redrawn for every batch is drawn once, the same for every fit.

    >>> rows = Rows({"x": torch.full((4, 1), 0.5)}, on_batch=lambda batch: {"x": torch.bernoulli(batch["x"])})
    >>> torch.equal(frozen_draws(rows)["x"], frozen_draws(rows)["x"]), frozen_draws(rows).on_batch
    (True, None)
    """
    if not isinstance(data, Rows) or data.on_batch is None:
        return data
    with isolated(SPLIT_SEED):
        return Rows(data.on_batch(dict(data)))


def _named(data: Mapping[str, Any], model: Any) -> dict[str, Any]:
    parameters = inspect.signature(model.forward if isinstance(model, torch.nn.Module) else model).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return dict(data)
    return {name: value for name, value in data.items() if name in parameters}


def _columns(data: Any) -> bool:
    """Whether a tuple holds arrays, one for each argument, rather than numbers, one for each row."""
    return isinstance(data, tuple) and any(isinstance(value, Tensor | np.ndarray) for value in data)


def _has_rows(value: Any) -> bool:
    return not isinstance(value, Constant | bool | int | float | str | None) and np.ndim(value) > 0


def row_count(data: Any) -> int:
    if isinstance(data, Stream):
        return data.rows
    if isinstance(data, Dataset):
        sizes = {name: len(value) for name, value in data.entries.items()}
    elif isinstance(data, Mapping):
        sizes = {name: len(value) for name, value in data.items() if _has_rows(value)}
    elif _columns(data):
        sizes = {f"value {i}": len(value) for i, value in enumerate(data) if _has_rows(value)}
    else:
        if not hasattr(data, "__len__") or np.ndim(data) == 0:
            raise TypeError(f"data: expected a tensor, an array or a mapping of them, got {type(data).__name__}")
        sizes = {"data": len(data)}
    if len(set(sizes.values())) != 1:
        listed = ", ".join(f"{name}: {size}" for name, size in sizes.items()) or "no entry with rows"
        raise ValueError(
            f"data: entries must share their rows (first dimension) to be split, got {listed}; wrap what has no rows "
            "in pg.constant(...)"
        )
    return next(iter(sizes.values()))


def _taken(data: Any, index: Tensor) -> Any:
    if isinstance(data, Dataset):
        return data.subset(index)
    if isinstance(data, Rows):
        return Rows({name: value[index] for name, value in data.items()}, data.on_batch)
    if isinstance(data, Mapping):
        return {name: _taken(value, index) if _has_rows(value) else value for name, value in data.items()}
    if _columns(data):
        return type(data)(_taken(value, index) if _has_rows(value) else value for value in data)
    if is_on_disk(data):
        return on_disk(data).chosen(index)
    if isinstance(data, Tensor):
        return data[index.to(data.device)]
    return np.asarray(data)[index.numpy()]
