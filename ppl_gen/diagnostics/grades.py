"""A verdict: a grade, what it rests on, and what to try next; and how findings become one."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["GRADES", "Finding", "Verdict", "elsewhere", "graded"]

GRADES = ("trust", "doubtful", "do not trust")
Finding = tuple[int, str, str]  # grade, what was found, what to do next


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
        if self.grade not in GRADES:
            raise ValueError(f"grade: expected one of {', '.join(GRADES)}, got {self.grade!r}")

    def __str__(self) -> str:
        return f"{self.grade}: {self.reason}.{f' {self.advice}.' if self.advice else ''}"

    @property
    def trusted(self) -> bool:
        """Whether no fault was found."""
        return self.grade == GRADES[0]


def graded(findings: list[Finding], good: str) -> Verdict:
    """The two worst findings and what to do about the worst, or what speaks for the fit."""
    if not findings:
        return Verdict(GRADES[0], good)
    worst = sorted(findings, key=lambda finding: -finding[0])
    more = f"; and {len(worst) - 2} more" if len(worst) > 2 else ""
    return Verdict(GRADES[worst[0][0]], "; ".join(found for _, found, _ in worst[:2]) + more, worst[0][2])


def elsewhere(places: tuple[int, int, float, str], what: str) -> list[Finding]:
    found, of, gain, where = places
    if not found:
        return []
    far = f", {gain:.1f} nats higher" if gain > 3.0 else ""
    text = f"{found} of {of} short chains started elsewhere ended outside the mass of {what}{far} ({where})"
    how = "Run NUTS with dispersed starts and look at R-hat; let the program offer relabel where parts are exchangeable"
    return [(2 if gain > 3.0 else 1, text + ": another mode, or parts that swapped labels", how)]
