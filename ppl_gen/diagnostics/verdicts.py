"""Verdicts: what the diagnostics of a fit mean, in a sentence or two, and what to do next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas

    from ppl_gen.diagnostics.moments import Moments

__all__ = ["Cause", "Verdict", "loss_trend", "verdict_chains", "verdict_point", "verdict_variational", "with_points"]

_GRADES = ("trust", "doubtful", "do not trust")
_Finding = tuple[int, str, str]  # grade, what was found, what to do next

_R_HAT, _R_HAT_APART = 1.01, 1.1  # Vehtari et al. 2021; the older limit, above which chains sample different places
_ESS_PER_CHAIN, _ESS_TOTAL = 100, 400  # Vehtari et al. 2021: below these r_hat and the errors are themselves unsure
_ESS_NONE = 50  # an effective sample this small leaves a standard error of 0.14 posterior sd
_DIVERGENT_SHARE = 0.01
_BAD_ROWS = 0.1  # at k = 0.5 and 1000 draws k-hat scatters by 0.15 around its value, so some rows exceed by chance
_TREND, _CHANGE, _TOTAL = 4.0, 0.01, 0.2  # standard errors; nats per row; nats in all
_SHIFT, _RATIO = (
    0.35,
    1.35,
)  # posterior sd; times: half of what must never pass (0.5 sd, 0.6 to 1.6), noise of 0.07 beside
_SHIFT_FAR, _RATIO_FAR = 1.0, 2.0
_EFFECTIVE = 100  # draws: weighted means are then known to a tenth of an sd
_MANY = 200  # numbers: among more of them some are off by chance, and a share is judged

_MIN_LOSSES, _BATCHES = 40, 20


@dataclass(frozen=True)
class Verdict:
    """Whether a fit can be trusted: a grade, what it rests on, and what to try next.

    ``grade`` is "trust", "doubtful" or "do not trust"; ``reason`` what was found, worst first, or what speaks for the
    fit; ``advice`` what to do about the worst of it, empty where nothing was found. As text, it is one sentence or two.

    >>> print(Verdict("doubtful", "the loss was still falling", "Run more steps"))
    doubtful: the loss was still falling. Run more steps.
    """

    grade: str
    reason: str
    advice: str = ""

    def __post_init__(self) -> None:
        if self.grade not in _GRADES:
            raise ValueError(f"grade: expected one of {', '.join(_GRADES)}, got {self.grade!r}")

    def __str__(self) -> str:
        return f"{self.grade}: {self.reason}.{f' {self.advice}.' if self.advice else ''}"

    @property
    def trusted(self) -> bool:
        """Whether no fault was found."""
        return self.grade == _GRADES[0]


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
    ``close=True``: the chains began beside each other, so that their agreement shows little; ``places``: what chains
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
    findings: list[_Finding] = []
    if len(undefined):
        findings.append((2, f"{undefined[0]} is not finite in some draws", "Check the program at extreme values"))
    if chains < 2:
        findings.append((1, "a single chain cannot show whether it missed a part of the posterior", "Run 4 chains"))
    elif len(varying):
        findings += _agreement(varying)
    if close and not places[1]:
        found = "all chains began beside each other and could hardly disagree"
        findings.append((1, found, "Leave out jitter (or start=), so that they begin dispersed"))
    if len(varying):
        findings += _sample_size(varying, max(_ESS_TOTAL, _ESS_PER_CHAIN * chains))
    elif not len(undefined):
        findings.append((2, "no quantity varies: the chains did not move", "Start elsewhere, or use smaller steps"))
    findings += _trouble(divergences, saturated, draws) + _elsewhere(places, "all chains")
    worst, least = varying["r_hat"].max(), varying[["ess_bulk", "ess_tail"]].min().min()
    near = "; they began beside each other and could hardly disagree" if close else ""
    if places[1]:
        near += f"; of {places[1]} short chains begun elsewhere none found another place"
    return _verdict(
        findings,
        f"{chains} chains agree (largest r_hat {worst:.3f}, smallest effective sample size {least:.0f}) "
        f"and no draw diverged{near}",
    )


def _agreement(varying: pandas.DataFrame) -> list[_Finding]:
    if varying["r_hat"].isna().any():
        name = varying.index[varying["r_hat"].isna()][0]
        return [(2, f"the chains are too short to judge {name}", "Run at least 1000 draws a chain")]
    worst = float(varying["r_hat"].max())
    if worst <= _R_HAT:
        return []
    found = f"the chains disagree on {varying['r_hat'].idxmax()} (r_hat {worst:.3f}, expected at most {_R_HAT})"
    advice = "Run a longer warm-up and more draws; if they still disagree, look for several modes or swapped labels"
    return [(2 if worst > _R_HAT_APART else 1, found, advice)]


def _sample_size(varying: pandas.DataFrame, needed: int) -> list[_Finding]:
    sizes = varying[["ess_bulk", "ess_tail"]].fillna(0.0).min(axis=1)  # not a number: too few draws for any estimate
    least = float(sizes.min())
    if least >= needed:
        return []
    found = f"{sizes.idxmin()} has an effective sample size of {least:.0f}, expected at least {needed}"
    return [(2 if least < _ESS_NONE else 1, found, "Run more draws")]


def _trouble(divergences: int, saturated: int, draws: int) -> list[_Finding]:
    findings: list[_Finding] = []
    if divergences:
        found = f"{divergences} of {draws} draws diverged, so a narrow part of the posterior may be missed"
        advice = "Raise the target acceptance probability towards 0.99, or write scale parameters non-centred"
        findings.append((2 if divergences > _DIVERGENT_SHARE * draws else 1, found, advice))
    if saturated:
        found = f"{saturated} of {draws} draws ended at the largest tree depth, so the chains move slowly"
        findings.append((1, found, "Raise the tree depth, adapt a full mass matrix, or rescale the parameters"))
    return findings


def verdict_variational(
    k_joint: float | None,
    k_rows: Any | None,
    threshold: float,
    *,
    trend: tuple[float, float] | None = None,
    rows: int = 1,
    effective: tuple[float, int] | None = None,
    weighted: Moments | None = None,
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
        weighted: the guide's moments against its importance-weighted ones.
        moved: the guide's moments against those of ``chains`` short chains that began at its draws.
        places: of the chains that began elsewhere, how many ended outside of the guide's mass at a comparable density,
            how many there were, the mean log density gained, and the number that shows it.
        unseen: what could not be looked at.
        cause: what is known of the run, for advice that fits.

    Doubtful: a mean off by more than 0.35 posterior sd, an sd ratio outside of 1 / 1.35 to 1.35, by weights or by
    chains (among locals: in more than a tenth of them); k-hat between the threshold and 1; fewer than 100 effective
    draws; more than a tenth of the rows with a k-hat above the threshold; another place of comparable density; a loss
    that still moved by 4 standard errors and more than 0.2 nats in all. Not to be trusted: a mean
    off by more than 1 sd, a ratio beyond 2, a k-hat of 1 or more (infinite mean), NaN counting as infinite.

    Raises ValueError where nothing was looked at: a fit without random latents is a point (`verdict_point`).

    >>> print(verdict_variational(0.31, None, 0.667))
    trust: no fault was found where the guide looks (k-hat 0.31, below 0.67).
    >>> print(verdict_variational(0.8, None, 0.7))
    doubtful: the guide is a poor approximation of the posterior (k-hat 0.80, expected below 0.70); \
this need not mean that the program is wrong. Use a richer guide (full covariance, a flow) or check against NUTS.
    """
    k = None if k_rows is None else np.nan_to_num(np.atleast_1d(np.asarray(k_rows, dtype=np.float64)), nan=np.inf)
    if k_joint is None and (k is None or k.size == 0) and moved is None:
        raise ValueError("k_joint and k_rows are both missing; use verdict_point for a fit without random latents")
    moving = _moving(trend, rows, (cause or Cause()).networks)
    advice = (cause or Cause()).advice(bool(moving), trend)
    findings: list[_Finding] = []
    good = []
    if k_joint is not None:
        joint = math.inf if math.isnan(k_joint) else float(k_joint)
        findings += _guide(joint, threshold, advice)
        good.append(f"k-hat {joint:.2f}, below {threshold:.2f}")
        if effective is not None:
            findings += _weights(*effective, joint, advice)
            good.append(f"{effective[0]:.0f} of {effective[1]} draws effective")
        if weighted is not None:
            good.append(_close(weighted, "weighted draws"))
    if k is not None and k.size:
        findings += _guide_rows(k, threshold, advice)
        good.append(f"k-hat below {threshold:.2f} in {np.mean(k <= threshold):.0%} of {k.size} rows")
    believed = weighted if k_joint is not None and k_joint < 1.0 else None
    findings += _moments(believed, moved, chains, advice)
    if moved is not None:
        good.append(_close(moved, f"{chains} short chains from its draws"))
    findings += _elsewhere(places, "the guide") + moving
    if places[1] and not places[0]:
        good.append(f"of {places[1]} begun elsewhere none found another place")
    if unseen:
        good.append(unseen)
    return _verdict(findings, f"no fault was found where the guide looks ({'; '.join(good)})")


@dataclass(frozen=True)
class Cause:
    """What is known of a run, for advice that fits: its updates, whether on minibatches, what guide, what networks.

    ``converged``: the algorithm's own criterion was met; ``given``: it brings a guide of its own (CAVI).
    """

    steps: int = 0
    minibatches: bool = False
    guide: str = ""
    networks: bool = False
    amortised: bool = False
    converged: bool = False
    given: bool = False

    def advice(self, moving: bool, trend: tuple[float, float] | None) -> str:
        """More steps for what has not converged, a richer guide for what has."""
        if moving and trend is not None and trend[1] < 0:
            return "Run more steps; judge the guide when the loss has settled"
        if self.given and self.converged:
            return "Use SVI with a richer guide (full covariance, a flow), or check against NUTS"
        if self.steps and not self.converged and (trend is None or math.isnan(trend[1])):
            return "Run more steps: so few do not show whether the loss has settled"
        if self.minibatches:
            return "Let the learning rate fall to zero (schedule=) or use larger batches; then a richer guide"
        if self.guide == "AutoMultivariateNormal":
            return "Let the learning rate fall to zero (schedule=), use a flow as guide, or check against NUTS"
        if self.amortised:
            return "Use a richer guide for the local latents, or correct it by importance weighting (IWAE)"
        return "Use a richer guide (full covariance, a flow) or check against NUTS"


def _guide(k: float, threshold: float, advice: str) -> list[_Finding]:
    if k <= threshold:
        return []
    found = (
        f"the guide is a poor approximation of the posterior (k-hat {k:.2f}, expected below {threshold:.2f}); "
        "this need not mean that the program is wrong"
    )
    if k < 0.7:
        needed = math.ceil(10 ** (1 / (1 - k)) / 100) * 100
        return [(1, found, f"Judge it again with about {needed} draws, or use a richer guide")]
    return [(2 if k >= 1 else 1, found, advice)]


def _weights(effective: float, draws: int, k: float, advice: str) -> list[_Finding]:
    needed = min(_EFFECTIVE, draws / 4)
    if effective >= needed or k >= 1:
        return []
    found = f"only {effective:.0f} of {draws} draws of the guide carry the weights, expected at least {needed:.0f}"
    return [(1, found, advice)]


def _close(moments: Moments, source: str) -> str:
    (shift, _), (ratio, _) = moments.farthest, moments.uneven
    return f"means within {shift:.2f} sd and sds within {max(ratio, 1 / max(ratio, 1e-12)):.2f} times of {source}"


def _moments(weighted: Moments | None, moved: Moments | None, chains: int, advice: str) -> list[_Finding]:
    """What weights or short chains say against means and spreads, told once: by the one that says most."""
    said = [(*found, "importance-weighted draws") for found in _off(weighted)]
    said += [(*found, f"{chains} short chains from its draws") for found in _off(moved)]
    if not said:
        return []
    grade, _, what, source = max(said, key=lambda found: found[:2])
    both = "by importance-weighted draws and short chains alike" if len(said) == 2 else f"by {source}"
    return [(grade, f"the guide is not the posterior: {both}, {what}", advice)]


def _off(moments: Moments | None) -> list[tuple[int, float, str]]:
    """A fault in any of few numbers, or in more than a tenth of many (those of rows): grade, size, words."""
    off = np.zeros(0, dtype=bool) if moments is None else moments.beyond(_SHIFT, _RATIO)
    if moments is None or not off.any() or (off.size > _MANY and off.mean() <= _BAD_ROWS):
        return []
    (shift, where), (ratio, name) = moments.farthest, moments.uneven
    parts = []
    if shift > _SHIFT:
        parts.append(f"its mean of {where} is {shift:.1f} sd off")
    if not 1 / _RATIO <= ratio <= _RATIO:
        parts.append(f"its sd of {name} is {ratio:.2g} times the posterior's")
    share = f" ({off.mean():.0%} of {off.size} numbers are off)" if off.size > _MANY else ""
    far = shift > _SHIFT_FAR or not 1 / _RATIO_FAR <= ratio <= _RATIO_FAR
    return [
        (2 if far else 1, max(shift / _SHIFT, abs(math.log(ratio)) / math.log(_RATIO)), " and ".join(parts) + share)
    ]


def _elsewhere(places: tuple[int, int, float, str], what: str) -> list[_Finding]:
    found, of, gain, where = places
    if not found:
        return []
    far = f", {gain:.1f} nats higher" if gain > 3.0 else ""
    text = f"{found} of {of} short chains begun elsewhere ended outside of the mass of {what}{far} ({where})"
    how = "Run NUTS with dispersed starts and look at R-hat; let the program offer relabel where parts are exchangeable"
    return [(2 if gain > 3.0 else 1, text + ": another mode, or parts that swapped labels", how)]


def _guide_rows(k: np.ndarray, threshold: float, advice: str) -> list[_Finding]:
    above, hopeless = float(np.mean(k > threshold)), float(np.mean(k >= 1))
    if above <= _BAD_ROWS:
        return []
    found = (
        f"the guide is a poor approximation of the posterior in {above:.0%} of {k.size} rows "
        f"(k-hat above {threshold:.2f}; largest {k.max():.2f}); this need not mean that the program is wrong"
    )
    return [(2 if hopeless > _BAD_ROWS else 1, found, advice)]


def _moving(trend: tuple[float, float] | None, rows: int = 1, networks: bool = False) -> list[_Finding]:
    """A loss that moved by more than chance, and by more than matters: a mean one sd off costs half a nat in all.

    A program with networks of its own is no posterior but an estimate, whose last nat of thousands is never found.
    """
    if trend is None or not abs(trend[0]) > _TREND:
        return []
    total = abs(trend[1]) * max(1, rows)
    if not total > _TOTAL or (networks and abs(trend[1]) <= _CHANGE):
        return []
    size = f"by {total:.2g} nats over the last half of the run"
    if trend[1] < 0:
        return [(1, f"the loss was still falling ({size})", "Run more steps")]
    return [(1, f"the loss was rising ({size})", "Lower the learning rate")]


def verdict_point(
    converged: bool,
    *,
    trend: tuple[float, float] | None = None,
    rows: int = 1,
    networks: bool = False,
    restarts: int = 1,
    implicit: bool = False,
) -> Verdict:
    """Judge a point estimate (EM, MAP, maximum likelihood, the generator of a game): has it settled?

    ``converged`` says whether the algorithm's own criterion was met, ``trend`` comes from `loss_trend` (with ``rows``
    it is in nats in all; ``networks``: whether the program has some), ``restarts`` counts its starts.
    ``implicit=True`` is for what a game learned: its losses measure the players against each other, so they cannot show
    that the program is right.

    >>> print(verdict_point(True, restarts=5))
    trust: the optimum was reached (best of 5 starts); it is a point and carries no uncertainty.
    """
    if restarts < 1:
        raise ValueError(f"restarts: expected at least 1 start, got {restarts}")
    findings: list[_Finding] = []
    settled = trend is not None and math.isfinite(trend[1])
    moving = _moving(trend, rows, networks)
    if implicit:
        found = "the losses of a game do not show whether its samples are like the data"
        findings.append((1, found, "Look at samples and at a yardstick computed on them"))
    elif moving:
        findings += moving
    elif not converged and not settled:
        findings.append((1, "the run ended before its own criterion of convergence was met", "Run more steps"))
    reached = "the optimum was reached" if converged else "the loss had settled"
    starts = f" (best of {restarts} starts)" if restarts > 1 else " (from one start: others may end elsewhere)"
    return _verdict(findings, f"{reached}{starts}; it is a point and carries no uncertainty")


def with_points(found: Verdict, sites: Sequence[str]) -> Verdict:
    """``found`` of a guide that holds ``sites`` at one value each: whatever else is right, no posterior of them.

    >>> print(with_points(verdict_variational(0.31, None, 0.667), ["scale"]))
    doubtful: the guide puts scale at one value, without any uncertainty; apart from that, no fault was found \
where the guide looks (k-hat 0.31, below 0.67). Give it a distribution there (AutoNormal), or take the fit for an \
optimum.
    """
    if not sites:
        return found
    said = f"the guide puts {', '.join(sites)} at one value, without any uncertainty"
    if not found.trusted:
        return replace(found, reason=f"{found.reason}; {said}")
    advice = "Give it a distribution there (AutoNormal), or take the fit for an optimum"
    return Verdict(_GRADES[1], f"{said}; apart from that, {found.reason}", advice)


def _verdict(findings: list[_Finding], good: str) -> Verdict:
    """The two worst findings and what to do about the worst, or what speaks for the fit."""
    if not findings:
        return Verdict(_GRADES[0], good)
    worst = sorted(findings, key=lambda finding: -finding[0])
    more = f"; and {len(worst) - 2} more" if len(worst) > 2 else ""
    return Verdict(_GRADES[worst[0][0]], "; ".join(found for _, found, _ in worst[:2]) + more, worst[0][2])


def loss_trend(losses: Any) -> tuple[float, float]:
    r"""Whether the loss still moved over the last half of a run: slope in standard errors, and predicted change.

    The last half is cut into B = 20 batches of equal length m (10 to 20 where it has fewer than 40 losses; the oldest
    surplus is dropped), and a line is fitted to their means :math:`y_b` over :math:`b = 1 \dots B`:

    .. math:: t = \hat\beta / \sqrt{\hat\sigma^2 / \sum_b (b - \bar b)^2}, \qquad
              \hat\sigma^2 = \sum_b (y_b - \hat y_b)^2 / (B - 2), \qquad \text{change} = B \hat\beta

    Losses of neighbouring steps are correlated, so a line through all of them has far too small a standard error. The
    means of batches much longer than the correlation time :math:`\tau` are nearly independent (their correlation is of
    order :math:`\tau / m`), and their scatter already holds the effect of the correlation within: for a loss that has
    settled t follows Student's law with B - 2 degrees of freedom, without an estimate of :math:`\tau`. (Batch means:
    Schmeiser, Batch size effects in the analysis of simulation output, Operations Research 1982.)

    ``losses`` has shape (steps,), in nats per row; the change is in the same unit. Returns (0, 0) for a constant loss
    and (NaN, NaN) for fewer than 40 losses, which are too few to tell.

    Raises ValueError for a wrong shape or a loss that is not finite.

    >>> t, change = loss_trend(np.linspace(3.0, 1.0, 1000) + 0.01 * np.random.default_rng(0).normal(size=1000))
    >>> bool(t < -4), round(change, 1)
    (True, -1.0)
    """
    values = np.asarray(losses, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"losses: expected shape (steps,), got {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"losses: expected finite values, got {int((~np.isfinite(values)).sum())} that are not")
    if values.size < _MIN_LOSSES:
        return math.nan, math.nan
    last = values[values.size // 2 :]
    batches = min(_BATCHES, last.size // 2)
    length = last.size // batches
    means = last[last.size - batches * length :].reshape(batches, length).mean(axis=1)
    time = np.arange(batches) - (batches - 1) / 2
    slope = float(time @ means / (time @ time))
    residual = means - means.mean() - slope * time
    stderr = math.sqrt(float(residual @ residual) / (batches - 2) / float(time @ time))
    if np.ptp(means) == 0.0:
        return 0.0, 0.0
    return (slope / stderr if stderr > 0 else math.copysign(math.inf, slope)), slope * batches
