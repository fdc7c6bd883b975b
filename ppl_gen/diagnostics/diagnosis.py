"""diagnose(): one table and one plain sentence, by what kind of fit it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ppl_gen.data.batching import LARGE, Dataset
from ppl_gen.diagnostics.bridge import az_summary, to_tree
from ppl_gen.diagnostics.densities import derived
from ppl_gen.diagnostics.export import affordable_rows, latent_summary_names, posterior_groups
from ppl_gen.diagnostics.moments import Moments, between_draws, unconstrained, weighted
from ppl_gen.diagnostics.psis import (
    MIN_DRAWS,
    effective_sample_size,
    pareto_k,
    pareto_k_rows,
    pareto_k_threshold,
    row_subset,
    smoothed_weights,
)
from ppl_gen.diagnostics.second_look import SecondLook, moved
from ppl_gen.diagnostics.verdicts import (
    Cause,
    Verdict,
    loss_trend,
    verdict_chains,
    verdict_point,
    verdict_variational,
    with_points,
)
from ppl_gen.diagnostics.weighed import WeighedDraws, weighed_draws
from ppl_gen.errors import require_whole
from ppl_gen.finite_globals import extended, summed_globals
from ppl_gen.inference.guides import point_sites
from ppl_gen.inference.objectives.particles import can_vectorise, global_draw, log_weights_in_chunks, sampled
from ppl_gen.newrows import follows_rows
from ppl_gen.posterior import ChainPosterior
from ppl_gen.predictive import amortised, prior_rows

if TYPE_CHECKING:
    import pandas

    from ppl_gen.result import Fit

__all__ = ["chain_table", "diagnose", "judged_chains", "k_hats", "verdict"]

DRAWS = 1000  # of the table; a verdict weighs four times as many, since k-hat scatters by 0.2 at a thousand
MAX_ROWS = 200  # rows whose k-hat a verdict looks at: the share of bad rows is then known to 0.035
LOOK_ROWS = 50  # rows from whose draws short chains begin, where rows stand for themselves
CHAINS = 200  # short chains: a mean is then known to 0.07 sd, an sd to 5 %
CELLS = 200_000_000  # numbers of data times draws (times particles) that the weights may cost
PARTICLES = 20  # of the locals of each row, per draw of the globals


def verdict(fit: Fit) -> Verdict:
    """See `Fit.verdict`: computed by the first question, and kept."""
    return _judged(fit, DRAWS)


def diagnose(fit: Fit, *, draws: int = DRAWS, seed: int | None = None) -> pandas.DataFrame:
    """See `Fit.diagnose`; ``attrs`` also holds ``pareto_k_rows`` and ``pareto_k_threshold`` where they apply.

    The seed is that of the table's draws. The verdict is the fit's own: its randomness follows from the fit alone.
    """
    require_whole("draws", draws)
    with fit.bound(seed):
        groups, _ = posterior_groups(affordable_rows(fit, draws), draws)
    posterior = {k: v for k, v in groups["posterior"].items() if k in latent_summary_names(fit)}
    learned = fit.learned
    if isinstance(learned, ChainPosterior):
        frame = chain_table(posterior, learned)
    elif _guided(fit):
        frame = _frame(posterior, chains=False)
        weights = _weights(fit, draws)
        frame.attrs["pareto_k"] = math.nan if weights.k is None else weights.k
        if weights.rows is not None:
            frame.attrs["pareto_k_rows"] = weights.rows
        frame.attrs["pareto_k_threshold"] = weights.threshold
    else:
        frame = _point(fit, posterior)
        frame.attrs["pareto_k"] = math.nan
    frame.attrs["verdict"] = str(_judged(fit, draws))
    return frame


def _guided(fit: Fit) -> bool:
    return fit.learned.kind == "variational" and fit.guide is not None


def _judged(fit: Fit, draws: int) -> Verdict:
    key = ("verdict", draws)
    if key not in fit.computed:
        if isinstance(fit.learned, ChainPosterior):
            fit.computed[key] = _judged_chains(fit, fit.learned)
        elif _guided(fit) and not _game(fit) and not _all_points(fit):
            fit.computed[key] = _judged_guide(fit, draws)
        else:
            fit.computed[key] = _judged_point(fit)
    found: Verdict = fit.computed[key]
    fit.computed["verdict"] = found  # what `repr` shows
    return found


def _game(fit: Fit) -> bool:
    """Whether the objective compared samples rather than densities (or the program has no density)."""
    return "density" not in fit.info.offers or "game" in fit.notes


def _frame(posterior: dict[str, np.ndarray], *, chains: bool) -> pandas.DataFrame:
    import pandas

    if not posterior:
        return pandas.DataFrame({"mean": [], "sd": []})
    return az_summary(to_tree({"posterior": posterior}), chains=chains)


def _count(learned: ChainPosterior, name: str) -> int:
    return int(learned.stats[name].sum()) if name in learned.stats else 0


def _judged_chains(fit: Fit, learned: ChainPosterior) -> Verdict:
    with fit.bound():
        groups, _ = posterior_groups(fit, DRAWS)
    frame = chain_table({k: v for k, v in groups["posterior"].items() if k in latent_summary_names(fit)}, learned)
    flat = {name: value.flatten(0, 1) for name, value in learned.draws.items()}
    total = len(next(iter(flat.values())))
    close = "starts" in fit.notes or learned.chains < 2
    look: SecondLook | str = ""
    if close:
        kept = torch.linspace(0, total - 1, min(total, 2 * CHAINS)).round().long()
        with fit.bound():
            look = _looked(fit, {name: value[kept] for name, value in flat.items()}, fit.data, CHAINS)
    return judged_chains(frame, learned, close=close and learned.chains > 1, places=_places(look))


def chain_table(posterior: dict[str, np.ndarray], learned: ChainPosterior) -> pandas.DataFrame:
    """The table of draws of chains (site -> chains x draws x shape), with the number of divergences."""
    frame = _frame(posterior, chains=True)
    frame.attrs["divergences"] = _count(learned, "diverging")
    frame.attrs["pareto_k"] = math.nan
    return frame


def judged_chains(
    frame: pandas.DataFrame,
    learned: ChainPosterior,
    *,
    close: bool = False,
    places: tuple[int, int, float, str] = (0, 0, 0.0, ""),
) -> Verdict:
    """The verdict on chains from their table; see `verdict_chains`."""
    return verdict_chains(
        frame,
        _count(learned, "diverging"),
        int(np.prod(next(iter(learned.draws.values())).shape[:2])),
        chains=learned.chains,
        saturated=_count(learned, "reached_max_treedepth"),
        close=close,
        places=places,
    )


def _places(look: SecondLook | str) -> tuple[int, int, float, str]:
    return (0, 0, 0.0, "") if isinstance(look, str) else (look.elsewhere, look.dispersed, look.gain, look.place)


def _looked(fit: Fit, draws: dict[str, Tensor], data: Dataset, chains: int, *, beyond: bool = True) -> SecondLook | str:
    """Short chains from draws of all latents at ``data``; some begin at draws of the prior. Inside ``fit.bound()``."""
    prior: dict[str, Tensor] | None = None
    if beyond:
        proper = not any(site.improper for site in fit.info.select())
        prior = prior_rows(fit.program.model, data.batch(), chains // 4) if proper else {}
    return moved(fit, draws, data, chains=chains, dispersed=prior, relabel=fit.program.relabel)


def _judged_guide(fit: Fit, draws: int) -> Verdict:
    weights, points = _weights(fit, draws), _points(fit)
    look, own = _second_look(fit, draws) if not points else ("", None)
    shown = None
    if isinstance(look, SecondLook):
        assert own is not None
        shown = between_draws(own, look.start, look.end, look.names)
    found = verdict_variational(
        weights.k,
        weights.rows,
        weights.threshold,
        trend=_trend(fit),
        rows=fit.data.rows or 1,
        effective=weights.effective,
        weighted=weights.moments,
        moved=shown,
        chains=look.chains if isinstance(look, SecondLook) else 0,
        places=_places(look),
        unseen=look if isinstance(look, str) else "",
        cause=_cause(fit),
    )
    return with_points(found, points)


def _points(fit: Fit) -> list[str]:
    return [name for name in point_sites(fit.info) if not fit.info.sites[name].improper]


def _cause(fit: Fit) -> Cause:
    return Cause(
        steps=int(fit.cost.get("steps", 0)) or 1,
        minibatches="batch_size=" in fit.settings and "batch_size=None" not in fit.settings,
        guide=type(fit.guide).__name__,
        networks=_networks(fit),
        amortised=bool(fit.info.select(local=True)) and not fit.info.select(local=False),
        converged=str(fit.status) == "converged",
        given=fit.guide_source == "cavi",
    )


def _networks(fit: Fit) -> bool:
    return any("$$$" in name for name in fit.params)


def _second_look(fit: Fit, draws: int) -> tuple[SecondLook | str, np.ndarray | None]:
    """Short chains from the guide's draws, and these draws themselves: for all rows, or some where rows stand alone."""
    chains = max(32, min(CHAINS, draws // 4))
    with fit.bound():
        alone = not fit.info.select(local=False) and amortised(fit)
        data = fit.data
        if alone and (data.rows or 0) > LOOK_ROWS:
            data = data.subset(torch.as_tensor(row_subset(data.rows or 1, LOOK_ROWS)))
        if data.elements * 32 > 4_000_000:
            return moved(fit, {}, data, chains=chains, dispersed=None), None
        known = fit.learned.draw(2 * chains, data.batch())
        joint = {name: torch.stack([draw[name] for draw in known]) for name in known[0]}
        latent = {name: value for name, value in joint.items() if name in fit.info.sites}
        look = _looked(fit, latent, data, chains, beyond=not alone)
        return look, None if isinstance(look, str) else look.draws


def _all_points(fit: Fit) -> bool:
    points, guided = set(point_sites(fit.info)), set(fit.info.guide_sites or {})
    return bool(points) and not [n for n in guided if n in fit.info.sites and n not in points]


def _point(fit: Fit, posterior: dict[str, np.ndarray]) -> pandas.DataFrame:
    import pandas

    values = posterior or {
        name: value.detach().cpu().numpy()[None, None] for name, value in fit.params.items() if value.numel() <= 50
    }
    rows = {}
    for name, value in values.items():
        first = value[0, 0]
        for index in np.ndindex(first.shape):
            rows[name + (str(list(index)) if index else "")] = float(first[index])
    return pandas.DataFrame({"mean": pandas.Series(rows, dtype=float), "sd": pandas.Series(0.0, index=list(rows))})


def _judged_point(fit: Fit) -> Verdict:
    found = verdict_point(
        str(fit.status) == "converged",
        trend=_trend(fit),
        rows=fit.data.rows or 1,
        networks=_networks(fit),
        restarts=max(1, int(fit.cost.get("restarts", 1))),
        implicit=_game(fit),
    )
    return with_points(found, _points(fit)) if _guided(fit) else found


def _trend(fit: Fit) -> tuple[float, float] | None:
    losses = np.asarray(fit.records.get("program_loss", []), dtype=np.float64)
    losses = losses[np.isfinite(losses)]
    return loss_trend(losses) if len(losses) else None


@dataclass(frozen=True)
class _Weights:
    """k-hat of the globals, of rows, its limit; effective draws of how many; moments of the globals."""

    k: float | None
    rows: np.ndarray | None
    threshold: float
    effective: tuple[float, int] | None = None
    moments: Moments | None = None


def k_hats(fit: Fit, draws: int) -> tuple[float | None, np.ndarray | None, float]:
    """PSIS k-hat of a variational fit: one for the globals (locals integrated out), one per row for the locals.

    Returns (joint or None, per row or None, threshold). At most 200 rows are judged, spread evenly over the data.
    """
    found = _weights(fit, draws)
    return found.k, found.rows, found.threshold


def _weights(fit: Fit, draws: int) -> _Weights:
    key = ("weights", draws)
    if key not in fit.computed:
        fit.computed[key] = _weigh(fit, draws)
    found: _Weights = fit.computed[key]
    return found


def _weigh(fit: Fit, draws: int) -> _Weights:
    if _all_points(fit) or "density" not in fit.info.offers:
        return _Weights(None, None, pareto_k_threshold(max(MIN_DRAWS, draws)))
    # Where the guide holds a site at one value, the weights are those of the rest given that value.
    guided = [s for name, s in (fit.info.guide_sites or {}).items() if name in fit.info.sites and not s.point]
    local = [site for site in guided if site.local]
    whole = _whole_vector(fit)
    joint = _Weights(None, None, pareto_k_threshold(draws))
    if any(not site.local for site in guided) or not local or whole:
        with fit.bound():
            joint = _weigh_globals(fit, draws, 1 if whole or not local else PARTICLES)
    if not local or whole:
        return joint
    with fit.bound():
        rows = pareto_k_rows(_row_weights(fit, draws).double().cpu().numpy(), max_rows=None)
    return _Weights(joint.k, rows, joint.threshold, joint.effective, joint.moments)


def _weigh_globals(fit: Fit, draws: int, particles: int) -> _Weights:
    cells = max(1, fit.data.elements) * particles
    count = max(min(4 * draws, CELLS // cells), min(draws, 100))
    found = weighed_draws(fit, count, particles)
    ratios = found.log_weights.numpy()
    k = float(pareto_k(ratios))
    count = len(ratios)  # fewer where the program takes one draw at a time
    threshold = pareto_k_threshold(count)
    bad = np.isnan(ratios).any() or not np.isfinite(ratios.max())
    if bad:
        return _Weights(math.inf, None, threshold)
    logs = smoothed_weights(ratios)
    return _Weights(k, None, threshold, (float(effective_sample_size(logs)), count), _moments(fit, found, logs))


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


def _row_weights(fit: Fit, draws: int) -> Tensor:
    """log p(x_i, z_i | theta) - log q(z_i): draws x rows, at one draw of the globals."""
    from pyro.infer.autoguide import AutoGuide

    info, rows = fit.info, fit.data.rows or 1
    chosen = row_subset(rows, MAX_ROWS)
    whole = isinstance(fit.guide, AutoGuide)  # its rows cannot be taken apart: weigh all of them, keep some
    some = fit.data.subset(torch.as_tensor(chosen))
    whole = whole or not follows_rows(fit, some.batch())
    data: Dataset = fit.data if whole else some
    batch = data.batch()
    guided = set(info.guide_sites or {})
    # Auxiliary draws included: the guide's locals may hang on them.
    drawn_on = fit.data.head(256) if fit.data.elements > LARGE and info.data_plate else fit.data.batch()
    values: dict[str, Tensor] = {}
    if coupling := summed_globals(fit, guided):
        values = _with_finite_globals(fit)
    elif info.select(local=False):
        values = global_draw(fit.guide, drawn_on, info)[0]
    sums = tuple(name for name in info.finite_latents if name not in guided and name not in coupling)
    vectorise = can_vectorise(fit.joint, fit.guide, info, batch, sums)
    weights = log_weights_in_chunks(
        fit.joint, fit.guide, info, batch, draws, values=values, sums=sums, vectorise=vectorise
    )
    assert weights.rows is not None
    return weights.rows[:, torch.as_tensor(chosen)] if whole else weights.rows


def _with_finite_globals(fit: Fit) -> dict[str, Tensor]:
    """One draw of what the guide draws outside the data plate, and of the finite sites there given it and all rows."""
    drawn = sampled(fit.guide, fit.data.batch()).nodes.items()
    every = {name: site["value"] for name, site in drawn if site["type"] == "sample"}
    sites = {**(fit.info.guide_sites or {}), **fit.info.sites}
    return {n: value for n, value in extended(fit, [every])[0].items() if n in sites and not sites[n].local}
