"""From a `lightning_fabric.Fabric` to the processes that learn a fit together; what they have to agree on first."""

from __future__ import annotations

import re
from typing import Any

import torch

from ppl_gen.data.batching import Dataset
from ppl_gen.errors import IncompatibleError
from ppl_gen.fitting.algorithm import Algorithm
from ppl_gen.fitting.run import Run
from ppl_gen.runtime.ranks import ALONE, Group, Ranks, number_of

__all__ = ["agree", "processes_of", "refuse_lone"]

_ROWS = 256  # of each entry that are compared between processes


def processes_of(fabric: Any, device: torch.device | None) -> tuple[Ranks, torch.device | None]:
    """The processes that ``fabric`` has launched, and the device of this one.

    Raises:
        TypeError: for what is no Fabric.
        ValueError: for one that was not launched, that shards or replicates in another way than ``ddp``, or that asks
            for another precision or device than the fit.
    """
    if fabric is None:
        return ALONE, device
    names = {f"{base.__module__.split('.')[0]}.{base.__name__}" for base in type(fabric).__mro__}
    if not names & {"lightning_fabric.Fabric", "lightning.Fabric"}:
        raise TypeError(
            "fabric: expected a lightning_fabric.Fabric, such as Fabric(accelerator='cpu', devices=2, strategy='ddp') "
            f"(pip install 'ppl_gen[fabric]'), got {type(fabric).__name__}"
        )
    _check_strategy(fabric)
    if device is not None and device not in (fabric.device, torch.device(fabric.device.type)):
        raise ValueError(f"device: this process's is {fabric.device}, as fabric says, got {device}; leave device out")
    if fabric.world_size == 1:
        return ALONE, fabric.device
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        raise ValueError("fabric: the processes do not know of each other yet; call fabric.launch() before the fit")
    return Group(fabric.global_rank, fabric.world_size, fabric.device), fabric.device


def _check_strategy(fabric: Any) -> None:
    kind = type(fabric.strategy).__name__
    if kind not in ("DDPStrategy", "SingleDeviceStrategy"):
        raise ValueError(f"fabric: expected strategy='ddp', in which every process holds all parameters, got {kind}")
    precision = str(fabric.strategy.precision.precision)
    if precision != "32-true":
        raise ValueError(
            f"fabric: precision={precision!r} is not applied to a fit, which has a dtype of its own; leave precision "
            "out and give dtype=torch.float64, say"
        )


def refuse_lone(algorithm: Algorithm, ranks: Ranks) -> None:
    """Raise IncompatibleError for an algorithm that several processes cannot share."""
    if not ranks.alone and not algorithm.spreads:
        raise IncompatibleError(
            f"fabric: {algorithm.label} needs all rows in one process, and {ranks.world} processes would each do the "
            "same; leave fabric out, or take SVI, whose steps are sums over rows"
        )


def agree(run: Run, algorithm: Algorithm, *, kept: bool) -> None:
    """Raise ValueError on all processes if they were not given the same data, settings and program.

    ``kept``: whether checkpoints are.
    """
    if run.ranks.alone:
        return
    backend = torch.distributed.get_backend()
    run.notes["processes"] = f"{run.ranks.world} ({backend}), each of which took its share of every batch"
    start = run.start.state.params if run.start is not None else {}
    shown = re.sub(r" at 0x[0-9a-f]+", "", f"{algorithm!r}")
    run.ranks.agree(
        {
            "seed": str(run.seed),
            "algorithm": shown,
            "rows of the data": str(run.data.rows),
            "data": _look(run.data),
            "dtype": str(run.dtype),
            "sites of the program": ", ".join(f"{s.name} {s.distribution}" for s in run.info.sites.values()),
            "start": number_of(start),
            "validation": "none" if run.validation is None else _look(run.validation.data),
            "checkpoint": "a folder" if kept else "none",
            "validate_every": str(getattr(run.validation, "every", None)),
        }
    )


def _look(data: Dataset) -> str:
    """Names and shapes of the entries, and a number made of some of their rows."""
    index = None
    if data.rows is not None and data.rows > _ROWS:
        index = torch.linspace(0, data.rows - 1, _ROWS, device="cpu", dtype=torch.float64).long()
    some = {name: data._rows(value, index) for name, value in data.entries.items()}
    shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in data.entries.items())
    return f"{shapes}, of numbers {number_of(some)}"
