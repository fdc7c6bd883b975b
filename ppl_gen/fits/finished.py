"""The fit that is made of what a run came to."""

from __future__ import annotations

from ppl_gen.errors import IncompatibleError
from ppl_gen.fits.result import Fit
from ppl_gen.fitting.algorithm import Algorithm, Iterative
from ppl_gen.fitting.run import Ending, Outcome, Run, Status
from ppl_gen.inference.restore import guide_source
from ppl_gen.program.dry_run import dry_run
from ppl_gen.program.info import ProgramInfo
from ppl_gen.program.program import Recipe
from ppl_gen.workspace.isolation import isolated
from ppl_gen.workspace.workspace import Workspace

__all__ = ["finished"]


def finished(recipe: Recipe | None, algorithm: Algorithm | None, run: Run, outcome: Outcome, seconds: float) -> Fit:
    steps = int(outcome.cost.get("steps", 0))
    ending = outcome.ending or Ending(Status.FINISHED, f"ran all {steps} steps")
    _require_shared(algorithm, run, outcome)
    return Fit(
        program=run.program,
        algorithm=algorithm.label if algorithm is not None else "",
        settings=repr(algorithm),
        data=run.data,
        info=_with_guide(run, outcome),
        state=outcome.state,
        learned=outcome.posterior,
        guide=outcome.guide,
        extra_modules=dict(outcome.modules),
        module_names=dict(run.workspace.modules),
        records={name: list(values) for name, values in outcome.history.items()},
        checks={name: list(values) for name, values in outcome.checks.items()},
        status=Status(ending.status),
        message=ending.message,
        seed=run.seed,
        cost={"seconds": seconds, **outcome.cost},
        notes=dict(run.notes),
        recipe=recipe,
        guide_source=guide_source(algorithm, run, outcome),
        criterion=_has_criterion(algorithm),
    )


def _require_shared(algorithm: Algorithm | None, run: Run, outcome: Outcome) -> None:
    """Refuse draws that lack what all rows share: its values would be those of the prior, and pass for learned ones.

    Points may know nothing (what an implicit program learned is in its parameters); the dry run checks guides.
    """
    learned = outcome.posterior
    shared = [site.name for site in run.info.select(local=False) if not site.finite]
    if not shared or learned.point is not None or outcome.guide is not None:
        return
    known = learned.sites
    if not known:
        with Workspace(outcome.state, device=run.data.device, dtype=run.data.dtype), isolated():
            known = learned.draw(1, run.data.most())[0]
    if lacking := [name for name in shared if name not in known]:
        label = "the algorithm" if algorithm is None else algorithm.label
        raise IncompatibleError(
            f"{label} learned no posterior of {', '.join(lacking)}, latent sites of {run.program.name!r} outside its "
            f"data plate: its draws are of {', '.join(sorted(known)) or 'nothing'}, and the rest would be drawn from "
            "the prior. Draw all of them, or write those that are not to be learned as pyro.param"
        )


def _has_criterion(algorithm: Algorithm | None) -> bool:
    """Whether it has a rule of its own that says when it has converged, so that to end without is a finding."""
    if not isinstance(algorithm, Iterative):
        return False
    own = type(algorithm).stop is not Iterative.stop
    return own and not algorithm.endless and getattr(algorithm, "stop_rule", "some") is not None


def _with_guide(run: Run, outcome: Outcome) -> ProgramInfo:
    """The site table, with the sites of a guide that came into being during the run (coordinate updates)."""
    if outcome.guide is None or run.info.guide_sites is not None:
        return run.info
    with Workspace(outcome.state, device=run.data.device, dtype=run.data.dtype), isolated():
        batch = run.data.most()
        fewer, known = (lambda: run.data.head((batch.rows or 2) // 2)), run.info.predicted
        info = dry_run(run.program, batch, guide=outcome.guide, fewer=fewer, predicted=known)
        return info.as_tried(run.info)
