"""The one loop of algorithms that move step by step, and the fit that is made of what a run came to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ppl_gen.dryrun import ProgramInfo, dry_run
from ppl_gen.inference.base import Algorithm, Iterative, Outcome, Run
from ppl_gen.inference.restored import guide_source
from ppl_gen.inference.stopping import EarlyStop, check_record
from ppl_gen.interrupts import check, hold
from ppl_gen.isolation import Workspace, isolated
from ppl_gen.program import Recipe
from ppl_gen.result import Fit, Status

__all__ = ["finished", "iterate"]


def iterate(algorithm: Iterative, run: Run) -> Outcome:
    """The one loop: steps, history, stopping, validation, interrupts and the non-finite guard."""
    state, source, limit = algorithm.init(run), algorithm.source(run), algorithm.limit(run)
    hold()  # from here on a signal ends the loop between two steps, and what was learned is kept
    history: dict[str, list[Any]] = {}
    checks: dict[str, list[float]] = {}
    converged = diverged = None
    interrupted = False
    done = 0
    try:
        for step in range(1, limit + 1):
            state, info = algorithm.step(state, source)
            _append(history, info, step)
            done = step
            for hook in run.hooks:
                hook(step, info)
            check()
            if step == min(limit, algorithm.stop_every()):  # by now every record that the rule may look at has begun
                check_record(getattr(algorithm, "stop_rule", None), history, validated=run.validation is not None)
            if step % algorithm.stop_every() == 0 and (converged := algorithm.stop({**history, **checks})) is not None:
                break
            if run.validation is not None and run.validation.due(step, limit):
                run.validation.record(checks, step, finished(None, None, run, algorithm.outcome(state, run), 0.0))
            if run.progress is not None and (step == limit or step % max(1, limit // 200) == 0):
                run.progress(step, limit, _latest(info))
    except KeyboardInterrupt:
        interrupted = True
    except FloatingPointError as error:
        diverged = str(error)
    try:
        outcome = algorithm.outcome(state, run)
    except FloatingPointError as error:  # from here on the outcome is the last finite state
        diverged, outcome = str(error), algorithm.outcome(state, run)
    outcome.converged, outcome.interrupted = converged, interrupted
    outcome.diverged = diverged or outcome.diverged
    outcome.history = {**outcome.history, **{name: _floats(values) for name, values in history.items()}}
    outcome.checks = checks
    outcome.cost = {"steps": done, **outcome.cost}
    return outcome


def _append(history: dict[str, list[Any]], info: Mapping[str, Any], step: int) -> None:
    """One row of the history; what this step did not record is missing (NaN)."""
    for name in info:
        history.setdefault(name, [float("nan")] * (step - 1))
    for name, values in history.items():
        values.append(info.get(name, float("nan")))


def _floats(values: Sequence[Any]) -> list[float]:
    """One synchronisation for a whole history of scalars."""
    if all(isinstance(value, Tensor) for value in values):
        return [float(v) for v in torch.stack([v.detach().double() for v in values]).cpu()]
    return [float(v) for v in values]


def _latest(info: Mapping[str, Any]) -> str:
    return "  ".join(f"{name} {float(value):.4g}" for name, value in list(info.items())[:3])


def finished(recipe: Recipe | None, algorithm: Algorithm | None, run: Run, outcome: Outcome, seconds: float) -> Fit:
    status, message = _status(outcome)
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
        status=status,
        message=message,
        seed=run.seed,
        cost={"seconds": seconds, **outcome.cost},
        notes=dict(run.notes),
        recipe=recipe,
        guide_source=guide_source(algorithm, run, outcome),
    )


def _with_guide(run: Run, outcome: Outcome) -> ProgramInfo:
    """The site table, with the sites of a guide that came into being during the run (coordinate updates)."""
    if outcome.guide is None or run.info.guide_sites is not None:
        return run.info
    with Workspace(outcome.state, device=run.data.device, dtype=run.data.dtype), isolated():
        batch = run.data.batch()
        fewer, known = (lambda: run.data.head((batch.rows or 2) // 2)), run.info.predicted
        info = dry_run(run.program, batch, guide=outcome.guide, fewer=fewer, predicted=known)
        return info.as_tried(run.info)


def _status(outcome: Outcome) -> tuple[Status, str]:
    steps = int(outcome.cost.get("steps", 0))
    if outcome.diverged is not None:
        return Status.DIVERGED, outcome.diverged
    if outcome.failed is not None:
        return Status.FAILED, outcome.failed
    if outcome.interrupted:
        return Status.INTERRUPTED, outcome.message or f"interrupted after {steps} steps; what was learned is kept"
    if isinstance(outcome.converged, EarlyStop):
        return Status.STOPPED, str(outcome.converged)
    if outcome.converged is not None:
        return Status.CONVERGED, outcome.converged
    return Status.FINISHED, outcome.message or f"ran all {steps} steps"
