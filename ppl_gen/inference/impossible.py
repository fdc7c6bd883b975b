"""Where a guide reaches values of the latent sites at which the data are impossible, the bound is minus infinity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ppl_gen.data.batching import Batch
from ppl_gen.errors import PROGRAM_ERRORS
from ppl_gen.handlers.sites import sample_nodes
from ppl_gen.workspace.isolation import validation_off, without_side_effects

__all__ = ["impossible"]

TRIES = 50  # draws of the guide


def impossible(model: Callable[..., Any], guide: Callable[..., Any] | None, batch: Batch) -> str:
    """What is to be said of an observed site without density at some draw of the guide; empty where none is found."""
    with without_side_effects(), validation_off():
        for _ in range(TRIES if guide is not None else 1):
            try:
                drawn = None if guide is None else poutine.trace(guide).get_trace(*batch.args, **batch.kwargs)
                replayed = model if drawn is None else poutine.replay(model, trace=drawn)
                trace = poutine.trace(replayed).get_trace(*batch.args, **batch.kwargs)
                found = next((name for name, node in sample_nodes(trace) if _without_density(node)), None)
            except PROGRAM_ERRORS:
                return ""  # the loss has said what is wrong
            if found is not None:
                return _sentence(found, trace)
    return ""


def _without_density(node: Any) -> bool:
    if not node["is_observed"]:
        return False
    impossible = node["fn"].log_prob(node["value"]) == -torch.inf
    return bool((impossible if node["mask"] is None else impossible & torch.as_tensor(node["mask"])).any())


def _sentence(name: str, trace: poutine.Trace) -> str:
    single = [
        f"{n} = {float(node['value']):.4g}"
        for n, node in sample_nodes(trace)
        if not node["is_observed"] and isinstance(node["value"], Tensor) and node["value"].numel() == 1
    ]
    at = f" (at {', '.join(single[:4])})" if single else ""
    return (
        f"the observed values of {name!r} are impossible, log density -inf, at a draw of the guide{at}, and the bound "
        "is -inf for every guide that reaches there. Write the bound into the prior (dist.Uniform(x.max(), 3.0), say), "
        "give a guide that keeps to where the data are possible, or draw with NUTS"
    )
