"""Rebuilding a saved fit: the program runs once so that its parameters exist, then takes the saved values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from pyro import get_param_store
from pyro.infer.autoguide import AutoLaplaceApproximation
from torch import Tensor

from ppl_gen.data.batching import LARGE
from ppl_gen.dryrun import dry_run
from ppl_gen.inference.base import Algorithm, Outcome, Run
from ppl_gen.inference.guides import resolved_guide
from ppl_gen.inference.laplace import restored_laplace
from ppl_gen.isolation import ProgramState
from ppl_gen.offers import Need
from ppl_gen.posterior import PointPosterior

__all__ = ["Restored"]

_ROWS = 256  # rows of large data that the program is run on: parameters do not depend on how many there are


@dataclass(frozen=True)
class Restored(Algorithm):
    """Puts saved parameters into a program; raises ValueError where the two do not belong together."""

    name: str
    guide: str | None  # "svi": the guide SVI resolves; "cavi": that of the coordinate updates
    params: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]

    subsamples: ClassVar[bool] = True

    @property
    def label(self) -> str:
        return self.name

    @property
    def needs(self) -> Sequence[Need]:
        return (("CAVI updates",),) if self.guide == "cavi" else ()

    def run(self, run: Run) -> Outcome:
        """One dry run, one comparison of names and shapes, and the values."""
        batch = run.data.head(_ROWS) if run.data.elements > LARGE else run.data.batch()
        runs = [partial(run.program.model, *batch.args, **batch.kwargs)]
        guide = None
        if self.guide == "cavi":
            assert run.program.cavi is not None
            guide = run.program.cavi.guide
        elif self.guide == "svi":
            guide = resolved_guide(run)
            fewer, known = (lambda: run.data.head((batch.rows or 2) // 2)), run.info.predicted
            info = dry_run(run.program, batch, guide=guide, fewer=fewer, predicted=known)
            run.info = info.refusing_sums(run.info.unenumerable)
            if guide is not None:
                runs.append(partial(guide, *batch.args, **batch.kwargs))
        leaves = run.workspace.collect(*runs)
        if self.guide == "cavi":
            assert run.program.cavi is not None
            return Outcome(
                PointPosterior(), ProgramState(self.params, run.program.cavi.constraints, self.buffers), guide=guide
            )
        self._compare(run.program.name, leaves)
        store = get_param_store()
        constraints = {name: store._constraints[name] for name in self.params}
        if isinstance(guide, AutoLaplaceApproximation) and (kept := restored_laplace(guide, batch, self.buffers)):
            guide, run.info = kept, dry_run(run.program, batch, guide=kept, predicted=run.info.predicted)
        return Outcome(PointPosterior(), ProgramState(self.params, constraints, self.buffers), guide=guide)

    def _compare(self, program: str, leaves: Mapping[str, Tensor]) -> None:
        missing, extra = sorted(set(leaves) - set(self.params)), sorted(set(self.params) - set(leaves))
        wrong = [n for n in self.params if n in leaves and leaves[n].shape != self.params[n].shape]
        if missing or extra or wrong:
            raise ValueError(
                f"program: the saved parameters do not belong to {program!r}: "
                f"missing in the file {missing}, unknown to the program {extra}, of another shape {wrong}"
            )
