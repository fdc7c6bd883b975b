r"""Latent sites that a mask hides where nothing depends on them, as the states of a chain after its row has ended.

.. math:: \sum_{z_t} p(z_t \mid z_{t-1}) = 1, \qquad \sum_{z_t} 1 = K:

with its density the site integrates to one there; under its mask it counts every value as sure, and a sum over it is
that of the data times a constant. Such sites are read as if the mask hid the observations alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ppl_gen.data.batching import Batch
from ppl_gen.errors import PROGRAM_ERRORS
from ppl_gen.handlers.sites import is_deterministic, sample_nodes
from ppl_gen.workspace.isolation import validation_off

__all__ = ["idle_where_masked"]

TRIES = 3  # other values of the hidden entries


def idle_where_masked(model: Callable[..., Any], batch: Batch, trace: poutine.Trace) -> set[str]:
    """Names of the latent sites under a mask whose hidden entries move no density that counts; all of them or none."""
    from ppl_gen.handlers.substitute import Substitute

    nodes = {name: node for name, node in sample_nodes(trace) if not is_deterministic(node)}
    latent = {name: node for name, node in nodes.items() if not node["is_observed"]}
    masked = {name: node for name, node in latent.items() if isinstance(node["mask"], Tensor)}
    if not masked:
        return set()
    values = {name: node["value"] for name, node in latent.items()}
    with validation_off(), torch.no_grad():
        for _ in range(TRIES):
            try:
                moved = {name: _elsewhere(node) for name, node in masked.items()}
                with Substitute({**values, **moved}):
                    other = poutine.trace(model).get_trace(*batch.args, **batch.kwargs)
                if not all(name in other and _same(node, other.nodes[name]) for name, node in nodes.items()):
                    return set()
            except PROGRAM_ERRORS:
                return set()
    return set(masked)


def _elsewhere(node: Any) -> Tensor:
    """The value of a site, drawn again where its mask hides it."""
    fn, value = node["fn"], node["value"]
    mask = torch.as_tensor(node["mask"]).expand(fn.batch_shape)
    return torch.where(mask.reshape(*mask.shape, *[1] * fn.event_dim), value, fn.sample())


def _same(one: Any, other: Any) -> bool:
    first, second = _counted(one), _counted(other)
    return first.shape == second.shape and torch.allclose(first, second, rtol=1e-5, atol=1e-6, equal_nan=True)


def _counted(node: Any) -> Tensor:
    density: Tensor = node["fn"].log_prob(node["value"])
    mask = node["mask"]
    return density if mask is None else torch.where(torch.as_tensor(mask), density, torch.zeros_like(density))
