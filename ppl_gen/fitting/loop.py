"""The one loop of algorithms that move step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ppl_gen.fitting.algorithm import Iterative
from ppl_gen.fitting.run import Ending, NonFiniteStepError, Outcome, Run, Status
from ppl_gen.fitting.stopping import EarlyStop, check_record
from ppl_gen.runtime.interrupts import hold

__all__ = ["iterate"]


def iterate(algorithm: Iterative, run: Run) -> Outcome:
    """The one loop: steps, history, stopping, validation, interrupts and the non-finite guard."""
    state, source, limit = algorithm.init(run), algorithm.source(run), algorithm.limit(run)
    hold()  # from here on a signal ends the loop between two steps, and what was learned is kept
    history: dict[str, list[Any]] = {}
    checks: dict[str, list[float]] = {}
    ending: Ending | None = None
    done = 0
    try:
        for step in range(1, limit + 1):
            state, info = algorithm.step(state, source)
            _append(history, info, step)
            done = step
            with run.ranks.noted():
                for hook in run.hooks:
                    hook(step, info)
            run.ranks.check()
            if step == min(limit, algorithm.stop_every()):  # by now every record that the rule may look at has begun
                check_record(getattr(algorithm, "stop_rule", None), history, validated=run.validation is not None)
            if step % algorithm.stop_every() == 0 and (why := _end(algorithm, history, checks, run)) is not None:
                ending = Ending(Status.STOPPED if isinstance(why, EarlyStop) else Status.CONVERGED, str(why))
                break
            if run.validation is not None and run.validation.due(step, limit):
                run.validation.record(checks, step, run, algorithm.outcome(state, run))
            if run.progress is not None and (step == limit or step % max(1, limit // 200) == 0):
                run.progress(step, limit, _latest(info))
    except KeyboardInterrupt:
        ending = Ending(Status.INTERRUPTED, f"interrupted after {done} steps; what was learned is kept")
    except FloatingPointError as error:
        ending, done = Ending(Status.DIVERGED, str(error)), _cut(history, error, done)
    try:
        outcome = algorithm.outcome(state, run)
    except FloatingPointError as error:  # from here on the outcome is the last finite state
        ending, done = Ending(Status.DIVERGED, str(error)), _cut(history, error, done)
        outcome = algorithm.outcome(state, run)
    own_failure = outcome.ending is not None and outcome.ending.status is Status.FAILED
    if not own_failure or (ending is not None and ending.status is Status.DIVERGED):
        outcome.ending = ending or outcome.ending
    outcome.history = {**outcome.history, **{name: _floats(values) for name, values in history.items()}}
    outcome.checks = checks
    outcome.cost = {"steps": done, **outcome.cost}
    return outcome


def _cut(history: dict[str, list[Any]], error: FloatingPointError, done: int) -> int:
    """The steps before the one that was not finite, which may have been noticed later; the history ends with them."""
    steps = min(done, error.steps) if isinstance(error, NonFiniteStepError) else done
    for values in history.values():
        del values[steps:]
    return steps


def _end(algorithm: Iterative, history: dict[str, list[Any]], checks: dict[str, list[float]], run: Run) -> str | None:
    """Why the run ends here, if it does. A rule may look at a clock: of several processes the first one's counts."""
    with run.ranks.told():
        why = algorithm.stop({**history, **checks})
    early = run.ranks.same("early" if isinstance(why, EarlyStop) else None)
    why = run.ranks.same(None if why is None else str(why))
    return EarlyStop(why) if early is not None and why is not None else why


def _append(history: dict[str, list[Any]], info: Mapping[str, Any], step: int) -> None:
    """One row of the history; what this step did not record is missing (NaN)."""
    for name in info:
        history.setdefault(name, [float("nan")] * (step - 1))
    for name, values in history.items():
        values.append(info.get(name, float("nan")))


def _floats(values: Sequence[Any]) -> list[float]:
    """One synchronisation for a whole history of scalars."""
    if values and all(isinstance(value, Tensor) for value in values):
        return [float(v) for v in torch.stack([v.detach().double() for v in values]).cpu()]
    return [float(v) for v in values]


def _latest(info: Mapping[str, Any]) -> str:
    return "  ".join(f"{name} {float(value):.4g}" for name, value in list(info.items())[:3])
