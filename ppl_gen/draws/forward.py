"""Whether running a program forward draws what it describes: a factor may weigh the very draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Unit
from torch import Tensor

from ppl_gen.data.batching import Batch
from ppl_gen.errors import IncompatibleError
from ppl_gen.handlers.sites import is_sample
from ppl_gen.handlers.substitute import Substitute
from ppl_gen.handlers.unobserved import unobserved
from ppl_gen.inference.objectives.observed import on_other_entries
from ppl_gen.workspace.isolation import without_side_effects

__all__ = ["refuse_weighed_draws", "unobserved_run", "weighing_draws"]


Run = Callable[[Batch, Mapping[str, Tensor]], poutine.Trace]  # at these values of some sites, everything else drawn


def refuse_weighed_draws(program: str, run: Run, batch: Batch, values: Mapping[str, Tensor], asked: str) -> None:
    """Raise IncompatibleError where a `pyro.factor` weighs what ``run`` draws; see `weighing_draws`."""
    if found := weighing_draws(run, batch, values):
        names = ", ".join(map(repr, found))
        raise IncompatibleError(
            f"{asked}: the program {program!r} weighs what it draws by pyro.factor at {names}, so "
            "running it forward does not draw what it describes; write the factor as sample statements, or give the "
            "values that it weighs"
        )


def weighing_draws(run: Run, batch: Batch, values: Mapping[str, Tensor]) -> list[str]:
    """The factors that weigh what is drawn beside ``values``, and hold no data.

    A factor that holds data is an observation, and goes with the others. One of drawn values alone is part of what the
    program says of them, and drawing forward leaves it out. Which it is, other draws and other data show.
    """
    with without_side_effects():
        trace = run(batch, values)
        first = _factors(trace)
        second = _factors(run(batch, values)) if first else {}
    weighing = [name for name, value in first.items() if name in second and not torch.equal(value, second[name])]
    if not weighing:
        return []
    drawn = {n: v["value"] for n, v in trace.nodes.items() if is_sample(v) and n not in first}
    changed = {
        name
        for _, other in on_other_entries(lambda b: run(b, drawn), batch)
        for name, value in _factors(other).items()
        if name in first and not torch.equal(value, first[name])
    }
    return [name for name in weighing if name not in changed]


def unobserved_run(model: Callable[..., Any]) -> Run:
    """Runs of a model with its observations removed."""

    def run(batch: Batch, values: Mapping[str, Tensor]) -> poutine.Trace:
        with Substitute(values):
            return poutine.trace(unobserved(model)).get_trace(*batch.args, **batch.kwargs)

    return run


def _factors(trace: poutine.Trace) -> Mapping[str, Tensor]:
    nodes = {name: node for name, node in trace.nodes.items() if node["type"] == "sample"}
    return {name: node["fn"].log_factor for name, node in nodes.items() if isinstance(node["fn"], Unit)}
