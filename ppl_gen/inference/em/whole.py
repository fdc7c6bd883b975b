"""Steps of EM on all rows: the objective never falls."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ppl_gen.data.batches import Batches
from ppl_gen.inference.em.expectation import Expectation, Problem
from ppl_gen.inference.em.maximisation import Maximiser

__all__ = ["WholeState", "copied", "put_back"]

# Sums over rows agree to a few units in the last place of their terms; a larger fall is a fall.
_ROUNDING = 256


def copied(problem: Problem) -> list[Tensor]:
    return [leaf.detach().clone() for leaf in problem.leaves.values()]


def put_back(problem: Problem, kept: list[Tensor]) -> None:
    with torch.no_grad():
        for leaf, value in zip(problem.leaves.values(), kept, strict=True):
            leaf.copy_(value)


class WholeState:
    """The last E-step, and what it takes to make the next."""

    def __init__(
        self,
        prior: bool,
        problem: Problem,
        maximiser: Maximiser,
        expectation: Expectation,
        starts: int,
        precision: float,
    ) -> None:
        self.prior, self.problem, self.maximiser = prior, problem, maximiser
        self.expectation, self.starts, self.precision = expectation, starts, precision
        self.replaced, self.failed = 0, ""

    @property
    def values(self) -> dict[str, Tensor]:
        return self.expectation.values

    def state_dict(self) -> dict[str, Any]:
        return {
            "values": {name: value.detach().clone() for name, value in self.expectation.values.items()},
            "params": {name: leaf.detach().clone() for name, leaf in self.problem.leaves.items()},
            "replaced": self.replaced,
            "failed": self.failed,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        put_back(self.problem, [saved["params"][name] for name in self.problem.leaves])
        self.expectation = self.problem.expect({name: value.clone() for name, value in saved["values"].items()})
        self.replaced, self.failed = int(saved["replaced"]), str(saved["failed"])

    def advance(self, source: Batches) -> None:
        """One M-step and the E-step after it; the objective is not lower afterwards."""
        if self.failed:
            return
        before, kept = self.expectation, copied(self.problem)
        try:
            after = self._tried(self.maximiser(before))
            if self._fell(before, after) and (before.trace is not None or self.problem.sums):
                put_back(self.problem, kept)
                after = self._tried(self.maximiser.by_gradient(before))
                self.replaced += 1
        except (FloatingPointError, KeyboardInterrupt):
            put_back(self.problem, kept)
            raise
        if self._fell(before, after):
            put_back(self.problem, kept)
            self.failed = (
                f"the objective fell from {before.objective:.10g} to {after.objective:.10g}: the program's own EM "
                "steps are not those of its model, or its densities differ each time it runs; what came before is kept"
            )
            return
        self.expectation = after

    def _tried(self, values: dict[str, Tensor]) -> Expectation:
        after = self.problem.expect(values)
        if not math.isfinite(after.objective):
            raise FloatingPointError(
                f"the log-likelihood is {after.log_likelihood} after an M-step ({self.maximiser.describe()}). Start "
                "elsewhere (another seed, Program(start=...)), or let the prior keep scales off zero: EM(prior=True)"
            )
        return after

    def _fell(self, before: Expectation, after: Expectation) -> bool:
        slack = _ROUNDING * self.precision * (abs(before.objective) + self.problem.rows)
        return after.objective < before.objective - slack

    def info(self) -> dict[str, float]:
        found = {"log_likelihood": self.expectation.log_likelihood}
        return found | ({"log_posterior": self.expectation.objective} if self.prior else {})
