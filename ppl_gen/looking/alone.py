"""Whether a network reads each row by itself, and the same way each time: what a view of a row takes for granted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ppl_gen.looking.asking import as_rows, evaluating, scores

__all__ = ["read_alone"]

_FEW = 3  # rows that are looked at
_ROUNDING = 1e-3  # of the largest score: what another size of batch may change


def read_alone(x: Any, network: nn.Module, *, images: bool = False) -> Tensor:
    """Rows, see `as_rows`, of a network whose answer about each of them is a function of that row alone.

    Of any other a gradient mixes what other rows did, and a change by a patch is what chance did as well.

    Raises:
        TypeError, ValueError: as `as_rows` does; for a network that draws random numbers, or mixes rows, in evaluation
            mode.
    """
    rows = as_rows(x, network, images=images)
    _refuse_company(network, rows)
    return rows


def _refuse_company(network: nn.Module, rows: Tensor) -> None:
    few = rows[:_FEW]
    with evaluating(network), torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            first, again, alone = scores(network, few), scores(network, few), scores(network, few[:1])
        except (TypeError, ValueError):  # whoever asks for a score hears of it
            return
    if not _same(first, again):
        raise ValueError(
            "network: it gives other numbers when it is asked again, in evaluation mode: it draws random numbers (a "
            "dropout that is a function, a code that is drawn). Pass one that gives the mean, or switches them off"
        )
    if not _same(first[:1], alone):
        raise ValueError(
            "network: what it gives for a row changes with the rows beside it, in evaluation mode (batch norm without "
            "running statistics, a mean over the rows): no view of a row tells what it sees. Pass one that reads each "
            "row by itself"
        )


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(((one - other).abs() <= _ROUNDING * one.abs().max()).all())
