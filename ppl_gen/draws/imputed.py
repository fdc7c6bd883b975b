"""Rows that are seen in part, completed by a program that says how (`Program.imputes`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppl_gen.data.arrays import as_array
from ppl_gen.data.batching import Batch
from ppl_gen.data.on_disk import RowsOnDisk
from ppl_gen.draws.predictive import global_draws, positive

if TYPE_CHECKING:
    from ppl_gen.fits.result import Fit

__all__ = ["asks_to_complete", "completed_rows", "seen_rows"]

_ELEMENTS = 2_000_000  # numbers of rows that are completed at a time


def asks_to_complete(fit: Fit, data: Any) -> bool:
    """Whether ``data`` hold a mask, and the program completes the rows that it leaves open."""
    return fit.program.imputes is not None and isinstance(data, Mapping) and data.get("mask") is not None


def completed_rows(fit: Fit, data: Mapping[str, Any], draws: int, seed: int | None) -> dict[str, Tensor]:
    """See `Fit.predict`: draws x rows x shape, entries that are seen as they are."""
    positive("draws", draws)
    seen, rows = seen_rows(data)
    dataset = fit.dataset(rows)
    seen = seen.to(dataset.device or "cpu")
    assert fit.program.imputes is not None
    with fit.bound(seed):
        batch = dataset.batch()
        shared = bool(fit.info.select(local=False))
        at_once = 1 if shared else max(1, _ELEMENTS // max(1, seen.numel()))
        found: list[dict[str, Tensor]] = []
        for first in range(0, draws, at_once):
            times = min(at_once, draws - first)
            many = _repeated(batch, times)
            values = global_draws(fit, 1)[0] if shared else {}
            mask = seen.repeat(times, *[1] * (seen.dim() - 1))
            made = fit.program.imputes(values, mask, *many.args, **many.kwargs)
            _check_completed(made, rows["x"].to(mask.device), mask)
            found.append({name: value.detach().unflatten(0, (times, -1)) for name, value in made.items()})
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}


def _check_completed(made: Any, x: Tensor, seen: Tensor) -> None:
    """Raise ValueError unless ``made`` holds the rows at "x", what is seen of them as it was."""
    value = made.get("x") if isinstance(made, Mapping) else None
    if not isinstance(value, Tensor) or value.shape != seen.shape:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(made if value is None else value)
        raise ValueError(
            f"imputes: it has to give a mapping with completed rows of shape {tuple(seen.shape)} at 'x', got {got}"
        )
    given = x.double().repeat(len(seen) // len(x), *[1] * (x.dim() - 1))
    kept = torch.isclose(value.double(), given, rtol=1e-4, atol=1e-6)  # what is made may be in single precision
    if bool((seen & ~kept).any()):
        raise ValueError("imputes: it has to leave what the mask says is seen as it is, and gives other values there")


def seen_rows(data: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """The mask, and the data without it, with zeros for what it hides: nothing can depend on that.

    Raises:
        ValueError: unless the mask holds booleans in the shape of x.
    """
    if data.get("x") is None:
        found = ", ".join(map(str, data))
        raise ValueError(f"data: expected the entry 'x' beside 'mask', which says what is seen of it, got only {found}")
    seen, x = as_array(data["mask"], "mask"), as_array(data["x"], "x")
    seen, x = (v.whole("fit.predict with a mask") if isinstance(v, RowsOnDisk) else v for v in (seen, x))
    if seen.dtype is not torch.bool:
        raise ValueError(f"data 'mask': expected booleans, True where x is observed, got {seen.dtype}")
    if seen.shape != x.shape:
        raise ValueError(
            f"data 'mask': expected the shape of x, {tuple(x.shape)}, got {tuple(seen.shape)}; one mask "
            "for all rows is mask.expand_as(x)"
        )
    return seen, {name: value for name, value in data.items() if name != "mask"} | {"x": torch.where(seen, x, 0)}


def _repeated(batch: Batch, times: int) -> Batch:
    """The rows of a batch, ``times`` over."""

    def over(value: Any) -> Any:
        has_rows = isinstance(value, Tensor) and value.dim() and len(value) == batch.rows
        return value.repeat(times, *[1] * (value.dim() - 1)) if has_rows else value

    rows = None if batch.rows is None else times * batch.rows
    kwargs = {name: over(value) for name, value in batch.kwargs.items()}
    return replace(batch, args=tuple(map(over, batch.args)), kwargs=kwargs, rows=rows, total=rows)
