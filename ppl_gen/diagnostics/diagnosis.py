"""diagnose(): one table and one plain sentence, by what kind of fit it is."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ppl_gen.data.batching import LARGE, Dataset
from ppl_gen.diagnostics.bridge import az_summary, to_tree
from ppl_gen.diagnostics.export import affordable_rows, latent_summary_names, posterior_groups
from ppl_gen.diagnostics.psis import pareto_k, pareto_k_rows, pareto_k_threshold, row_subset
from ppl_gen.diagnostics.verdicts import loss_trend, verdict_chains, verdict_point, verdict_variational, with_points
from ppl_gen.diagnostics.weighed import weighed_draws
from ppl_gen.errors import require_whole
from ppl_gen.finite_globals import extended, summed_globals
from ppl_gen.inference.guides import point_sites
from ppl_gen.inference.objectives.particles import can_vectorise, global_draw, log_weights_in_chunks, sampled
from ppl_gen.newrows import follows_rows
from ppl_gen.posterior import ChainPosterior

if TYPE_CHECKING:
    import pandas

    from ppl_gen.diagnostics.verdicts import Verdict
    from ppl_gen.result import Fit

__all__ = ["diagnose", "k_hats", "verdict"]

MAX_ROWS = 200  # rows whose k-hat a verdict looks at: the share of bad rows is then known to 0.035


DRAWS = 1000


def verdict(fit: Fit) -> Verdict:
    """See `Fit.verdict`: computed by the first question, and kept."""
    if "verdict" not in fit.computed:
        fit.computed["verdict"] = _diagnosed(fit, DRAWS, None)[1]
    found: Verdict = fit.computed["verdict"]
    return found


def diagnose(fit: Fit, *, draws: int = DRAWS, seed: int | None = None) -> pandas.DataFrame:
    """See `Fit.diagnose`; ``attrs`` also holds ``pareto_k_rows`` and ``pareto_k_threshold`` where they apply."""
    require_whole("draws", draws)
    frame, found = _diagnosed(fit, draws, seed)
    frame.attrs["verdict"] = str(found)
    if (draws, seed) == (DRAWS, None):
        fit.computed["verdict"] = found
    return frame


def _diagnosed(fit: Fit, draws: int, seed: int | None) -> tuple[pandas.DataFrame, Verdict]:
    with fit.bound(seed):
        groups, _ = posterior_groups(affordable_rows(fit, draws), draws)
    posterior = {k: v for k, v in groups["posterior"].items() if k in latent_summary_names(fit)}
    if isinstance(fit.learned, ChainPosterior):
        return _chains(fit, posterior, fit.learned)
    if fit.learned.kind == "variational" and fit.guide is not None:
        return _variational(fit, posterior, draws, seed)
    return _point(fit, posterior)


def _frame(posterior: dict[str, np.ndarray], *, chains: bool) -> pandas.DataFrame:
    import pandas

    if not posterior:
        return pandas.DataFrame({"mean": [], "sd": []})
    return az_summary(to_tree({"posterior": posterior}), chains=chains)


def _chains(fit: Fit, posterior: dict[str, np.ndarray], learned: ChainPosterior) -> tuple[pandas.DataFrame, Verdict]:
    frame = _frame(posterior, chains=True)
    stats = {name: value.cpu().numpy() for name, value in learned.stats.items()}
    diverging = int(np.sum(stats["diverging"])) if "diverging" in stats else 0
    saturated = int(np.sum(stats["reached_max_treedepth"])) if "reached_max_treedepth" in stats else 0
    total = int(np.prod(next(iter(learned.draws.values())).shape[:2]))
    frame.attrs["divergences"] = diverging
    frame.attrs["pareto_k"] = math.nan
    return frame, verdict_chains(frame, diverging, total, chains=learned.chains, saturated=saturated)


def _variational(
    fit: Fit, posterior: dict[str, np.ndarray], draws: int, seed: int | None
) -> tuple[pandas.DataFrame, Verdict]:
    joint, rows, threshold = k_hats(fit, draws, seed)
    frame = _frame(posterior, chains=False)
    trend = _trend(fit)
    if joint is None and rows is None:
        found = verdict_point(str(fit.status) == "converged", trend=trend)
    else:
        found = verdict_variational(joint, rows, threshold, trend=trend)
    found = with_points(found, [name for name in point_sites(fit.info) if not fit.info.sites[name].improper])
    frame.attrs["pareto_k"] = math.nan if joint is None else joint
    if rows is not None:
        frame.attrs["pareto_k_rows"] = rows
    frame.attrs["pareto_k_threshold"] = threshold
    return frame, found


def _point(fit: Fit, posterior: dict[str, np.ndarray]) -> tuple[pandas.DataFrame, Verdict]:
    import pandas

    values = posterior or {
        name: value.detach().cpu().numpy()[None, None] for name, value in fit.params.items() if value.numel() <= 50
    }
    rows = {}
    for name, value in values.items():
        first = value[0, 0]
        for index in np.ndindex(first.shape):
            rows[name + (str(list(index)) if index else "")] = float(first[index])
    frame = pandas.DataFrame({"mean": pandas.Series(rows, dtype=float), "sd": pandas.Series(0.0, index=list(rows))})
    implicit = "density" not in fit.info.offers
    restarts = int(fit.cost.get("restarts", 1))
    frame.attrs["pareto_k"] = math.nan
    return frame, verdict_point(
        str(fit.status) == "converged", trend=_trend(fit), restarts=max(1, restarts), implicit=implicit
    )


def _trend(fit: Fit) -> tuple[float, float] | None:
    losses = np.asarray(fit.records.get("program_loss", []), dtype=np.float64)
    losses = losses[np.isfinite(losses)]
    return loss_trend(losses) if len(losses) else None


def k_hats(fit: Fit, draws: int, seed: int | None = None) -> tuple[float | None, np.ndarray | None, float]:
    """PSIS k-hat of a variational fit: one for the globals (locals integrated out), one per row for the locals.

    Returns (joint or None, per row or None, threshold). At most 200 rows are judged, spread evenly over the data.
    """
    key = ("k_hats", draws, seed)
    if key not in fit.computed:
        fit.computed[key] = _k_hats(fit, draws, seed)
    found: tuple[float | None, np.ndarray | None, float] = fit.computed[key]
    return found


def _k_hats(fit: Fit, draws: int, seed: int | None) -> tuple[float | None, np.ndarray | None, float]:
    threshold = pareto_k_threshold(draws)
    # Where the guide holds a site at one value, the weights are those of the rest given that value.
    guided = [s for name, s in (fit.info.guide_sites or {}).items() if name in fit.info.sites and not s.point]
    if not guided:
        return None, None, threshold
    local = [site for site in guided if site.local]
    joint: float | None = None
    if any(not site.local for site in guided) or not local or _whole_vector(fit):
        with fit.bound(seed):
            weighed = weighed_draws(fit, draws, 1 if _whole_vector(fit) else 20)
            joint = float(pareto_k(weighed.log_weights.numpy()))
    if not local or _whole_vector(fit):
        return joint, None, threshold
    with fit.bound(seed):
        rows = pareto_k_rows(_row_weights(fit, draws).double().cpu().numpy(), max_rows=None)
    return joint, rows, threshold


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
    vectorise = can_vectorise(fit.program.model, fit.guide, info, batch, sums)
    weights = log_weights_in_chunks(
        fit.program.model, fit.guide, info, batch, draws, values=values, sums=sums, vectorise=vectorise
    )
    assert weights.rows is not None
    return weights.rows[:, torch.as_tensor(chosen)] if whole else weights.rows


def _with_finite_globals(fit: Fit) -> dict[str, Tensor]:
    """One draw of what the guide draws outside the data plate, and of the finite sites there given it and all rows."""
    drawn = sampled(fit.guide, fit.data.batch()).nodes.items()
    every = {name: site["value"] for name, site in drawn if site["type"] == "sample"}
    sites = {**(fit.info.guide_sites or {}), **fit.info.sites}
    return {n: value for n, value in extended(fit, [every])[0].items() if n in sites and not sites[n].local}
