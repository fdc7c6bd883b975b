"""Entries that say what is missing from others: how they are known, and what is said where nothing reads them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ppl_gen.data.arrays import shared
from ppl_gen.data.on_disk import is_on_disk, on_disk
from ppl_gen.data.sources import collected
from ppl_gen.data.streams import Stream
from ppl_gen.errors import IncompatibleError

if TYPE_CHECKING:
    from ppl_gen.data.batching import Dataset

__all__ = ["looks_like_mask", "refuse_unread_masks"]

_WORDS = frozenset(
    "absent available given hidden invalid isna isnan known na nan notna null obs ok present seen unknown unobs unseen "
    "valid visible".split()
)
_PARTS = ("isnull", "mask", "missing", "notnull", "observed")
_MOST = 100_000  # numbers that are looked at


def looks_like_mask(name: str, value: Any, entries: Mapping[str, Any], *, read: bool = True) -> bool:
    """Whether an entry says which others are missing: by its name, or as booleans in the shape of a whole table.

    Of an entry that nothing is known to ``read``, zeros and ones in that shape are enough: an argument of a model that
    holds them may be data.

    >>> x = torch.zeros(2, 3)
    >>> looks_like_mask("isKnown", [0, 1], {"x": x}), looks_like_mask("b", x > 0, {"x": x})
    (True, True)
    >>> looks_like_mask("b", x, {"x": x}), looks_like_mask("b", x, {"x": x}, read=False)
    (False, True)
    """
    if value is None:
        return False
    if is_on_disk(value):
        value = on_disk(value)[: max(1, min(len(value), _MOST))] if len(value) else None
    if value is None:
        return False
    try:
        flags = shared(np.asarray(value)) if not isinstance(value, Tensor) else value
    except (TypeError, ValueError, RuntimeError):
        return False
    whole = {tuple(entry.shape) for other, entry in entries.items() if other != name and entry.ndim > 1}
    boolean = flags.dtype is torch.bool
    if boolean and tuple(flags.shape) in whole:
        return True
    suspect = _named_like_one(str(name)) or (not read and tuple(flags.shape) in whole)
    few = flags.reshape(-1)[:_MOST]
    return suspect and (boolean or bool(((few == 0) | (few == 1)).all()))


def _named_like_one(name: str) -> bool:
    words = re.split(r"[^a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower())
    return not _WORDS.isdisjoint(words) or any(part in name.lower() for part in _PARTS)


def _named(data: Any) -> Mapping[str, Any]:
    """What was passed, by the names that `Call.left_out` has for it."""
    data = data._asdict() if hasattr(data, "_asdict") else data
    if isinstance(data, tuple):
        return {f"column {i} of the dataset": value for i, value in enumerate(data)}
    if hasattr(data, "columns") and hasattr(data, "shape"):  # a table
        return {str(name): data[name] for name in data.columns}
    return {str(name): value for name, value in data.items()} if isinstance(data, Mapping) else {}


def refuse_unread_masks(rows: Dataset, names: Collection[str], program: str) -> None:
    """Raise IncompatibleError if one of ``names``, which nothing reads, looks like a mask.

    What it hides would be taken for data, without a word.
    """
    original = rows.original.first if isinstance(rows.original, Stream) else rows.original
    data, entries = _named(collected(original)), rows.entries
    values = {
        name: getattr(data[name], "value", data[name]) for name in sorted(names) if name in data
    }  # of pg.constant
    if found := [name for name, value in values.items() if looks_like_mask(name, value, entries, read=False)]:
        raise IncompatibleError(
            f"data: {found[0]!r} looks like a mask, and the program {program!r} does not read it: its answers would be "
            "those of whole rows. Leave it out, since nothing reads it, or use a program that takes one "
            "(ppca and factor_analysis read the entry 'mask'; fit.predict of a diffusion model completes rows by it)"
        )
