"""Batches of one row, as one left over at the end of an epoch, for networks that compare the rows of a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.nn.modules.batchnorm import _NormBase

from ppl_gen.errors import PROGRAM_ERRORS
from ppl_gen.fitting.lone_row import is_lone_row, lone_row
from ppl_gen.fitting.run import Run
from ppl_gen.inference.objectives.game import Game, GameState
from ppl_gen.workspace.isolation import without_side_effects

__all__ = ["single_rows_told", "try_single_row"]


@contextlib.contextmanager
def single_rows_told(run: Run, size: int | None) -> Iterator[None]:
    """What batch norm says of one row, as a ValueError that names the size of the batches."""
    try:
        yield
    except PROGRAM_ERRORS as error:
        if not is_lone_row(error):
            raise
        raise lone_row(run, size) from error


def try_single_row(run: Run, game: Game, state: GameState, size: int | None) -> None:
    """Play one row before the first step, where one will be left over and there is batch norm."""
    if run.data.streamed is not None or run.data.rows is None or not _single(run.data.rows, size):
        return
    networks = [*run.workspace.networks(), *(part for module in game.modules.values() for part in module.modules())]
    if not any(isinstance(part, _NormBase) for part in networks):
        return
    batch = run.data.batch(torch.arange(1, device="cpu"))
    for player in game.players:
        try:
            with without_side_effects(), torch.enable_grad():
                game.loss(player.name, batch, state)
        except PROGRAM_ERRORS as error:
            if is_lone_row(error):
                raise
            # Of all else the run itself speaks, should it come to that.


def _single(rows: int, size: int | None) -> bool:
    return rows == 1 or (size is not None and (size == 1 or rows % size == 1))
