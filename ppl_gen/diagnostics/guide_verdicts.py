"""Verdicts on guides: what weights, short chains and the loss say against one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ppl_gen.diagnostics.causes import Cause
from ppl_gen.diagnostics.grades import Finding, Verdict, elsewhere, graded
from ppl_gen.diagnostics.moments import NEVER, Moments
from ppl_gen.diagnostics.trends import moving
from ppl_gen.weights.psis import NEARLY_EQUAL, told_apart

__all__ = ["close_by", "off_posterior", "verdict_variational"]

_BAD_ROWS = 0.1  # at k = 0.5 and 1000 draws k-hat scatters by 0.15 around its value, so some rows exceed by chance
# Posterior sd, times: halfway to what must never pass (0.5 sd, 0.6 to 1.6), with noise of 0.07 beside it.
_SHIFT, _RATIO = 0.35, 1.35
_SHIFT_FAR, _RATIO_FAR = 1.0, 2.0
_EFFECTIVE = 100  # draws: weighted means are then known to a tenth of an sd
_MOST = 10  # sd or times: where so few draws carry the weights that no more can be said
_MANY = 200  # numbers: among more of them some are off by chance, though none by far, and a share is judged


def verdict_variational(
    k_joint: float | None,
    k_rows: Any | None,
    threshold: float,
    *,
    trend: tuple[float, float] | None = None,
    rows: int = 1,
    effective: tuple[float, int] | None = None,
    weighted: Moments | None = None,
    weighted_rows: Moments | None = None,
    effective_rows: np.ndarray | None = None,
    moved: Moments | None = None,
    chains: int = 0,
    places: tuple[int, int, float, str] = (0, 0, 0.0, ""),
    unseen: str = "",
    cause: Cause | None = None,
) -> Verdict:
    """Judge a guide by its weights, the moments these imply, short chains from its draws, and the trend of its loss.

    Args:
        k_joint, k_rows: `pareto_k` of the globals, `pareto_k_rows` of the rows; None without such latents.
        threshold: from `pareto_k_threshold`.
        trend: from `loss_trend`, in nats per row; ``rows`` turns it into nats in all.
        effective: effective sample size of the weights, and of how many draws.
        effective_rows: the share of effective draws in each row.
        weighted, weighted_rows: the guide's moments against its importance-weighted ones, of globals and of rows.
        moved: the guide's moments against those of ``chains`` short chains that began at its draws.
        places: of the chains that started elsewhere, how many ended outside the guide's mass at a comparable density,
            how many there were, the mean log density gained, and the number that shows it.
        unseen: what could not be looked at.
        cause: what is known of the run, for advice that fits.

    Doubtful: a mean off by more than 0.35 posterior sd, an sd ratio outside of 1 / 1.35 to 1.35, by weights or by
    chains; k-hat between the threshold and 1; fewer than 100 effective draws; more than a tenth of the rows with such a
    mean, sd or k-hat; another mode of comparable density; a loss that still moved by 4 standard errors and more than
    0.2 nats in all. Not to be trusted: a mean off by more than 1 sd, a ratio beyond 2, a k-hat of 1 or more (infinite
    mean), NaN counting as infinite. Among more than 200 numbers some are off by chance: more than a tenth of them have
    to be, or one by 1 sd or 2 times.

    Raises ValueError where nothing was looked at: a fit without random latents is a point (`verdict_point`).

    >>> print(verdict_variational(0.31, None, 0.667))
    trust: no problem was found where the guide has mass (k-hat 0.31, below 0.67).
    >>> print(verdict_variational(0.8, None, 0.7))
    doubtful: the guide is a poor approximation of the posterior (k-hat 0.80, expected below 0.70); \
this need not mean that the program is wrong. Use a richer guide (full covariance, a flow) or check against NUTS.
    """
    k = (
        None
        if k_rows is None
        else np.nan_to_num(np.atleast_1d(np.asarray(k_rows, dtype=np.float64)), nan=np.inf, posinf=np.inf)
    )
    if k_joint is None and (k is None or k.size == 0) and moved is None:
        raise ValueError("k_joint and k_rows are both missing; use verdict_point for a fit without random latents")
    cause = cause or Cause()
    still = moving(trend, rows, cause.networks)
    advice = cause.advice(bool(still), trend)
    told = [
        _told_by_globals(k_joint, threshold, effective, weighted, advice),
        _told_by_rows(k, threshold, effective_rows, weighted_rows, advice),
    ]
    findings = [finding for found, _ in told for finding in found]
    good = [words for _, said in told for words in said]
    sources = {
        "importance-weighted draws": weighted if _believed(k_joint, effective) else None,
        "importance-weighted draws of rows": weighted_rows,
        f"{chains} short chains from its draws": moved,
    }
    findings += off_posterior(sources, advice, "the guide") + elsewhere(places, "the guide") + still
    if moved is not None:
        good.append(close_by(moved, f"{chains} short chains from its draws"))
    if places[1] and not places[0]:
        good.append(f"none of {places[1]} started elsewhere found another mode")
    if unseen:
        good.append(unseen)
    return graded(findings, f"no problem was found where the guide has mass ({'; '.join(good)})")


def _believed(k: float | None, effective: tuple[float, int] | None) -> bool:
    return k is not None and (k < 1.0 or (effective is not None and effective[0] >= NEARLY_EQUAL * effective[1]))


_Told = tuple[list[Finding], list[str]]  # what was found, and what speaks for the guide where nothing was


def _told_by_globals(
    k: float | None, threshold: float, effective: tuple[float, int] | None, weighted: Moments | None, advice: str
) -> _Told:
    if k is None:
        return [], []
    k = math.inf if math.isnan(k) else float(k)
    equal = effective is not None and effective[0] >= NEARLY_EQUAL * effective[1]
    said, limit = told_apart(k, threshold)
    findings, good = [], [f"k-hat {said}, below {limit}"]
    if effective is not None and equal and k > threshold:
        most = math.ceil(100 * math.sqrt(max(effective[1] / effective[0] - 1.0, 0.0))) / 100
        good = [
            f"k-hat {said} is above {limit} and passed over, for the weights are nearly equal: "
            f"by them no mean is off by more than {most:.2f} sd"
        ]
    elif k > threshold:
        findings += _guide(k, threshold, advice)
    if effective is not None:
        findings += _weights(*effective, k, advice)
        good.append(f"{effective[0]:.0f} of {effective[1]} draws effective")
    if weighted is not None:
        good.append(close_by(weighted, "weighted draws"))
    return findings, good


def _told_by_rows(
    k: np.ndarray | None, threshold: float, shares: np.ndarray | None, weighted: Moments | None, advice: str
) -> _Told:
    if k is None or not k.size:
        return [], []
    spared = (k > threshold) & (shares >= NEARLY_EQUAL) if shares is not None else np.zeros(k.shape, bool)
    k = np.where(spared, threshold, k)
    equal = " (or above it with weights that are nearly equal)" if spared.any() else ""
    good = [f"k-hat below {threshold:.2f}{equal} in {np.mean(k <= threshold):.0%} of {k.size} rows"]
    if weighted is not None:
        share = 1.0 - weighted.rows_beyond(_SHIFT, _RATIO)
        good.append(
            f"means within {_SHIFT} sd and sds within a factor of {_RATIO} of weighted draws in {share:.0%} of them"
        )
    return _guide_rows(k, threshold, advice), good


def _guide(k: float, threshold: float, advice: str) -> list[Finding]:
    if k <= threshold:
        return []
    said, limit = told_apart(k, threshold)
    found = (
        f"the guide is a poor approximation of the posterior (k-hat {said}, expected below {limit}); "
        "this need not mean that the program is wrong"
    )
    if k < 0.7:
        needed = math.ceil(10 ** (1 / (1 - k)) / 100) * 100
        return [(1, found, f"Judge it again with about {needed} draws, or use a richer guide")]
    return [(2 if k >= 1 else 1, found, advice)]


def _weights(effective: float, draws: int, k: float, advice: str) -> list[Finding]:
    needed = min(_EFFECTIVE, draws / 4)
    if effective >= needed or k >= 1:
        return []
    found = (
        f"only {effective:.0f} of {draws} draws of the guide have most of the weight, expected at least {needed:.0f}"
    )
    return [(1, found, advice)]


def close_by(moments: Moments, source: str) -> str:
    (shift, _), (ratio, _) = moments.farthest, moments.uneven
    return f"means within {shift:.2f} sd and sds within a factor of {max(ratio, 1 / max(ratio, 1e-12)):.2f} of {source}"


def off_posterior(sources: Mapping[str, Moments | None], advice: str, judged: str) -> list[Finding]:
    """What weights or short chains say against means and spreads of what is ``judged``: told once, by the worst."""
    said = [(*found, source) for source, moments in sources.items() for found in _off(moments)]
    if not said:
        return []
    grade, _, what, source = max(said, key=lambda found: found[:2])
    weights, chains = ({s for *_, s in said if ("short chains" in s) is by} for by in (False, True))
    both = "by importance-weighted draws and short chains alike" if weights and chains else f"by {source}"
    return [(grade, f"{judged} is not the posterior: {both}, {what}", advice)]


def _off(moments: Moments | None) -> list[tuple[int, float, str]]:
    """A fault in any of few numbers, in a tenth of many, in one of many if far off, or in a tenth of the rows.

    Its grade, its size and words for it.
    """
    if moments is None:
        return []
    globals_, rows = moments.shared(), moments.of_rows()
    off = globals_.beyond(_SHIFT, _RATIO)
    found = []
    far = globals_.past(_SHIFT_FAR, _RATIO_FAR)
    if far.any() or (off.any() and (off.size <= _MANY or off.mean() > _BAD_ROWS)):
        share = f" ({off.sum()} of {off.size} numbers off)" if off.size > _MANY else ""
        found.append(_said(globals_, share))
    if (share_of_rows := rows.rows_beyond(_SHIFT, _RATIO)) > _BAD_ROWS:
        found.append(_said(rows, f" ({share_of_rows:.0%} of {rows.count_rows} rows are off)"))
    return found


def _said(moments: Moments, share: str) -> tuple[int, float, str]:
    (shift, where), (ratio, name) = moments.farthest, moments.uneven
    parts = []
    if shift > _SHIFT:
        parts.append(f"its mean of {where} is {f'{shift:.1f}' if shift <= _MOST else f'more than {_MOST}'} sd off")
    if not 1 / _RATIO <= ratio <= _RATIO:
        times = f"{ratio:.2g}" if ratio <= _MOST else f"more than {_MOST}"
        parts.append(f"its sd of {name} is {times} times the posterior's")
    if not parts:
        parts.append(f"its moments may be off by more than {NEVER[0]} sd or {NEVER[1]} times, as few draws show")
    far = shift > _SHIFT_FAR or not 1 / _RATIO_FAR <= ratio <= _RATIO_FAR
    size = max(shift / _SHIFT, abs(math.log(max(ratio, 1e-12))) / math.log(_RATIO))
    return 2 if far else 1, size, " and ".join(parts) + share


def _guide_rows(k: np.ndarray, threshold: float, advice: str) -> list[Finding]:
    above, hopeless = float(np.mean(k > threshold)), float(np.mean(k >= 1))
    if above <= _BAD_ROWS:
        return []
    found = (
        f"the guide is a poor approximation of the posterior in {above:.0%} of {k.size} rows "
        f"(k-hat above {threshold:.2f}; largest {k.max():.2f}); this need not mean that the program is wrong"
    )
    return [(2 if hopeless > _BAD_ROWS else 1, found, advice)]
