"""Traces of guide and model on a batch, and what objectives read off their sites."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import kl_divergence

from ppl_gen.data.batching import Batch
from ppl_gen.handlers.rescale import RescalePlate
from ppl_gen.handlers.sites import nothing
from ppl_gen.inference.objectives.game import Setting

__all__ = ["analytic_kl", "traces", "weighed_alike"]


def traces(setting: Setting, batch: Batch) -> tuple[poutine.Trace, poutine.Trace]:
    """Traces of the guide and of the model at its draws, on one batch, with the data plate rescaled by N / B.

    Log densities are computed when asked for: ``model.log_prob_sum()`` estimates that of all rows. Objectives are per
    row, so divide by ``batch.total``.
    """
    with RescalePlate(setting.info.data_plate, batch.total):
        guide = poutine.trace(setting.guide or nothing).get_trace(*batch.args, **batch.kwargs)
        model = poutine.trace(poutine.replay(setting.model, trace=guide)).get_trace(*batch.args, **batch.kwargs)
    return guide, model


def analytic_kl(q: Any, p: Any) -> Tensor:
    """KL(q || p) with event dimensions summed, in the broadcast batch shape."""
    reinterpreted = 0
    while isinstance(q, dist.Independent) and isinstance(p, dist.Independent):
        reinterpreted += q.reinterpreted_batch_ndims
        q, p = q.base_dist, p.base_dist
    return sum_rightmost(kl_divergence(q, p), reinterpreted)


def weighed_alike(q: dict[str, Any], p: dict[str, Any]) -> bool:
    """Same mask and scale on both sides: only then does one divergence stand for the difference of two densities."""
    scales = q["scale"], p["scale"]
    same = scales[0] is scales[1] or (all(isinstance(s, float | int) for s in scales) and scales[0] == scales[1])
    return same and q["mask"] is p["mask"]
