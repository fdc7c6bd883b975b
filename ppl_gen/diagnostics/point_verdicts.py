"""Verdicts on point estimates, and on guides that hold some sites at a point."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from ppl_gen.diagnostics.grades import GRADES, Finding, Verdict, graded
from ppl_gen.diagnostics.trends import moving

__all__ = ["verdict_point", "with_points", "with_repeats"]


def verdict_point(
    converged: bool,
    *,
    criterion: bool = True,
    trend: tuple[float, float] | None = None,
    rows: int = 1,
    networks: bool = False,
    restarts: int = 1,
    lone: Sequence[int] = (),
    failed: bool = False,
) -> Verdict:
    """Judge a point estimate (EM, MAP, maximum likelihood): has it settled?

    ``converged`` says whether the algorithm's own criterion was met, ``criterion`` whether it has one, ``trend`` comes
    from `loss_trend` (with ``rows`` it is in nats in all; ``networks``: whether the program has some), ``restarts``
    counts its starts. ``lone``: rows that a part of the program has narrowed onto, from `lone_rows`; the likelihood has
    no bound there, and what is called an optimum is the place where the run was stopped. ``failed``: the algorithm
    wanted more than a point and found none.

    >>> print(verdict_point(True, restarts=5))
    trust: the optimum was reached (best of 5 starts); it is a point and carries no uncertainty.
    """
    if restarts < 1:
        raise ValueError(f"restarts: expected at least 1 start, got {restarts}")
    findings: list[Finding] = []
    settled = trend is not None and math.isfinite(trend[1])
    still = moving(trend, rows, networks)
    if still:
        findings += still
    elif failed:
        found = "the algorithm found no posterior, and what is kept is a point"
        findings.append((2, found, "See fit.message for what went wrong"))
    elif not converged and not settled:
        findings.append(_unsettled(criterion, trend))
    if lone:
        which = f"row {lone[0]}" if len(lone) == 1 else f"rows {', '.join(map(str, lone[:3]))}"
        found = f"a part of the program has narrowed onto {which} alone, where the likelihood has no bound"
        findings.append((2, found, "Give the scales a prior (EM(prior=True)) or a floor, or use fewer components"))
    reached = "the optimum was reached" if converged else "the loss had settled"
    starts = f" (best of {restarts} starts)" if restarts > 1 else " (from one start: others may end elsewhere)"
    return graded(findings, f"{reached}{starts}; it is a point and carries no uncertainty")


def _unsettled(criterion: bool, trend: tuple[float, float] | None) -> Finding:
    if criterion:
        return 1, "the run ended before its own criterion of convergence was met", "Run more steps"
    if trend is not None:
        return 1, "so few steps do not show whether the loss has settled", "Run more steps"
    found = "nothing shows whether the optimum was reached: the algorithm does not say so and records no program_loss"
    return 1, found, "Let its outcome have an Ending, or record the loss"


def with_repeats(found: Verdict, note: str) -> Verdict:
    """``found`` of a density that values shared by many rows may drive up, as the note of its program says.

    >>> print(with_repeats(Verdict("trust", "the loss had settled"), "column 0 is exactly 0 in 30% of the rows"))
    doubtful: column 0 is exactly 0 in 30% of the rows; apart from that, the loss had settled. Model by itself whether \
a row holds that value, and fit the others.
    """
    if not note:
        return found
    if not found.trusted:
        return replace(found, reason=f"{found.reason}; {note}")
    advice = "Model by itself whether a row holds that value, and fit the others"
    return Verdict(GRADES[1], f"{note}; apart from that, {found.reason}", advice)


def with_points(found: Verdict, sites: Sequence[str]) -> Verdict:
    """``found`` of a guide that holds ``sites`` at one value each: whatever else is right, no posterior of them.

    >>> from ppl_gen.diagnostics.verdicts import verdict_variational
    >>> print(with_points(verdict_variational(0.31, None, 0.667), ["scale"]))
    doubtful: the guide puts scale at one value, without any uncertainty; apart from that, no problem was found \
where the guide has mass (k-hat 0.31, below 0.67). Give it a distribution there (AutoNormal), or take the fit for an \
optimum.
    """
    if not sites:
        return found
    said = f"the guide puts {', '.join(sites)} at one value, without any uncertainty"
    if not found.trusted:
        return replace(found, reason=f"{found.reason}; {said}")
    advice = "Give it a distribution there (AutoNormal), or take the fit for an optimum"
    return Verdict(GRADES[1], f"{said}; apart from that, {found.reason}", advice)
