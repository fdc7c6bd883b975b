"""What a comparison runs: the split of the rows, one line per fit, one process or several."""

from __future__ import annotations

import contextlib
import hashlib
import math
import pickle
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from ppl_gen.data.batching import Constant, Dataset, as_dataset
from ppl_gen.data.rows import Rows
from ppl_gen.data.sources import collected
from ppl_gen.dryrun import ProgramInfo, dry_run
from ppl_gen.errors import IncompatibleError, NonFiniteError
from ppl_gen.inference.base import Algorithm
from ppl_gen.isolation import Workspace, isolated
from ppl_gen.program import Program, Recipe, filtered
from ppl_gen.result import Fit, Status

if TYPE_CHECKING:
    import pandas

    from ppl_gen.diagnostics.evidence import Evidence

__all__ = ["SPLIT_SEED", "Line", "Task", "inspected", "one_by_one", "side_by_side", "split_rows", "yardstick_rows"]

SPLIT_SEED = 0  # of the one split that all algorithms and seeds share

Job = tuple[str, Algorithm, int]


@dataclass(frozen=True)
class Line:
    """One algorithm under one seed: its fit where there is one, and what the yardsticks say of it."""

    label: str
    seed: int
    status: str
    message: str
    seconds: float = math.nan
    fit: Fit | None = None
    evidence: Evidence | None = None
    verdict: str = ""
    pareto_k: float = math.nan
    summary: pandas.DataFrame | None = None
    traceback: str = ""


@dataclass(frozen=True)
class Task:
    """What all fits of a comparison share. ``test`` None: the training rows are the yardstick."""

    recipe: Recipe
    train: Any
    test: Any
    particles: int = 100
    draws: int = 100
    threads: int = 1
    device: str | torch.device | None = None
    dtype: torch.dtype | None = None
    mark: str = ""


def split_rows(data: Any, share: float, program: Any = None) -> tuple[Any, Any]:
    """``data`` in two parts, the second of round(share * rows) rows; both keep the order of the rows.

    Raises:
        ValueError: if entries differ in their rows, or either part would have fewer than two of them.

    Example:
        >>> train, test = split_rows(torch.arange(10.0), 0.2)
        >>> train.shape, test.shape, sorted([*train.tolist(), *test.tolist()]) == list(range(10))
        (torch.Size([8]), torch.Size([2]), True)
    """
    data = collected(data)
    if isinstance(data, Mapping) and not isinstance(data, Rows) and isinstance(program, Program):
        data = _named(data, program)
    rows = _count(data)
    held = round(share * rows)
    if held < 2 or rows - held < 2:
        raise ValueError(
            f"holdout: {share:g} of {rows} rows leaves {rows - held} to train on and {held} held out; at least two of "
            "each are needed. Choose another share, give test=..., or holdout=0 for in-sample values"
        )
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(SPLIT_SEED))
    return _taken(data, order[held:].sort().values), _taken(data, order[:held].sort().values)


def _named(data: Mapping[str, Any], program: Program) -> Mapping[str, Any]:
    """Entries that the model does not name are left out of a fit, so their lengths do not matter here."""
    kept: dict[str, Any] = {}
    filtered(_keywords(program.model, kept))(**data)
    return kept


def _keywords(model: Any, kept: dict[str, Any]) -> Any:
    import functools

    @functools.wraps(model.forward if isinstance(model, torch.nn.Module) else model)
    def keep(**kwargs: Any) -> None:
        kept.update(kwargs)

    return keep
