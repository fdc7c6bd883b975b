"""From what a user passes to a run that can begin: the program built, data and program looked at, mistakes refused."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ppl_gen.capture.domains import ByRuns, domains_of, outside
from ppl_gen.data.arrays import shared
from ppl_gen.data.batching import Dataset, as_dataset, is_double, is_single
from ppl_gen.data.masks import refuse_unread_masks
from ppl_gen.data.names import Read
from ppl_gen.data.streams import Stream
from ppl_gen.enumeration.broadcasting import unenumerable
from ppl_gen.fits.monitoring import require_evidence
from ppl_gen.fits.result import Fit
from ppl_gen.fits.together import refuse_lone
from ppl_gen.fitting.algorithm import Algorithm
from ppl_gen.fitting.run import Run
from ppl_gen.handlers.ordered import ordered
from ppl_gen.program.adapted import adapted
from ppl_gen.program.checks import check_observed
from ppl_gen.program.differentiable import why_not_differentiable
from ppl_gen.program.dry_run import dry_run
from ppl_gen.program.guide_checks import check_masked
from ppl_gen.program.honoured import refuse_idle_masks
from ppl_gen.program.info import ProgramInfo
from ppl_gen.program.missing import refuse_read_nan
from ppl_gen.program.naming import check_names
from ppl_gen.program.offers import require
from ppl_gen.program.program import Program, Recipe
from ppl_gen.program.unlearned import joint, predictions
from ppl_gen.runtime.ranks import ALONE, Ranks
from ppl_gen.workspace.isolation import isolated, without_side_effects
from ppl_gen.workspace.workspace import Workspace

__all__ = ["built_from", "checked_run", "dtype_of", "inspected", "modules_of", "prepared"]

_TRIED = 8  # rows of which a first look asks for gradients


def dtype_of(data: Any) -> torch.dtype:
    """The one decision about a fit's dtype: float64 where any entry holds it, else float32.

    Data without arrays of floats say nothing, and a program without data holds its own: torch's default dtype decides.
    """
    if isinstance(data, Dataset):
        return data.dtype or torch.float32
    if isinstance(data, Stream):
        return dtype_of(data.first)
    values = list(data.values()) if isinstance(data, Mapping) else data if isinstance(data, tuple) else [data]
    if any(is_double(value) for value in values):
        return torch.float64
    double = torch.get_default_dtype() is torch.float64 and not any(is_single(value) for value in values)
    return torch.float64 if double else torch.float32


def built_from(
    recipe: Recipe, data: Any, dtype: torch.dtype | None, device: torch.device | None, start: Fit | None
) -> tuple[Program, Dataset]:
    given = _as_given(data, None if recipe.as_given else dtype)
    given = Read(given) if type(given) is dict else given
    with torch.device(device or "cpu"):
        built = start.program if start is not None else recipe(given)
    read = start.data.read if start is not None else _read(given)
    dtype = dtype or torch.get_default_dtype()
    rows = as_dataset(data, built.model, dtype=dtype, device=device, read=read, data_dim=built.data_dim, missing=True)
    refuse_unread_masks(rows, rows.left_out, built.name)
    if rows.missing:
        with (
            isolated(0, dtype=rows.dtype),
            Workspace(dtype=rows.dtype, device=device, modules=modules_of(built, start)),
        ):
            refuse_read_nan(built.model, rows)
    return built, rows


@contextlib.contextmanager
def prepared(
    recipe: Recipe,
    data: Any,
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    training: bool | None = None,
) -> Iterator[tuple[Program, Dataset, Workspace]]:
    """The program that ``recipe`` builds of ``data``, and the data, in a workspace and under a seed of their own."""
    with isolated(seed, dtype=dtype or dtype_of(data)):
        built, dataset = built_from(recipe, data, dtype, device, None)
        modules = modules_of(built, None)
        with Workspace(device=device, dtype=dataset.dtype, training=training, modules=modules) as workspace:
            yield built, dataset, workspace


def _read(given: Any) -> Collection[str]:
    """The entries that a recipe has read; of a mapping that does not tell, perhaps all."""
    return given.names if isinstance(given, Read) else list(given) if isinstance(given, Mapping) else ()


def _as_given(data: Any, dtype: torch.dtype | None) -> Any:
    """Recipes see tensors in the fit's dtype, whatever kind of array the user holds."""
    if isinstance(data, Dataset):
        data = data.original
    if isinstance(data, np.ndarray) and not isinstance(data, np.memmap) and data.dtype.kind in "fiub":
        data = shared(data)
    if isinstance(data, Tensor) and data.layout is torch.strided:
        data = data.detach().contiguous()
        return data.to(dtype) if data.is_floating_point() and dtype is not None else data
    return data


def modules_of(program: Program, start: Fit | None) -> dict[str, nn.Module]:
    parts = {"model": program.model, "guide": program.guide if start is None else start.guide}
    return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}


def inspected(program: Program, data: Dataset, guide: Any = None) -> ProgramInfo:
    batch = data.glimpse()
    with without_side_effects():
        look = partial(dry_run, program, batch, fewer=lambda: data.head((batch.rows or 2) // 2))
        info = look()
        if predicted := predictions(program.model, batch, info):
            info = look(predicted=predicted)
        if guide is not None:
            info = look(guide=guide, predicted=predicted)
        check_names(info.sites, [*data.entries, *data.constants])
        info = info.refusing_sums(unenumerable(joint(program.model, info), batch, data.head, info))
        if "differentiable samples" not in info.offers:
            return info
        observed, latent = [s.name for s in info.select(kind="observed")], [s.name for s in info.select()]
        # A graph of gradients holds all that a network computes, and a diffusion model computes its whole chain: a few
        # rows show that slopes arrive, and only where none do are all looked at.
        why = why_not_differentiable(program.model, data.head(_TRIED), observed, latent)
        why = why and why_not_differentiable(program.model, batch, observed, latent)
        return info.refusing_gradients(why)


def _with_plate(program: Program, info: ProgramInfo) -> tuple[Program, dict[str, str]]:
    """The program with the plate that the dry run took for that of the rows, and a note of it."""
    if info.data_plate in (None, program.data_plate):
        return program, {"data plate": f"none: {info.coupled}"} if info.coupled else {}
    taken = f"{info.data_plate!r}, the one plate that follows the rows"
    return replace(program, data_plate=info.data_plate), {"data plate": taken}


def _watched(
    program: Program, data: Dataset, info: ProgramInfo, workspace: Workspace, *, whole: bool
) -> tuple[Dataset, dict[str, str]]:
    """The data, with checks of the rows that the dry run did not see; those at hand are held against these now."""
    if data.rows is None or (data.streamed is None and (data.glimpse().rows or 0) >= data.rows):
        return data, {}
    learned = list(workspace.leaves().values())
    domains = domains_of(program.model, data, info.data_plate, learned=learned)
    late = data.streamed is not None or (data.unseen and (bool(data.beyond_memory) or not whole))
    if not late:
        with isolated():
            said = outside(domains, data)
        if said:
            raise ValueError(f"data: {said}. Mend the value, or drop the row")
    if isinstance(domains, ByRuns):  # a run for every batch would cost a third of a step
        names = ", ".join(domains.names)
        said = f"values of {names} in rows after the first are not held against its support: the program has to be run"
        return data, {"rows": f"{said} for that"} if late else {}
    return replace(data, domains=domains), {}


def checked_run(
    algorithm: Algorithm,
    program: Program,
    data: Dataset,
    workspace: Workspace,
    seed: int,
    start: Fit | None,
    validation: Any,
    ranks: Ranks = ALONE,
) -> Run:
    refuse_lone(algorithm, ranks)
    program = replace(program, guide=ordered(program.guide, data.order))
    program, changes = adapted(program, data.glimpse(), data, vectors=algorithm.vectors)
    info = inspected(program, data)
    if info.coupled and "vectors" in changes:  # a row of the data each, and not one draw of a vector
        raise ValueError(info.coupled)
    check_observed(info, data.glimpse())
    refuse_idle_masks(program, data.glimpse())
    require(algorithm.label, algorithm.needs, program.name, info.offers, why=info.lost(algorithm.needs))
    program, notes = _with_plate(program, info)
    data, unseen = _watched(program, data, info, workspace, whole=not algorithm.subsamples)
    notes = {**program.notes, **notes, **changes, **unseen}
    if data.left_out:
        notes["left out"] = f"{', '.join(data.left_out)}: neither model nor recipe reads them"
    if data.taken:
        listed = ", ".join(f"{name} ({kind})" for name, kind in data.taken.items())
        notes["constants"] = f"{listed}: without rows, passed whole with every batch"
    run = Run(program, data, info, workspace, seed, start, notes=notes, ranks=ranks)
    algorithm.check(run)
    if not algorithm.subsamples:  # the one that does (SVI) has a guide, and looks when it is there
        check_masked(info, None)
    if validation is not None:
        require_evidence(program, info.offers)
    return run
