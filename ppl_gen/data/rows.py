"""A mapping of tensors that share their rows, with an optional fresh draw for every batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from ppl_gen.arguments import require_function, require_mapping

__all__ = ["Rows"]


@dataclass(frozen=True, eq=False, repr=False)
class Rows(Mapping[str, Tensor]):
    """Named tensors with the same first dimension, the rows; a mapping, so it is data for any fit.

    ``on_batch`` is applied to every gathered batch (a dictionary of those entries that the program asks for) and
    returns the batch to be used instead. It draws from torch's global generator, which a fit seeds, so the draws
    differ from batch to batch and repeat from fit to fit. Reading an entry by name never applies it.

    Args:
        entries: tensors by name, each (rows, ...).
        on_batch: batch -> batch, with the same names and rows; None leaves batches as they are.

    Raises:
        ValueError: without entries, or where the entries differ in their number of rows.
        TypeError: for an entry that is no tensor.

    Example:
        >>> import torch
        >>> rows = Rows({"x": torch.zeros(5, 2), "y": torch.arange(5)})
        >>> rows
        Rows(x: (5, 2) float32, y: (5,) int64)
        >>> rows["x"][:3].shape
        torch.Size([3, 2])
    """

    entries: Mapping[str, Tensor]
    on_batch: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None

    def __post_init__(self) -> None:
        require_mapping("entries", self.entries, "a mapping from names to tensors")
        require_function("on_batch", self.on_batch)
        for name, value in self.entries.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"entry {name!r}: expected a tensor, got {type(value).__name__}")
            if value.ndim == 0:
                raise ValueError(f"entry {name!r}: expected rows along the first dimension, got a single number")
        sizes = {name: len(value) for name, value in self.entries.items()}
        if len(set(sizes.values())) != 1:
            listed = ", ".join(f"{name}: {size}" for name, size in sizes.items()) or "none"
            raise ValueError(f"entries: expected at least one, all with the same number of rows, got {listed}")
        object.__setattr__(self, "entries", MappingProxyType(dict(self.entries)))

    def __getitem__(self, name: str) -> Tensor:
        return self.entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        shown = (f"{name}: {tuple(v.shape)} {str(v.dtype).removeprefix('torch.')}" for name, v in self.items())
        return f"Rows({', '.join(shown)}{', redrawn for every batch' if self.on_batch else ''})"

    def __reduce__(self) -> tuple[object, ...]:
        # The read-only view of the entries cannot be pickled; processes of a comparison need the data.
        return Rows, (dict(self.entries), self.on_batch)
