"""When to stop: pure functions of the history, to be given to an algorithm as ``stop_rule=``."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ppl_gen.errors import require_number, require_whole

__all__ = ["EarlyStop", "Patience", "Plateau", "check_record"]

History = Mapping[str, Sequence[Any]]

_MORE_IS_BETTER = ("validation_evidence", "elbo", "log_likelihood")


class EarlyStop(str):
    """A sentence that says the run was stopped early; a plain sentence says that it converged."""

    __slots__ = ()


@dataclass(frozen=True)
class Plateau:
    """Converged when the mean loss of a window of steps no longer falls below that of the window before.

    The fall counts as none when it is smaller than ``tolerance`` nats per row plus two standard errors of the
    difference of the two means (steps taken as independent, which they nearly are for fresh noise at every step).

    Args:
        window: steps in each of the two windows compared.
        tolerance: nats per row that still count as progress.
        on: which record of the history; smaller is better.

    Raises:
        ValueError: if ``window`` < 2 or ``tolerance`` < 0, or for a record of which more is better; in a fit, early on,
            for a record that the fit does not keep.

    Example:
        >>> rule = Plateau(window=3, tolerance=0.01)
        >>> rule({"program_loss": [3.0, 2.0, 1.0, 0.5, 0.4, 0.3]}) is None
        True
        >>> rule({"program_loss": [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]})
        'converged: program_loss fell by less than 0.01 over the last 3 steps'
    """

    window: int = 500
    tolerance: float = 1e-3
    on: str = "program_loss"

    def __post_init__(self) -> None:
        require_whole("window", self.window, 2)
        require_number("tolerance", self.tolerance)
        _require_record(self.on)
        if self.on in _MORE_IS_BETTER:
            raise ValueError(
                f"on: {self.on} rises as a fit improves, and Plateau waits for a fall to end; use Patience"
            )

    def __call__(self, history: History) -> str | None:
        """The sentence, or None to go on."""
        values = [float(value) for value in history.get(self.on, ())[-2 * self.window :]]
        if len(values) < 2 * self.window:
            return None
        before, after = values[: self.window], values[self.window :]
        fall = _mean(before) - _mean(after)
        error = math.sqrt((_variance(before) + _variance(after)) / self.window)
        if fall > self.tolerance + 2 * error:
            return None
        return f"converged: {self.on} fell by less than {self.tolerance:g} over the last {self.window} steps"


@dataclass(frozen=True)
class Patience:
    """Stop early when the held-out evidence has not improved for some checks; needs ``fit(..., validation=)``.

    Args:
        checks: how many checks in a row without a new best are borne.
        on: which record; larger is better.

    Raises:
        ValueError: if ``checks`` < 1, or for a loss; in a fit, early on, for a record that the fit does not keep.

    Example:
        >>> Patience(checks=2)({"validation_evidence": [-3.0, -2.0, -2.5, -2.1]})
        'stopped early: validation_evidence has not improved for 2 checks'
    """

    checks: int = 5
    on: str = "validation_evidence"

    def __post_init__(self) -> None:
        require_whole("checks", self.checks)
        _require_record(self.on)
        if self.on.endswith("loss"):
            raise ValueError(f"on: {self.on} falls as a fit improves, and Patience waits for a rise: see Plateau")

    def __call__(self, history: History) -> str | None:
        """The sentence, or None to go on."""
        values = [float(value) for value in history.get(self.on, ())]
        if len(values) <= self.checks or max(values[-self.checks :]) > max(values[: -self.checks]):
            return None
        return EarlyStop(f"stopped early: {self.on} has not improved for {self.checks} checks")


def check_record(rule: Any, there: Collection[str], *, validated: bool) -> None:
    """Raise ValueError if a rule of this file looks at a record that is not ``there``: it would never stop a run.

    >>> check_record(Plateau(on="elb"), ["program_loss"], validated=False)
    Traceback (most recent call last):
    ...
    ValueError: stop_rule: Plateau(on='elb'): on: expected a record that this fit keeps (program_loss), got 'elb'
    """
    known = sorted({*there, *(("validation_evidence",) if validated else ())} - {"step"})
    if not isinstance(rule, Plateau | Patience) or rule.on in known:
        return
    hint = "; give fit(..., validation=rows) for it" if rule.on == "validation_evidence" else ""
    raise ValueError(
        f"stop_rule: {type(rule).__name__}(on={rule.on!r}): on: expected a record that this fit keeps "
        f"({', '.join(known) or 'it keeps none'}), got {rule.on!r}{hint}"
    )


def _require_record(on: Any) -> None:
    if not isinstance(on, str) or not on:
        raise TypeError(f"on: expected the name of a record of the history, got {on!r}")


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _variance(values: Sequence[float]) -> float:
    centre = _mean(values)
    return math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1)
