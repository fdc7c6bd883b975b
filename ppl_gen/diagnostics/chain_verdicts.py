"""Verdicts on Markov chains, from their table and the counts of what went wrong on their way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ppl_gen.diagnostics.grades import Finding, Verdict, elsewhere, graded

if TYPE_CHECKING:
    import pandas

__all__ = ["verdict_chains"]

_R_HAT, _R_HAT_APART = 1.01, 1.1  # Vehtari et al. 2021; the older limit, above which chains sample different places
_ESS_PER_CHAIN, _ESS_TOTAL = 100, 400  # Vehtari et al. 2021: below these r_hat and the errors are themselves unsure
_ESS_NONE = 50  # an effective sample this small leaves a standard error of 0.14 posterior sd
_DIVERGENT_SHARE = 0.01


def verdict_chains(
    summary: pandas.DataFrame,
    divergences: int,
    draws: int,
    *,
    chains: int,
    saturated: int = 0,
    close: bool = False,
    places: tuple[int, int, float, str] = (0, 0, 0.0, ""),
) -> Verdict:
    """Judge Markov chains by agreement, effective sample size, divergences and tree depth.

    ``summary`` is `az_summary(..., chains=True)`; ``draws`` counts the kept draws of all chains together,
    ``divergences`` and ``saturated`` those of them that diverged or that ended at the largest tree depth. Doubtful:
    r_hat > 1.01, a bulk or tail effective sample size under 100 per chain or 400 in all (Vehtari, Gelman, Simpson,
    Carpenter, Burkner, Bayesian Analysis 2021), any divergence (Betancourt 2017), a saturated tree, fewer than two
    chains. Not to be trusted, by limits of our own: r_hat > 1.1, an effective sample size under 50, more than 1 % of
    divergent draws, a quantity that is not finite, or none that varies. Constant quantities are otherwise left out.
    ``close=True``: the chains started close together, so that their agreement shows little; ``places``: what chains
    from elsewhere found, as in `verdict_variational`.

    Raises ValueError where the summary lacks columns or the counts are impossible.

    >>> import pandas
    >>> frame = pandas.DataFrame({"mean": 0.1, "sd": 1.0, "r_hat": 1.002, "ess_bulk": 900.0, "ess_tail": 700.0}, ["mu"])
    >>> print(verdict_chains(frame, 0, 4000, chains=4))
    trust: 4 chains agree (largest r_hat 1.002, smallest effective sample size 700) and no draw diverged.
    """
    lacking = [name for name in ("mean", "sd", "r_hat", "ess_bulk", "ess_tail") if name not in summary.columns]
    if lacking:
        raise ValueError(f"summary: no columns {lacking}; expected the frame of az_summary(..., chains=True)")
    if chains < 1 or draws < 1 or not 0 <= divergences <= draws or not 0 <= saturated <= draws:
        raise ValueError(
            "expected chains and draws of at least 1, and divergences and saturated between 0 and draws; got "
            f"chains={chains}, draws={draws}, divergences={divergences}, saturated={saturated}"
        )
    undefined = summary.index[~np.isfinite(summary["mean"]) | ~np.isfinite(summary["sd"])]
    varying = summary[(summary["sd"] > 0) & np.isfinite(summary["sd"])]
    findings: list[Finding] = []
    if len(undefined):
        findings.append((2, f"{undefined[0]} is not finite in some draws", "Check the program at extreme values"))
    if chains < 2:
        findings.append((1, "a single chain cannot show whether it missed a part of the posterior", "Run 4 chains"))
    elif len(varying):
        findings += _agreement(varying)
    if close and not places[1]:
        found = "all chains started close together and could hardly disagree"
        findings.append((1, found, "Leave out jitter (or start=), so that they begin dispersed"))
    if len(varying):
        findings += _sample_size(varying, max(_ESS_TOTAL, _ESS_PER_CHAIN * chains))
    elif not len(undefined):
        findings.append((2, "no quantity varies: the chains did not move", "Start elsewhere, or use smaller steps"))
    findings += _trouble(divergences, saturated, draws) + elsewhere(places, "all chains")
    worst, least = varying["r_hat"].max(), varying[["ess_bulk", "ess_tail"]].min().min()
    near = "; they started close together and could hardly disagree" if close else ""
    if places[1]:
        near += f"; none of {places[1]} short chains started elsewhere found another mode"
    return graded(
        findings,
        f"{chains} chains agree (largest r_hat {worst:.3f}, smallest effective sample size {least:.0f}) "
        f"and no draw diverged{near}",
    )


def _agreement(varying: pandas.DataFrame) -> list[Finding]:
    if varying["r_hat"].isna().any():
        name = varying.index[varying["r_hat"].isna()][0]
        return [(2, f"the chains are too short to judge {name}", "Run at least 1000 draws a chain")]
    worst = float(varying["r_hat"].max())
    if worst <= _R_HAT:
        return []
    found = f"the chains disagree on {varying['r_hat'].idxmax()} (r_hat {worst:.3f}, expected at most {_R_HAT})"
    advice = "Run a longer warm-up and more draws; if they still disagree, look for several modes or swapped labels"
    return [(2 if worst > _R_HAT_APART else 1, found, advice)]


def _sample_size(varying: pandas.DataFrame, needed: int) -> list[Finding]:
    sizes = varying[["ess_bulk", "ess_tail"]].fillna(0.0).min(axis=1)  # not a number: too few draws for any estimate
    least = float(sizes.min())
    if least >= needed:
        return []
    found = f"{sizes.idxmin()} has an effective sample size of {least:.0f}, expected at least {needed}"
    return [(2 if least < _ESS_NONE else 1, found, "Run more draws")]


def _trouble(divergences: int, saturated: int, draws: int) -> list[Finding]:
    findings: list[Finding] = []
    if divergences:
        found = f"{divergences} of {draws} draws diverged, so a narrow part of the posterior may be missed"
        advice = "Raise the target acceptance probability towards 0.99, or write scale parameters non-centred"
        findings.append((2 if divergences > _DIVERGENT_SHARE * draws else 1, found, advice))
    if saturated:
        found = f"{saturated} of {draws} draws ended at the largest tree depth, so the chains move slowly"
        findings.append((1, found, "Raise the tree depth, adapt a full mass matrix, or rescale the parameters"))
    return findings
