"""Draws of a guide, each weighed against the posterior in the call that drew it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ppl_gen.diagnostics.densities import joint_densities
from ppl_gen.finite_globals import combinations, summed_globals
from ppl_gen.inference.objectives.particles import can_vectorise, global_draw, log_weights_in_chunks

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
        values, density = global_draw(fit.guide, batch, info)
        outside.append(values)
        log_q.append(density)
    names = [site.name for site in info.select(local=False) if site.name in outside[0]]
    stacked = {name: torch.stack([draw[name].detach() for draw in outside]) for name in names}
    if not any(site.local and site.name in guided for site in info.select()):
        known = [{name: value for name, value in draw.items() if name in info.sites} for draw in outside]
        return WeighedDraws(stacked, (joint_densities(fit, batch, known) - torch.stack(log_q)).double().cpu())
    coupling = summed_globals(fit, guided)  # rows are independent given these: a sum over all their values is outermost
    states = combinations(fit, batch, coupling) if coupling else [{}]
    sums = tuple(name for name in info.finite_latents if name not in guided and name not in coupling)
    vectorise = can_vectorise(fit.program.model, fit.guide, info, batch, sums)
    result = []
    for draw, density in zip(outside, log_q, strict=True):
        terms = []
        for state in states:
            w = log_weights_in_chunks(
                fit.program.model,
                fit.guide,
                info,
                batch,
                particles,
                values={**draw, **state},
                sums=sums,
                vectorise=vectorise,
            )
            inside = 0.0 if w.rows is None else (torch.logsumexp(w.rows, 0) - math.log(particles)).sum()
            terms.append(torch.as_tensor(w.globals - density + inside).double())
        result.append(torch.logsumexp(torch.stack(terms), 0))
    return WeighedDraws(stacked, torch.stack(result).cpu())
