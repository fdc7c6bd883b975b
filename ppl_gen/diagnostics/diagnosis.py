"""diagnose(): one table and one plain sentence, by what kind of fit it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from pyro import poutine
from torch import Tensor

from ppl_gen.bridge import az_summary, to_tree
from ppl_gen.diagnostics.game_verdicts import rows_compared, unseen, verdict_game
from ppl_gen.diagnostics.grades import graded
from ppl_gen.diagnostics.guide_weights import all_points, guide_weights
from ppl_gen.diagnostics.lone_rows import lone_rows
from ppl_gen.diagnostics.looks import drift, look_at_chains, look_at_draws, places_of
from ppl_gen.diagnostics.missed import kept_look
from ppl_gen.diagnostics.mixing import RESCUE, unmixed
from ppl_gen.diagnostics.posterior_group import affordable_rows, latent_summary_names, posterior_groups
from ppl_gen.diagnostics.second_look import SecondLook
from ppl_gen.diagnostics.trends import moving
from ppl_gen.diagnostics.verdicts import (
    Cause,
    Verdict,
    loss_trend,
    verdict_chains,
    verdict_draws,
    verdict_point,
    verdict_variational,
    with_points,
    with_repeats,
)
from ppl_gen.errors import PROGRAM_ERRORS, require_whole
from ppl_gen.inference.guides.resolved import point_sites
from ppl_gen.workspace.isolation import without_side_effects

if TYPE_CHECKING:
    import pandas

    from ppl_gen.fits.result import Fit

__all__ = ["chain_table", "diagnose", "judged_chains", "verdict"]

DRAWS = 1000  # of the table; a verdict weighs four times as many, since k-hat scatters by 0.2 at a thousand


def verdict(fit: Fit) -> Verdict:
    """See `Fit.verdict`: computed by the first question, and kept."""
    return _judged(fit, DRAWS)


def diagnose(fit: Fit, *, draws: int = DRAWS, seed: int | None = None) -> pandas.DataFrame:
    """See `Fit.diagnose`; ``attrs`` also holds ``pareto_k_rows`` and ``pareto_k_threshold`` where they apply, and of a
    game ``rows_compared``: made rows beside those of the data (or why they were not compared).

    The seed is that of the table's draws. The verdict is the fit's own: its randomness follows from the fit alone.
    """
    require_whole("draws", draws)
    with fit.bound(seed):
        groups, _ = posterior_groups(affordable_rows(fit, draws), draws, together=True)
    posterior = {k: v for k, v in groups["posterior"].items() if k in latent_summary_names(fit)}
    by = fit.judged_by
    if by == "chains":
        frame = chain_table(posterior, fit.learned.stats)
    elif by == "weights" and _out_of_reach(fit):
        frame = _frame(posterior, chains=False)
        frame.attrs["pareto_k"] = math.nan
    elif by == "weights":
        fit = fit if fit.data.streamed is None else replace(fit, data=fit.data.excerpt())
        frame = _frame(posterior, chains=False)
        weights = guide_weights(fit, draws)
        frame.attrs["pareto_k"] = math.nan if weights.k is None else weights.k
        if weights.rows is not None:
            frame.attrs["pareto_k_rows"] = weights.rows
        frame.attrs["pareto_k_threshold"] = weights.threshold
    else:
        frame = _frame(posterior, chains=False) if by and fit.info.select() else _point(fit, posterior)
        frame.attrs["pareto_k"] = math.nan
    if _game(fit):
        frame.attrs["rows_compared"] = rows_compared(fit)
    frame.attrs["verdict"] = str(_judged(fit, draws))
    return frame


def _judged(fit: Fit, draws: int) -> Verdict:
    key = ("verdict", draws)
    if key not in fit.computed:
        by = fit.judged_by
        if by == "chains":
            fit.computed[key] = _judged_chains(fit)
        elif by in ("weights", "draws") and not _game(fit) and not all_points(fit) and _out_of_reach(fit):
            fit.computed[key] = _unjudged(fit)
        elif by == "weights" and not _game(fit) and not all_points(fit):
            fit.computed[key] = _judged_guide(fit, draws)
        elif by == "draws" and fit.info.select():
            fit.computed[key] = _judged_draws(fit)
        else:
            fit.computed[key] = _judged_point(fit)
        fit.computed[key] = with_repeats(fit.computed[key], fit.notes.get("repeated values", ""))
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


def _count(stats: Mapping[str, Tensor], name: str) -> int:
    return int(stats[name].sum()) if name in stats else 0


def _judged_chains(fit: Fit) -> Verdict:
    with fit.bound():
        groups, _ = posterior_groups(fit, DRAWS)
    held, stats = fit.learned.by_chain() or {}, fit.learned.stats
    chains, length = next(iter(held.values())).shape[:2]
    frame = chain_table({k: v for k, v in groups["posterior"].items() if k in latent_summary_names(fit)}, stats)
    close = "starts" in fit.notes or chains < 2
    look: SecondLook | str = look_at_chains(fit, held) if close else ""
    return judged_chains(frame, stats, chains, length, close=close and chains > 1, places=places_of(look))


def chain_table(posterior: dict[str, np.ndarray], stats: Mapping[str, Tensor]) -> pandas.DataFrame:
    """The table of draws of chains (site -> chains x draws x shape), with the number of divergences."""
    frame = _frame(posterior, chains=True)
    frame.attrs["divergences"] = _count(stats, "diverging")
    frame.attrs["pareto_k"] = math.nan
    return frame


def judged_chains(
    frame: pandas.DataFrame,
    stats: Mapping[str, Tensor],
    chains: int,
    length: int,
    *,
    close: bool = False,
    places: tuple[int, int, float, str] = (0, 0, 0.0, ""),
) -> Verdict:
    """The verdict on chains of ``length`` draws from their table and ``stats``; see `verdict_chains`."""
    return verdict_chains(
        frame,
        _count(stats, "diverging"),
        chains * length,
        chains=chains,
        saturated=_count(stats, "reached_max_treedepth"),
        close=close,
        places=places,
    )


def _judged_guide(fit: Fit, draws: int) -> Verdict:
    if fit.data.streamed is not None:  # its rows stand for themselves: those at hand are judged
        return _judged_guide(replace(fit, data=fit.data.excerpt()), draws)
    weights, points = guide_weights(fit, draws), _points(fit)
    look = kept_look(fit, draws) if not points else ""
    found = verdict_variational(
        weights.k,
        weights.rows,
        weights.threshold,
        trend=_trend(fit),
        rows=fit.data.rows or 1,
        effective=weights.effective,
        weighted=weights.moments,
        weighted_rows=weights.row_moments,
        effective_rows=weights.row_shares,
        moved=drift(look),
        chains=look.chains if isinstance(look, SecondLook) else 0,
        places=places_of(look),
        unseen=look if isinstance(look, str) else "",
        cause=_cause(fit),
    )
    return with_points(found, points)


def _out_of_reach(fit: Fit) -> bool:
    """Whether to hold a posterior against its density takes all rows of a file too large for memory, many times."""
    return bool(fit.data.beyond_memory and fit.info.select(local=False))


def _unjudged(fit: Fit) -> Verdict:
    found = (
        f"the posterior of what all rows share was not held against the density, which takes all {fit.data.rows} rows, "
        f"{fit.data.beyond_memory}, for every draw"
    )
    still = moving(_trend(fit), fit.data.rows or 1, _networks(fit))
    return graded([(1, found, "Fit some of the rows, in memory, and ask for the verdict of that fit"), *still], "")


def _judged_draws(fit: Fit) -> Verdict:
    look = look_at_draws(fit)
    chains = look.chains if isinstance(look, SecondLook) else 0
    unseen = look if isinstance(look, str) else ""
    trend, networks = _trend(fit), _networks(fit)
    rows = fit.data.rows or 1
    return verdict_draws(
        drift(look),
        chains,
        places_of(look),
        unseen=unseen,
        trend=trend,
        rows=rows,
        networks=networks,
        noun=fit.learned.noun,
    )


def _points(fit: Fit) -> list[str]:
    return [name for name in point_sites(fit.info) if not fit.info.sites[name].improper]


def _cause(fit: Fit) -> Cause:
    return Cause(
        steps=int(fit.cost.get("steps", 0)) or 1,
        minibatches="batch_size=" in fit.settings and "batch_size=None" not in fit.settings,
        guide=type(fit.guide).__name__,
        networks=_networks(fit) or _rows_alone(fit),
        amortised=bool(fit.info.select(local=True)) and not fit.info.select(local=False),
        converged=str(fit.status) == "converged",
        given=fit.guide_source == "cavi",
    )


def _networks(fit: Fit) -> bool:
    return any("$$$" in name for name in fit.params)


def _rows_alone(fit: Fit) -> bool:
    """Whether nothing is learned but the latents of rows, each by itself: a loss then matters by the row."""
    if fit.info.select(local=False) or not fit.info.select(local=True):
        return False
    few = fit.data.template(2)
    with fit.bound():
        try:
            with without_side_effects():
                trace = poutine.trace(fit.program.model).get_trace(*few.args, **few.kwargs)
        except PROGRAM_ERRORS:
            return False
    return not any(node["type"] == "param" for node in trace.nodes.values())


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
    found = _judged_game(fit) if _game(fit) else _settled(fit)
    return with_points(found, _points(fit)) if fit.judged_by == "weights" else found


def _judged_game(fit: Fit) -> Verdict:
    energy = fit.program.energy
    measured = bool({"density", "exact evidence"} & set(fit.info.offers)) or energy is not None
    rescue = RESCUE if fit.program.drawn_by_chain else fit.notes.get("if modes are missing", "")
    return verdict_game(
        rows_compared(fit), fit.records, measured=measured, rescue=rescue, more=[*unmixed(fit), *unseen(fit)]
    )


def _settled(fit: Fit) -> Verdict:
    return verdict_point(
        str(fit.status) == "converged",
        criterion=fit.criterion,
        trend=_trend(fit),
        rows=fit.data.rows or 1,
        networks=_networks(fit),
        restarts=max(1, int(fit.cost.get("restarts", 1))),
        lone=lone_rows(fit),
        failed=str(fit.status) == "failed",
    )


def _trend(fit: Fit) -> tuple[float, float] | None:
    losses = np.asarray(fit.records.get("program_loss", []), dtype=np.float64)
    losses = losses[np.isfinite(losses)]
    return loss_trend(losses) if len(losses) else None
