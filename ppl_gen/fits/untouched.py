"""Data stay as they were passed: a program that changes them in place is refused, and they are put back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor

from ppl_gen.data.batching import LARGE, Dataset

__all__ = ["untouched"]


@contextlib.contextmanager
def untouched(data: Dataset, *, kept: bool) -> Iterator[None]:
    """Raise ValueError, naming the entry, where what runs inside changes a tensor of the data in place.

    ``kept``: put back what a look at the program has changed; of large data it sees a copy of some rows.
    """
    tensors = {n: v for n, v in data.entries.items() if isinstance(v, Tensor) and not v.is_inference()}
    versions = {name: value._version for name, value in tensors.items()}
    copies = {name: value.clone() for name, value in tensors.items()} if kept and data.elements <= LARGE else {}
    try:
        yield
    finally:
        changed = [name for name, value in tensors.items() if value._version != versions[name]]
        for name in copies.keys() & set(changed):
            tensors[name].copy_(copies[name])
    if changed:
        raise ValueError(
            f"data {changed[0]!r}: {'the program' if kept else 'the program, or a network of the objective,'} changes "
            "it in place, so that no two runs would see the same rows; let what works in place (relu_, mul_, a first "
            f"layer with inplace=True) have a copy, as by {changed[0]}.clone()"
            + ("" if kept else ". The rows that were passed are changed: make them again")
        )
