"""What is watched during a run: the evidence of held-out rows."""

from __future__ import annotations

from typing import Any

import torch

from ppl_gen.capture.domains import refuse_outside
from ppl_gen.data.batching import Dataset, as_dataset
from ppl_gen.data.masks import refuse_unread_masks
from ppl_gen.data.sources import collected
from ppl_gen.draws.new_data import check_columns
from ppl_gen.fits.finished import finished
from ppl_gen.fitting.run import Outcome, Run
from ppl_gen.program.program import Program

__all__ = ["Validation"]


class Validation:
    """Evidence of held-out rows, estimated now and then during a run."""

    def __init__(self, data: Any, every: int | None, program: Program, train: Dataset) -> None:
        self.data = as_dataset(collected(data), program.model, like=train, missing=True)
        refuse_unread_masks(self.data, self.data.left_out, program.name)
        check_columns("validation", self.data, train)
        refuse_outside(program.model, self.data, program.data_plate, "validation")
        self.every = every

    def interval(self, limit: int) -> int:
        """Steps between two estimates: a tenth of all unless told."""
        return self.every or max(1, limit // 10)

    def due(self, step: int, limit: int) -> bool:
        """Every so many steps, and at the last."""
        return step % self.interval(limit) == 0 or step == limit

    def record(self, checks: dict[str, list[float]], step: int, run: Run, outcome: Outcome) -> None:
        """Append the step and the mean evidence of the fit as it stands."""
        with run.ranks.told():  # each process takes all of these rows; the first one's number is that of all
            estimate = finished(None, None, run, outcome, 0.0).evidence(self.data, particles=16, draws=16)
        checks.setdefault("step", []).append(step)
        mean = torch.tensor(estimate.mean, dtype=torch.float64, device="cpu")
        checks.setdefault("validation_evidence", []).append(float(run.ranks.broadcast(mean)))
