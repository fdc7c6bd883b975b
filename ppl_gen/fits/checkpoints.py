"""A fit's folder of checkpoints: opened for this fit and no other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pyro

from ppl_gen.data.batching import Dataset
from ppl_gen.errors import PROGRAM_ERRORS, IncompatibleError
from ppl_gen.fits.identity import differing, identity, plain_parts
from ppl_gen.fitting.algorithm import Algorithm
from ppl_gen.fitting.checkpoint import DEFAULT_EVERY, Checkpoint, Every, Followed, require_every
from ppl_gen.fitting.run import Run
from ppl_gen.program.program import Program, Recipe
from ppl_gen.runtime.atomic import as_path
from ppl_gen.runtime.numbered import Numbered
from ppl_gen.workspace.closures import Remembered, functions_of
from ppl_gen.workspace.isolation import without_side_effects
from ppl_gen.workspace.workspace import Workspace

__all__ = ["checked_place", "opened", "refuse_memory"]

_SHOWN = 5


def checked_place(checkpoint: Any, every: Any, algorithm: Algorithm) -> tuple[Numbered | None, Every]:
    """The folder and the interval, refused before anything runs.

    Raises:
        TypeError, ValueError: for what is no folder or no interval, or ``every`` without a folder.
        IncompatibleError: where the algorithm's runs cannot be gone on with.
    """
    if checkpoint is None:
        if every is not None:
            raise ValueError("every: it says how often a checkpoint is written; give checkpoint=folder too")
        return None, DEFAULT_EVERY
    interval = DEFAULT_EVERY if every is None else require_every(every)
    folder = as_path(checkpoint, "checkpoint")
    if not algorithm.resumable:
        raise IncompatibleError(
            f"checkpoint: a run of {algorithm.label} cannot be kept and gone on with, as {type(algorithm).__name__} "
            "does not implement state_dict(state) and load_state_dict(state, saved); leave checkpoint out"
        )
    records = Checkpoint.folder(folder.absolute())
    records.check_place()
    return records, interval


@contextlib.contextmanager
def opened(records: Numbered | None, every: Every, run: Run, recipe: Recipe, algorithm: Algorithm) -> Iterator[None]:
    """``run.checkpoint``, with what the last one held; nobody else writes in its folder meanwhile.

    Of several processes that learn together the first reads and writes, and hands the others what it has read.

    Raises:
        ValueError: where another fit's are there (what differs is named), or all that are there are damaged.
    """
    if records is None:
        yield
        return
    refuse_memory(run.program, run.data, run.workspace)
    if not run.ranks.first:
        run.checkpoint = Followed(records, every)
        run.checkpoint.shared(run.ranks)
        yield
        return
    now = identity(run, recipe, algorithm)
    with records.claimed():
        made = Checkpoint(records, every, {"kind": "fit", "identity": now})
        record = records.read()
        if record is not None:
            made.take(record)
            _compare(records, record.facts.get("identity"), now)
            if record.damaged:
                run.notes["checkpoint"] = f"an earlier one was read, as the last is not whole: {record.damaged}"
        made.shared(run.ranks)
        run.checkpoint = made
        yield


def refuse_memory(program: Program, data: Dataset, workspace: Workspace, argument: str = "checkpoint") -> None:
    """What a program changes in Python each time it runs is in no checkpoint, and it may count steps for a schedule.

    Raises:
        IncompatibleError: naming what it changes.
    """
    batch, parts = data.glimpse(), plain_parts(program)
    before = Remembered(functions_of(program))
    with without_side_effects(), pyro.get_param_store().scope(), workspace.looking():
        for part in parts:
            with contextlib.suppress(*PROGRAM_ERRORS):  # it is not called as in a run: the run will tell
                part(*batch.args, **batch.kwargs)
    changed = before.changed()
    before.put_back()
    if changed:
        raise IncompatibleError(
            f"{argument}: the program {program.name!r} changes {', '.join(changed)} as it runs, which a checkpoint "
            "cannot hold. Keep it in a buffer (register_buffer), give what counts steps as data (pg.by_step), or leave "
            f"{argument} out"
        )


def _compare(records: Numbered, kept: Any, now: dict[str, Any]) -> None:
    try:
        found = differing(kept, now)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise ValueError(f"checkpoint: {records.path} holds no checkpoint of a fit") from error
    if found:
        more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise ValueError(
            f"checkpoint: {records.path} belongs to another fit: {'; '.join(found[:_SHOWN])}{more}. Choose a new "
            "folder, or call the fit as it was"
        )
