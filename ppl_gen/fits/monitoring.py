"""What is watched during a run: the evidence of held-out rows."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Any

import torch

from ppl_gen.capture.domains import refuse_outside
from ppl_gen.data.batching import Dataset, as_dataset
from ppl_gen.data.masks import refuse_unread_masks
from ppl_gen.data.sources import collected
from ppl_gen.draws.new_data import check_columns
from ppl_gen.evidence.annealed import AIS
from ppl_gen.evidence.energies import has_energy
from ppl_gen.evidence.estimates import Evidence
from ppl_gen.fits.finished import finished
from ppl_gen.fitting.run import Outcome, Run
from ppl_gen.program.offers import require
from ppl_gen.program.program import Program

__all__ = ["Validation", "require_evidence"]

#: log Z of an energy that cannot be enumerated: enough for a curve of it, at a fortieth of what `AIS` takes by itself.
ANNEALED = AIS(temperatures=500, chains=50, burn=20)


def require_evidence(program: Program, offers: Collection[str]) -> None:
    """Refuse held-out rows where no evidence can be estimated.

    Raises:
        IncompatibleError: naming what to look at instead.
    """
    if program.energy is not None and (has_energy(program) or program.energy.tempering is not None):
        return
    why = (
        "there is no evidence to watch; compare made rows as it goes: callbacks=, or fit.sample(n) and pg.compare_rows"
    )
    require("validation", [("density", "exact evidence")], program.name, offers, why=why)


class Validation:
    """Evidence of held-out rows, estimated now and then during a run."""

    def __init__(self, data: Any, every: int | None, program: Program, train: Dataset) -> None:
        self.data = as_dataset(collected(data), program.model, like=train, missing=True)
        refuse_unread_masks(self.data, self.data.left_out, program.name)
        check_columns("validation", self.data, train)
        exact = program.energy is None or program.evidence is not None or has_energy(program)
        self.method = None if exact else ANNEALED
        refuse_outside(program.model, self.data, program.data_plate, "validation")
        self.every = every

    def interval(self, limit: int) -> int:
        """Steps between two estimates: a tenth of all unless told."""
        return self.every or max(1, limit // 10)

    def due(self, step: int, limit: int) -> bool:
        """Every so many steps, and at the last."""
        return step % self.interval(limit) == 0 or step == limit

    def _note(self, run: Run, step: int, estimate: Evidence) -> None:
        """Say how log Z was found, and at which steps that is not to be trusted."""
        if self.method is None or estimate.log_partition is None:
            return
        said = run.notes.setdefault(
            "validation", f"log Z by annealing, {ANNEALED.temperatures} temperatures and {ANNEALED.chains} chains"
        )
        if estimate.log_partition.doubt:
            begun = ", " if "not to be trusted" in said else "; not to be trusted at step "
            run.notes["validation"] = f"{said}{begun}{step}"

    def record(self, checks: dict[str, list[float]], step: int, run: Run, outcome: Outcome) -> None:
        """Append the step and the mean evidence of the fit as it stands."""
        with run.ranks.told():  # each process takes all of these rows; the first one's number is that of all
            fit = finished(None, None, run, outcome, 0.0)
            with warnings.catch_warnings():
                if self.method is not None:
                    warnings.filterwarnings("ignore", "annealed importance sampling", UserWarning)
                estimate = fit.evidence(self.data, particles=16, draws=16, method=self.method)
            self._note(run, step, estimate)
        checks.setdefault("step", []).append(step)
        mean = torch.tensor(estimate.mean, dtype=torch.float64, device="cpu")
        checks.setdefault("validation_evidence", []).append(float(run.ranks.broadcast(mean)))
