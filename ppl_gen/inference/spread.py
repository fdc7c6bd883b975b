"""What several processes can learn together: batches of rows, under a loss that is a mean over the rows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from ppl_gen.errors import IncompatibleError
from ppl_gen.fitting.run import Run
from ppl_gen.inference.objectives.base import Objective
from ppl_gen.inference.objectives.game import Setting

__all__ = ["as_shared", "rows_each", "refuse_undivided"]


def rows_each(run: Run, size: int | None) -> int | None:
    """How many rows one process holds of a batch of ``size`` (None: of all rows); ``size`` itself in a lone process.

    Raises:
        IncompatibleError: if the program has no rows to share, or fewer in a batch than there are processes.
    """
    if run.ranks.alone:
        return size
    name, world = run.program.name, run.ranks.world
    if run.data.rows is None or run.info.data_plate is None:
        missing = "its data have no rows" if run.data.rows is None else "it has no plate over its rows"
        raise IncompatibleError(
            f"fabric: {world} processes share the rows of a batch, and {name!r} has none: {missing}"
        )
    rows = run.data.rows if size is None else min(size, run.data.rows)
    if rows < world:
        raise IncompatibleError(
            f"fabric: {world} processes cannot share a batch of {rows} row(s); give each at least one"
        )
    return rows // world


@contextlib.contextmanager
def as_shared(run: Run, size: int | None, otherwise: Callable[[], object] | None = None) -> Iterator[None]:
    """What is refused inside because of minibatches, and not because of ``size``, is refused because rows are shared.

    ``otherwise`` is what one process would do, and may have refused too: then that is the reason.
    """
    try:
        yield
    except IncompatibleError as error:
        if run.ranks.alone or (size is not None and run.data.rows is not None and size < run.data.rows):
            raise
        if otherwise is not None:
            otherwise()
        raise IncompatibleError(
            f"fabric: each of {run.ranks.world} processes computes with its share of the rows, as with a minibatch, "
            f"and this program needs all of them at once: learn it in one process. Of minibatches: {error}"
        ) from None


def refuse_undivided(objective: Objective, setting: Setting, run: Run) -> None:
    """Raise IncompatibleError where the losses of the shares of a batch do not add up to that of the batch."""
    if not run.ranks.alone and (why := objective.undivided(setting)) is not None:
        raise IncompatibleError(
            f"fabric: {run.ranks.world} processes add up the losses of their shares of a batch, and {why}; learn it in "
            "one process"
        )
