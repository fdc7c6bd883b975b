"""From the tables of the chains to draws of the program's sites and the statistics that ArviZ asks for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ppl_gen.capture.arrays import array_recording
from ppl_gen.capture.recorder import record
from ppl_gen.capture.replay import agrees, recording
from ppl_gen.capture.tape import RecordingRefused
from ppl_gen.fitting.run import Run
from ppl_gen.inference.mcmc.kernel import DrawTable
from ppl_gen.inference.unconstrained import Unconstrained

__all__ = ["rectangle", "relabelled", "site_values", "statistics"]


def statistics(tables: Sequence[DrawTable], length: int, deepest: int) -> dict[str, Tensor]:
    """Each statistic of the first ``length`` draws, chains x draws."""
    of_chains = [table.statistics(length) for table in tables]
    stats = {name: torch.as_tensor(np.stack([one[name] for one in of_chains])) for name in of_chains[0]}
    stats["diverging"] = stats["diverging"].bool()
    for name in ("n_steps", "tree_depth"):
        stats[name] = stats[name].long()
    stats["reached_max_treedepth"] = stats["n_steps"] >= 2**deepest - 1
    return stats


def rectangle(tables: Sequence[DrawTable], draws: int) -> tuple[list[DrawTable], int]:
    """The chains and the common length that keep most draws: all of them unless the run was interrupted."""
    lengths = {min(table.kept, draws) for table in tables} - {0}
    if not lengths:
        return [], 0
    best = max(lengths, key=lambda n: n * sum(table.kept >= n for table in tables))
    return [table for table in tables if table.kept >= best], best


def site_values(run: Run, density: Unconstrained, positions: np.ndarray) -> dict[str, Tensor]:
    """Positions -> site -> draws x shape, in the user's space; one by one, so that no draw depends on the others."""
    points = torch.as_tensor(positions, dtype=run.dtype, device=run.data.device)
    with torch.no_grad():
        function = _replay(density, [points[0], points[-1], points[len(points) // 2]])
        rows = [function(point) for point in points]
        return {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(density.sites)}


def _replay(density: Unconstrained, points: Sequence[Tensor]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """`density.values` as a replay in NumPy's operations, or else in torch's, or else the program itself."""
    function: Callable[[Tensor], tuple[Tensor, ...]] = density.values
    with contextlib.suppress(RecordingRefused):
        tape = record(lambda: density.values(points[0]), [points[0]])
        found = recording(tape).load()
        agrees(found, density.values, points)
        function = found
        found = array_recording(tape, points[0]).load()
        agrees(found, density.values, points)
        function = found
    return function


def relabelled(run: Run, draws: dict[str, Tensor]) -> dict[str, Tensor]:
    """The draws in the order of the program's `relabel`, if it has one."""
    if run.program.relabel is None:
        return draws
    found = run.program.relabel(draws)
    for name, value in draws.items():
        if name not in found or found[name].shape != value.shape:
            got = tuple(found[name].shape) if name in found else "nothing"
            raise ValueError(f"relabel: expected {name!r} of shape {tuple(value.shape)} (draws x site), got {got}")
    return {name: found[name] for name in draws}
