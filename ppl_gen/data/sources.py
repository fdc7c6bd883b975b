"""torch.utils.data sources as entries: what can be gathered by index is gathered once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["Columns", "collected"]


class Columns(tuple[Any, ...]):
    """What the items of a torch Dataset hold, column by column: they fill the model's arguments in order."""


def collected(data: Any) -> Any:
    """A tensor or mapping from a map-style Dataset or a DataLoader; anything else is returned as it is.

    The items of a Dataset are collated once and kept, so that batches are gathered from a resident tensor; a
    DataLoader contributes its dataset and its collate function, while batch size and order are the algorithm's. Items
    that are tuples become `Columns`: (x, label) fills the first two arguments of a model that has two.

    Raises:
        TypeError: for iterable-style data, whose number of rows (N in every plate scale) is unknown, and for a sampler
            that chooses or weighs rows.
        ValueError: for a dataset without items.

    Example:
        >>> collected(torch.utils.data.TensorDataset(torch.arange(3.0))).tolist()
        [0.0, 1.0, 2.0]
    """
    if isinstance(data, torch.utils.data.DataLoader):
        _check_sampler(data)
        single = data.collate_fn is torch.utils.data.default_convert  # of a loader that does not batch
        return _stacked(data.dataset, torch.utils.data.default_collate if single else data.collate_fn)
    if isinstance(data, torch.utils.data.IterableDataset):
        raise TypeError(
            "data: an IterableDataset has no known number of rows; pass pg.stream(DataLoader(dataset, batch_size=100), "
            "rows=...), a map-style Dataset or a tensor"
        )
    if isinstance(data, torch.utils.data.Dataset) and not isinstance(data, Mapping):
        return _stacked(data, torch.utils.data.default_collate)
    return data


def _check_sampler(loader: Any) -> None:
    """Order and batch size are the algorithm's, but a sampler that leaves rows out would be passed over in silence."""
    if isinstance(loader.dataset, torch.utils.data.IterableDataset):
        return
    known = torch.utils.data.SequentialSampler | torch.utils.data.RandomSampler
    grouped = type(loader.batch_sampler) in (torch.utils.data.BatchSampler, type(None))
    if not grouped or not isinstance(loader.sampler, known):
        chooser = loader.sampler if grouped else loader.batch_sampler
        raise TypeError(
            f"data: the loader's {type(chooser).__name__} chooses or weighs rows, and batches are drawn by the "
            "algorithm; pass torch.utils.data.Subset(dataset, indices) instead"
        )


def _stacked(dataset: Any, collate: Any) -> Any:
    if isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, "__len__"):
        raise TypeError(
            "data: the loader's dataset has no known number of rows; pass pg.stream(loader, rows=...), a map-style "
            "Dataset or a tensor"
        )
    if not len(dataset):
        raise ValueError("data: the dataset holds no items; expected at least one row")
    if isinstance(dataset, torch.utils.data.TensorDataset) and collate is torch.utils.data.default_collate:
        columns: Any = list(dataset.tensors)
    else:
        columns = collate([dataset[i] for i in range(len(dataset))])
    if isinstance(columns, Tensor | Mapping):
        return columns
    if isinstance(columns, list | tuple) and columns and all(isinstance(column, Tensor) for column in columns):
        return columns[0] if len(columns) == 1 else Columns(columns)
    raise TypeError(f"data: items of the dataset collate to {type(columns).__name__}; expected tensors or a mapping")
