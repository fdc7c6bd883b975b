"""Where chains begin: dispersed points of finite density, and one seed a chain."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ppl_gen.fitting.run import Run
from ppl_gen.inference.unconstrained import NEAR, Unconstrained, refuse_hidden_draws, starting_point
from ppl_gen.workspace.isolation import isolated

__all__ = ["beginnings"]

_DISPERSED = 1.0  # in unconstrained units: logs of scales, logits of shares


def beginnings(run: Run, density: Unconstrained, chains: int, jitter: float | None) -> tuple[list[Tensor], list[int]]:
    """A starting point and a seed per chain; both follow from the fit's seed and the chain's number alone.

    Raises:
        ValueError: where 100 tries find no finite density; the sites at fault are named.
        IncompatibleError: where the density draws random numbers of its own.
    """
    given = run.starting_values()
    parts = density.parts_of(given)
    edge = [name for name in given if name in density.sites and name not in parts]
    if edge:
        run.notes["starting values"] = f"{', '.join(edge)}: on the edge of the support or beyond, and not used"
    seeds = np.random.SeedSequence(run.seed).generate_state(2 * chains)
    starts: list[Tensor] = []
    for chain, seed in enumerate(seeds[::2]):
        with isolated(int(seed)):
            starts.append(starting_point(density, parts, jitter, starts[-1] if chain % 2 else None))
    if parts and chains > 1:
        _note_close(run, [density.split(start) for start in starts], list(parts), jitter)
    refuse_hidden_draws(run.program.name, density, starts[0])
    return starts, [int(seed) for seed in seeds[1::2]]


def _note_close(run: Run, starts: Sequence[dict[str, Tensor]], known: Sequence[str], jitter: float | None) -> None:
    """Chains that begin at one point agree by construction; the verdict reads this note."""
    apart = max(float((at.amax(0) - at.amin(0)).max()) for at in (torch.stack([s[n] for s in starts]) for n in known))
    if apart <= 2 * NEAR or (jitter is not None and jitter < _DISPERSED):
        advice = "no density was finite farther away" if jitter is None else "leave out jitter to disperse them"
        run.notes["starts"] = (
            f"all {len(starts)} chains began within {apart:.2g} of each other in {', '.join(known)} (unconstrained "
            f"units), so they could not disagree about modes farther away; {advice}"
        )
