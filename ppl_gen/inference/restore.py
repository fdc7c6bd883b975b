"""Rebuilding a saved fit: the program runs once so that its parameters exist, then takes the saved values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

from pyro import get_param_store
from pyro.infer.autoguide import AutoLaplaceApproximation
from torch import Tensor
from torch.nn import Module

from ppl_gen.fitting.algorithm import Algorithm
from ppl_gen.fitting.posteriors.base import Posterior
from ppl_gen.fitting.posteriors.kinds import held_whole
from ppl_gen.fitting.posteriors.points import PointPosterior
from ppl_gen.fitting.run import Outcome, Run
from ppl_gen.inference.guides.laplace import LaplaceGuide, restored_laplace
from ppl_gen.inference.guides.normals import NormalGuide, restored_normals
from ppl_gen.inference.guides.resolved import resolved_guide
from ppl_gen.program.dry_run import dry_run
from ppl_gen.program.offers import Need
from ppl_gen.workspace.workspace import ProgramState

__all__ = ["Restored", "guide_source"]


def guide_source(algorithm: Algorithm | None, run: Run, outcome: Outcome) -> str | None:
    """What makes the guide and the posterior of an outcome again.

    None: there is no guide, or the tensors of the posterior hold it; "svi": the program, as SVI resolves its guide;
    "cavi": its coordinate updates; "normal": the numbers of its normals; "own": the algorithm, by `Algorithm.outline`;
    "lost": nothing, for the algorithm owns its loop and has no outline.
    """
    guide = outcome.guide
    if held_whole(type(outcome.posterior)):
        if guide is None:
            return None
        if run.program.cavi is not None and guide is run.program.cavi.guide:
            return "cavi"
        if (guide.first if isinstance(guide, LaplaceGuide) else guide) is run.resolved:
            return "svi"
        if isinstance(guide, NormalGuide):
            return "normal"
        if type(outcome.posterior).parts and outcome.posterior.proposal is not None:
            return None
    return "lost" if algorithm is None or type(algorithm).outline is Algorithm.outline else "own"


@dataclass(frozen=True)
class Restored(Algorithm):
    """Puts saved parameters into a program; raises ValueError where the two do not belong together."""

    name: str
    guide: str | None  # as `guide_source` tells
    params: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    algorithm: Algorithm | None = None  # that of the fit, given again
    modules: Mapping[str, Tensor] = field(default_factory=dict)
    rebuilt: Callable[[Any], Posterior] | None = None  # of a guide or None; None where the algorithm makes it

    subsamples: ClassVar[bool] = True
    vectors: ClassVar[bool] = True

    @property
    def label(self) -> str:
        return self.name

    @property
    def needs(self) -> Sequence[Need]:
        return (("CAVI updates",),) if self.guide == "cavi" else ()

    def outline(self, run: Run) -> Outcome:
        return self.run(run)

    def run(self, run: Run) -> Outcome:
        """One dry run, one comparison of names and shapes, and the values."""
        if self.algorithm is None:
            return self._of_program(run)
        if self.guide == "own":
            return self._of_algorithm(self.algorithm, run)
        outcome = self._of_program(run)
        if self.modules:
            outcome.modules = self._filled(self.algorithm.outline(replace(run, notes={})).modules)
        return outcome

    def _of_algorithm(self, algorithm: Algorithm, run: Run) -> Outcome:
        """The algorithm's own outcome before a step, with the saved values in it."""
        outcome = algorithm.outline(run)
        batch = run.data.glimpse()
        parts = [part for part in (run.program.model, outcome.guide) if part is not None]
        leaves = run.workspace.collect(*(partial(part, *batch.args, **batch.kwargs) for part in parts))
        made = {**leaves, **outcome.state.unconstrained}
        self._compare(run.program.name, {name: made[name] for name in made if name in self.params or name in leaves})
        constraints: dict[str, Any] = {**get_param_store()._constraints, **outcome.state.constraints}
        state = ProgramState(self.params, {name: constraints[name] for name in self.params}, self.buffers)
        posterior = outcome.posterior if self.rebuilt is None else self.rebuilt(outcome.guide)
        return replace(outcome, posterior=posterior, state=state, modules=self._filled(outcome.modules), ending=None)

    def _filled(self, modules: Mapping[str, Module]) -> dict[str, Module]:
        """The algorithm's networks with the saved weights in them."""
        saved = {name.partition("/")[0] for name in self.modules}
        if saved != set(modules):
            raise ValueError(f"algorithm: it has the networks {sorted(modules)}, the saved fit {sorted(saved)}")
        for name, module in modules.items():
            weights = {k.removeprefix(f"{name}/"): v for k, v in self.modules.items() if k.startswith(f"{name}/")}
            try:
                module.load_state_dict(weights)
            except RuntimeError as error:
                raise ValueError(f"algorithm: its network {name!r} is not that of the saved fit: {error}") from error
        return dict(modules)

    def _of_program(self, run: Run) -> Outcome:
        batch = run.data.glimpse()
        runs = [partial(run.program.model, *batch.args, **batch.kwargs)]
        guide: Any = None
        if self.guide == "cavi":
            assert run.program.cavi is not None
            guide = run.program.cavi.guide
        elif self.guide is not None:
            saved = self.guide == "normal"
            guide = restored_normals(run, batch, self.buffers) if saved else resolved_guide(run)
            fewer, known = (lambda: run.data.head((batch.rows or 2) // 2)), run.info.predicted
            info = dry_run(run.program, batch, guide=guide, fewer=fewer, predicted=known)
            run.info = info.as_tried(run.info)
            if guide is not None:
                runs.append(partial(guide, *batch.args, **batch.kwargs))
        leaves = run.workspace.collect(*runs)
        if self.guide == "cavi":
            assert run.program.cavi is not None
            state = ProgramState(self.params, run.program.cavi.constraints, self.buffers)
            return Outcome(self._learned(guide), state, guide=guide)
        self._compare(run.program.name, leaves)
        store = get_param_store()
        constraints = {name: store._constraints[name] for name in self.params}
        if isinstance(guide, AutoLaplaceApproximation) and (kept := restored_laplace(guide, batch, self.buffers)):
            guide, run.info = kept, dry_run(run.program, batch, guide=kept, predicted=run.info.predicted)
        return Outcome(self._learned(guide), ProgramState(self.params, constraints, self.buffers), guide=guide)

    def _learned(self, guide: Any) -> Posterior:
        return PointPosterior() if self.rebuilt is None else self.rebuilt(guide)

    def _compare(self, program: str, leaves: Mapping[str, Tensor]) -> None:
        missing, extra = sorted(set(leaves) - set(self.params)), sorted(set(self.params) - set(leaves))
        wrong = [n for n in self.params if n in leaves and leaves[n].shape != self.params[n].shape]
        if missing or extra or wrong:
            raise ValueError(
                f"program: the saved parameters do not belong to {program!r}: "
                f"missing in the file {missing}, unknown to the program {extra}, of another shape {wrong}"
            )
