"""Which draws of a fit get a second look, of which rows, and what short chains say of them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ppl_gen.data.batching import Dataset
from ppl_gen.diagnostics.moments import Moments, between_draws
from ppl_gen.diagnostics.second_look import FEWEST, MAX_ELEMENTS, SecondLook, moved
from ppl_gen.draws.predictive import amortised, prior_rows
from ppl_gen.fitting.posteriors.base import spread
from ppl_gen.handlers.last_site import UndrawableError
from ppl_gen.weights.psis import row_subset
from ppl_gen.weights.weighed import joint_draws, numbers

if TYPE_CHECKING:
    from ppl_gen.fits.result import Fit

__all__ = ["drift", "look_at_chains", "look_at_draws", "look_at_guide", "places_of"]

LOOK_ROWS = 50  # rows from whose draws short chains begin, where rows stand for themselves
CHAINS = 200  # short chains: a mean is then known to 0.07 sd, an sd to 5 %


def look_at_chains(fit: Fit, draws: Mapping[str, Tensor]) -> SecondLook | str:
    """Short chains from some of the kept draws (chains x draws x shape), and from elsewhere."""
    flat = {name: value.flatten(0, 1) for name, value in draws.items()}
    kept = spread(len(next(iter(flat.values()))), 2 * CHAINS)
    with fit.bound():
        return _looked(fit, {name: value[kept] for name, value in flat.items()}, fit.data, CHAINS)


def look_at_guide(fit: Fit, draws: int) -> SecondLook | str:
    """Short chains from the guide's draws: for all rows, or for some where rows stand for themselves."""
    chains = max(FEWEST, min(CHAINS, draws // 4))
    with fit.bound():
        alone = not fit.info.select(local=False) and amortised(fit)
        data = fit.data
        if alone and (data.rows or 0) > LOOK_ROWS:
            data = data.subset(torch.as_tensor(row_subset(data.rows or 1, LOOK_ROWS)))
        if numbers(fit, data) * FEWEST > MAX_ELEMENTS:  # which `moved` says; spared are the draws
            return moved(fit, {}, data, chains=chains, dispersed=None)
        known = joint_draws(fit, 2 * chains, data.batch())
        joint = {name: torch.stack([draw[name] for draw in known]) for name in known[0]}
        latent = {name: value for name, value in joint.items() if name in fit.info.sites}
        return _looked(fit, latent, data, chains, beyond=not alone)


def look_at_draws(fit: Fit) -> SecondLook | str:
    """Short chains from draws of which nothing else is known, all asked for at once, and from elsewhere."""
    if "density" not in fit.info.offers:
        return "no short chains were run, as the program has no density"
    with fit.bound():
        if numbers(fit, fit.data) * FEWEST > MAX_ELEMENTS:  # which `moved` says; spared are the draws
            return moved(fit, {}, fit.data, chains=CHAINS, dispersed=None)
        known = fit.learned.draw(2 * CHAINS, fit.data.batch())
        names = [name for name in known[0] if name in fit.info.sites]
        return _looked(fit, {n: torch.stack([torch.as_tensor(d[n]) for d in known]) for n in names}, fit.data, CHAINS)


def drift(look: SecondLook | str) -> Moments | None:
    """How far the chains that began at the fit's draws have drifted from these."""
    return None if isinstance(look, str) else between_draws(look.draws, look.end, look.names, look.rows)


def places_of(look: SecondLook | str) -> tuple[int, int, float, str]:
    """What chains from elsewhere found, as verdicts take it."""
    return (0, 0, 0.0, "") if isinstance(look, str) else (look.elsewhere, look.dispersed, look.gain, look.place)


def _looked(fit: Fit, draws: dict[str, Tensor], data: Dataset, chains: int, *, beyond: bool = True) -> SecondLook | str:
    """Short chains from draws of all latents at ``data``; some begin at draws of the prior. Inside ``fit.bound()``."""
    prior: dict[str, Tensor] | None = None
    if beyond:
        proper = not any(site.improper for site in fit.info.select())
        prior = {}
        with contextlib.suppress(UndrawableError):
            prior = prior_rows(fit.program.model, data.batch(), chains // 4) if proper else {}
    return moved(fit, draws, data, chains=chains, dispersed=prior, relabel=fit.program.relabel)
