"""The importance weights of a guide: of its globals over all rows, and of the locals of some rows."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ppl_gen.diagnostics.moments import Moments, unconstrained, weighted
from ppl_gen.diagnostics.row_weights import weigh_rows
from ppl_gen.inference.guides.resolved import point_sites
from ppl_gen.weights.densities import derived
from ppl_gen.weights.psis import (
    MIN_DRAWS,
    effective_sample_size,
    pareto_k,
    pareto_k_threshold,
    smoothed_weights,
)
from ppl_gen.weights.weighed import WeighedDraws, affordable, weighed_draws

if TYPE_CHECKING:
    from ppl_gen.fits.result import Fit

__all__ = ["GuideWeights", "all_points", "guide_weights", "k_hats"]

PARTICLES = 20  # of the locals of each row, per draw of the globals


@dataclass(frozen=True)
class GuideWeights:
    """k-hat of the globals, of rows, its limit; effective draws of how many; moments of the globals and of rows."""

    k: float | None
    rows: np.ndarray | None
    threshold: float
    effective: tuple[float, int] | None = None
    moments: Moments | None = None
    row_moments: Moments | None = None
    row_shares: np.ndarray | None = None


def k_hats(fit: Fit, draws: int) -> tuple[float | None, np.ndarray | None, float]:
    """PSIS k-hat of a variational fit: one for the globals (locals integrated out), one per row for the locals.

    Returns (joint or None, per row or None, threshold). At most 200 rows are judged, spread evenly over the data.
    """
    found = guide_weights(fit, draws)
    return found.k, found.rows, found.threshold


def guide_weights(fit: Fit, draws: int) -> GuideWeights:
    """The weights of a variational fit; computed once for each number of draws."""
    key = ("weights", draws)
    if key not in fit.computed:
        fit.computed[key] = _weigh(fit, draws)
    found: GuideWeights = fit.computed[key]
    return found


def _weigh(fit: Fit, draws: int) -> GuideWeights:
    if all_points(fit) or "density" not in fit.info.offers:
        return GuideWeights(None, None, pareto_k_threshold(max(MIN_DRAWS, draws)))
    # Where the guide holds a site at one value, the weights are those of the rest given that value.
    guided = [s for name, s in (fit.info.guide_sites or {}).items() if name in fit.info.sites and not s.point]
    local = [site for site in guided if site.local]
    whole = _whole_vector(fit)
    joint = GuideWeights(None, None, pareto_k_threshold(draws))
    if any(not site.local for site in guided) or not local or whole:
        with fit.bound():
            joint = _weigh_globals(fit, draws, 1 if whole or not local else PARTICLES)
    if not local or whole:
        return joint
    with fit.bound():
        rows = weigh_rows(fit, draws)
    threshold = min(joint.threshold, pareto_k_threshold(rows.draws)) if joint.k is None else joint.threshold
    return replace(joint, rows=rows.k, threshold=threshold, row_moments=rows.moments, row_shares=rows.shares)


def _weigh_globals(fit: Fit, draws: int, particles: int) -> GuideWeights:
    count = affordable(fit, 4 * draws, particles)
    found = weighed_draws(fit, count, particles)
    ratios = found.log_weights.numpy()
    k = float(pareto_k(ratios))
    count = len(ratios)  # fewer where the program takes one draw at a time
    threshold = pareto_k_threshold(count)
    bad = np.isnan(ratios).any() or not np.isfinite(ratios.max())
    if bad:
        return GuideWeights(math.inf, None, threshold)
    logs = smoothed_weights(ratios)
    return GuideWeights(k, None, threshold, (float(effective_sample_size(logs)), count), _moments(fit, found, logs))


def _moments(fit: Fit, found: WeighedDraws, logs: np.ndarray) -> Moments | None:
    """The guide's moments against the weighted ones, of every global number and of what is derived from them."""
    points = set(point_sites(fit.info))
    batch = fit.data.batch()
    values = {name: value for name, value in found.values.items() if name not in points}
    if not values:
        return None
    extra: dict[str, Tensor] = {}
    if fit.info.select(kind="deterministic", local=False) and set(found.values) >= _needed(fit):
        draws = [{name: value[i] for name, value in found.values.items()} for i in range(len(logs))]
        made = derived(fit, batch, draws)
        extra = {name: torch.stack([row[name] for row in made]) for name in made[0]}
    return weighted({**unconstrained(fit, batch, values), **extra}, logs)


def _needed(fit: Fit) -> set[str]:
    return {site.name for site in fit.info.select(local=False) if not site.finite}


def _whole_vector(fit: Fit) -> bool:
    """Autoguides with one joint vector (full rank, flows) draw locals and globals together: one k-hat says it all."""
    from pyro.infer.autoguide import AutoContinuous

    return isinstance(fit.guide, AutoContinuous)


def all_points(fit: Fit) -> bool:
    """Whether the guide holds every site of the program at one value."""
    points, guided = set(point_sites(fit.info)), set(fit.info.guide_sites or {})
    return bool(points) and not [n for n in guided if n in fit.info.sites and n not in points]
