"""What several processes can learn together: batches of rows, under a loss that is a mean over the rows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch.nn.modules.batchnorm import _NormBase

from ppl_gen.data.batching import Batch
from ppl_gen.errors import PROGRAM_ERRORS, IncompatibleError
from ppl_gen.fitting.run import Run
from ppl_gen.handlers.rank_noise import RankNoise, rows_noise
from ppl_gen.inference.objectives.base import Objective
from ppl_gen.inference.objectives.game import Game, Setting
from ppl_gen.runtime.ranks import Share
from ppl_gen.workspace.isolation import validation_off, without_side_effects
from ppl_gen.workspace.streams import Streams

__all__ = ["as_shared", "refuse_coupled", "refuse_undivided", "rows_each"]

_FEW = 4  # rows of the data that are tried together and in two halves
# Of float32 sums over thousands of numbers; what depends on the other rows differs in the first digits.
_SAME = 1e-4


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


def refuse_coupled(game: Game, run: Run) -> None:
    """Raise IncompatibleError where what a row adds to a loss depends on the other rows of its batch.

    A few rows are tried, together and in two halves, with the same random numbers. Where these do not follow the rows
    (dropout, rejection) nothing can be told. Batch norm does depend on the other rows, and is noted.
    """
    rows = min(run.data.rows or 0, _FEW)
    if run.ranks.alone or rows < 2:
        return
    shares = [Share(0, rows, rows, 1.0), Share(0, rows // 2, rows, 0.5), Share(rows // 2, rows - rows // 2, rows, 0.5)]
    for player in game.players:
        try:
            values = [_tried(game, player.name, run, share, rows) for share in shares]
        except PROGRAM_ERRORS:  # not on so few rows
            return
        if None in values:
            return
        whole, *halves = (float(value) for value in values if value is not None)
        parts = sum(value * share.count / rows for value, share in zip(halves, shares[1:], strict=True))
        if abs(whole - parts) > _SAME * (1.0 + abs(whole)):
            break
    else:
        return
    networks = [*run.workspace.networks(), *(part for m in game.modules.values() for part in m.modules())]
    if any(isinstance(module, _NormBase) and module.training for module in networks):
        run.notes["batch norm"] = (
            "every process normalises by its own share of a batch, so that steps differ from those of one process; "
            "running statistics are averaged"
        )
        return
    raise IncompatibleError(
        f"fabric: in {run.program.name!r}, what a row adds to the loss of player {player.name!r} depends on the other "
        f"rows of its batch (of {rows} rows it is {whole:.6g}, of their halves {parts:.6g} on average), so that shares "
        "do not add up; compute what depends on all rows in a Recipe, or learn it in one process"
    )


def _tried(game: Game, player: str, run: Run, share: Share, rows: int) -> float | None:
    """The loss of a share of the first rows; None where it takes random numbers that are not those of its rows."""
    index = torch.arange(share.first, share.first + share.count, device="cpu")
    streams = Streams(run.seed, 0, run.data.device)
    with without_side_effects(), validation_off(), streams.own(0):
        with streams.common():
            torch.manual_seed(0)
            state = game.init(run.data.batch(torch.arange(rows, device="cpu"), total=rows, step=0))
            torch.manual_seed(0)
        with rows_noise(share, streams):
            batch: Batch = run.data.batch(index, total=rows, step=0)
        with RankNoise(run.info.data_plate, share, streams):
            loss, _ = game.loss(player, batch, state)
    return None if streams.drawn else float(loss.value)
