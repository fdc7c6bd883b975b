"""EM from minibatches: sufficient statistics by stochastic approximation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ppl_gen.data.batches import Batches
from ppl_gen.program.extensions import EMSteps

__all__ = ["OnlineState", "step_size"]

_GATHERED = 5  # steps before the first M-step: one batch alone may leave a component without rows
_EMPHASIS = 3.0  # of the average on late steps: the weight of a step grows as its number to this power


def step_size(step: int, decay: float) -> float:
    r"""gamma of step 0, 1, ...: 1 / (t + 1) while statistics are gathered, then (t + 1)^-decay.

    Sums of it are infinite and sums of its squares finite, as stochastic approximation needs (Robbins and Monro 1951).

    Example:
        >>> step_size(0, 0.6), step_size(1, 0.6), round(step_size(99, 0.6), 3)
        (1.0, 0.5, 0.063)
    """
    return (step + 1) ** (-1.0 if step < _GATHERED else -decay)


class OnlineState:
    """Where a run stands: the values that the next batch is weighed at, the statistics, and their average.

    The average (Polyak and Juditsky 1992), with weights that grow as a power of the step (Shamir and Zhang 2013), takes
    out the noise that a step size above 1 / t leaves in the last values.
    """

    def __init__(self, em: EMSteps, prior: bool, rows: int, decay: float, values: dict[str, Tensor]) -> None:
        self.em, self.prior, self.rows, self.decay = em, prior, rows, decay
        self.current, self.steps, self.log_likelihood = values, 0, 0.0
        self.statistics: dict[str, Tensor] = {}
        self.average: dict[str, Tensor] = {}

    def advance(self, source: Batches) -> None:
        """One batch: its statistics at the present values, then the M-step."""
        assert self.em.e_step is not None and self.em.blend is not None
        batch = source.next()
        args, kwargs = batch.args, batch.kwargs
        if self.em.prepare is not None:
            args, kwargs = tuple(self.em.prepare(*args, **kwargs)), {}
        scale = self.rows / (batch.rows or self.rows)
        with torch.no_grad():
            total, found = self.em.e_step(self.current, *args, **kwargs)
            rate = step_size(self.steps, self.decay)
            statistics = self.em.blend(self.statistics or found, found, (1 - rate, rate * scale))
            weight = (_EMPHASIS + 1) / (self.steps + _EMPHASIS + 1)
            average = self.em.blend(self.average or statistics, statistics, (1 - weight, weight))
            moved = self.current
            if self.steps + 1 >= _GATHERED:
                moved = {**moved, **self.em.m_step(statistics, self.current, self.prior)}
        if not bool(total.isfinite()) or not all(bool(value.isfinite().all()) for value in moved.values()):
            raise FloatingPointError(
                f"the log-likelihood of a batch is {float(total)}, or a value is not finite, after {self.steps} steps. "
                "Take more rows in a batch, start elsewhere, or let the prior keep scales off zero: EM(prior=True)"
            )
        self.current, self.statistics, self.average = moved, statistics, average
        self.steps, self.log_likelihood = self.steps + 1, float(total) * scale

    @property
    def values(self) -> dict[str, Tensor]:
        """The M-step from the averaged statistics; the start while there are none."""
        if self.steps < _GATHERED:
            return self.current
        with torch.no_grad():
            return {**self.current, **self.em.m_step(self.average, self.current, self.prior)}

    def info(self) -> dict[str, float]:
        return {"batch_log_likelihood": self.log_likelihood}

    def state_dict(self) -> dict[str, Any]:
        parts = {"current": self.current, "statistics": self.statistics, "average": self.average}
        copies = {part: {name: value.clone() for name, value in held.items()} for part, held in parts.items()}
        return {**copies, "steps": self.steps, "log_likelihood": self.log_likelihood}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self.current, self.statistics, self.average = (
            {name: value.clone() for name, value in saved[part].items()}
            for part in ("current", "statistics", "average")
        )
        self.steps, self.log_likelihood = int(saved["steps"]), float(saved["log_likelihood"])
