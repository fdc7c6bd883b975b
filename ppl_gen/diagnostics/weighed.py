"""Draws of a guide, each weighed against the posterior in the call that drew it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from torch import Tensor

from ppl_gen.diagnostics.densities import densities
from ppl_gen.inference.objectives.particles import can_vectorise, log_weights_in_chunks
from ppl_gen.inference.objectives.tracing import is_sample

if TYPE_CHECKING:
    from ppl_gen.result import Fit

__all__ = ["WeighedDraws", "weighed_draws"]


@dataclass(frozen=True)
class WeighedDraws:
    r"""Draws theta_s of a guide, and how the posterior weighs them.

    ``values``: the model's global sites that the guide draws, draws x shape of the site. ``log_weights``: log p(x,
    theta_s) - log q(theta_s) in nats, shape (draws,), local latents integrated out; float64 on the CPU.
    """

    values: dict[str, Tensor]
    log_weights: Tensor


def weighed_draws(fit: Fit, draws: int, particles: int = 1) -> WeighedDraws:
    """``draws`` draws of the guide with their log weights; call inside ``fit.bound()``.

    Local latents that the guide draws are integrated by importance weighting, ``particles`` of them per row and draw;
    finite ones that it leaves out are summed.
    """
    info, batch = fit.info, fit.data.batch()
    guided = set(info.guide_sites or {})
    outside, log_q = [], []
    for _ in range(draws):
        once = poutine.trace(fit.guide).get_trace(*batch.args, **batch.kwargs)
        sites = {n: s for n, s in once.nodes.items() if is_sample(s) and not _in_plate(s, info.data_plate)}
        outside.append({name: site["value"] for name, site in sites.items()})
        log_q.append(sum((s["fn"].log_prob(s["value"]).sum() for s in sites.values()), torch.zeros(())))
    names = [site.name for site in info.select(local=False) if site.name in outside[0]]
    values = {name: torch.stack([draw[name].detach() for draw in outside]) for name in names}
    if not any(site.local and site.name in guided for site in info.select()):
        known = [{name: value for name, value in draw.items() if name in info.sites} for draw in outside]
        rows, prior = densities(fit, batch, known)
        return WeighedDraws(values, (rows.sum(-1) + prior - torch.stack(log_q)).double().cpu())
    sums = tuple(name for name in info.finite_latents if name not in guided)
    vectorise = can_vectorise(fit.program.model, fit.guide, info, batch, sums)
    result = []
    for draw in outside:
        w = log_weights_in_chunks(
            fit.program.model, fit.guide, info, batch, particles, values=draw, sums=sums, vectorise=vectorise
        )
        inside = 0.0 if w.rows is None else (torch.logsumexp(w.rows, 0) - math.log(particles)).sum()
        result.append(torch.as_tensor(w.globals + inside).double())
    return WeighedDraws(values, torch.stack(result).cpu())


def _in_plate(site: dict[str, Any], plate: str | None) -> bool:
    return any(frame.name == plate for frame in site["cond_indep_stack"])
