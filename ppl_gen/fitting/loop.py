"""The one loop of algorithms that move step by step."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ppl_gen.fitting.algorithm import Iterative
from ppl_gen.data.batches import Batches
from ppl_gen.errors import IncompatibleError
from ppl_gen.fitting.lone_row import is_lone_row, lone_row
from ppl_gen.fitting.records import Records
from ppl_gen.fitting.run import Ending, Info, NonFiniteStepError, Outcome, Run, Status
from ppl_gen.fitting.stopping import EarlyStop, check_record
from ppl_gen.runtime.interrupts import hold
from ppl_gen.runtime.threads import ParallelWork, torch_threads
from ppl_gen.workspace.isolation import generators, set_generators

__all__ = ["iterate"]
LOOKED_AT = 1  # the second step is counted: the first may set things up


def iterate(algorithm: Iterative, run: Run) -> Outcome:
    """The one loop: steps, history, stopping, validation, interrupts, checkpoints and the non-finite guard."""
    course = _Course(algorithm, run, algorithm.init(run), algorithm.source(run), algorithm.limit(run))
    course.resume()
    hold()  # from here on a signal ends the loop between two steps, and what was learned is kept
    try:
        while course.goes_on():
            course.step()
    except KeyboardInterrupt:
        course.ending = Ending(Status.INTERRUPTED, f"interrupted after {course.done} steps; what was learned is kept")
    except FloatingPointError as error:
        course.diverged(error)
    try:
        outcome = course.outcome()
    except FloatingPointError as error:  # from here on the outcome is the last finite state
        course.diverged(error)
        outcome = course.outcome()
    course.finish()
    own_failure = outcome.ending is not None and outcome.ending.status is Status.FAILED
    cut_short = (Status.DIVERGED, Status.INTERRUPTED)  # what the outcome then lacks is no failure of its own
    if not own_failure or (course.ending is not None and course.ending.status in cut_short):
        outcome.ending = course.ending or outcome.ending
    outcome.history = {**outcome.history, **course.records.floats()}
    outcome.checks = course.checks
    outcome.cost = {"steps": course.done, "threads": course.threads or torch.get_num_threads(), **outcome.cost}
    return outcome


@dataclass
class _Course:
    """How far a run has come.

    ``open``: the last step was made, and not looked at yet: a run that is interrupted there begins with the look.
    ``moving``: a step is under way; a second Ctrl-C may leave it half done, and then nothing is written.
    ``moved``: there is something that the last checkpoint does not hold.
    """

    algorithm: Iterative
    run: Run
    state: Any
    source: Batches
    limit: int
    done: int = 0
    open: bool = False
    moving: bool = False
    moved: bool = False
    ending: Ending | None = None
    records: Records = field(default_factory=Records)
    checks: dict[str, list[float]] = field(default_factory=dict)
    threads: int = 0  # of a step; 0: not decided, and then as many as torch is set to

    def goes_on(self) -> bool:
        """Look at the last step, keep a checkpoint where one is due; whether there is a next step."""
        if self.open:
            self._look()
            self.open, self.moved = False, True
            if self.run.checkpoint is not None and self.ending is None and self.run.checkpoint.due(self.done):
                self.write()
        return self.ending is None and self.done < self.limit

    def step(self) -> None:
        """One step of the algorithm, and what it recorded."""
        self.moving = self.moved = True
        self.state, info = self._counted() if self.done == LOOKED_AT else self._made()
        self.records.append(info)
        self.done += 1
        self.open, self.moving = True, False
        with self.run.ranks.noted():
            for hook in self.run.hooks:
                hook(self.done, info)
        self.run.ranks.check()

    def _made(self) -> tuple[Any, Info]:
        try:
            with torch_threads(min(self.threads, torch.get_num_threads())) if self.threads else nullcontext():
                return self.algorithm.step(self.state, self.source)
        except ValueError as error:
            if not is_lone_row(error):
                raise
            raise lone_row(self.run, self.source.size) from error

    def _counted(self) -> tuple[Any, Info]:
        """One step, by whose size those after it take one thread or all that torch is set to."""
        most, device = torch.get_num_threads(), self.run.data.device
        if most == 1 or (device is not None and device.type != "cpu"):
            return self._made()
        with ParallelWork() as work:
            made = self._made()
        self.threads = work.threads(most)
        return made

    def _look(self) -> None:
        """Stopping rule, validation, progress: all that follows a step and changes nothing of the state."""
        algorithm, run, step, history = self.algorithm, self.run, self.done, self.records.values
        if step == min(self.limit, algorithm.stop_every()):  # by now every record that the rule may look at has begun
            check_record(getattr(algorithm, "stop_rule", None), history, validated=run.validation is not None)
        if step % algorithm.stop_every() == 0 and (why := _end(algorithm, {**history, **self.checks}, run)) is not None:
            self.ending = Ending(Status.STOPPED if isinstance(why, EarlyStop) else Status.CONVERGED, str(why))
            return
        if run.validation is not None and run.validation.due(step, self.limit):
            outcome = self.outcome()
            with run.workspace.asking():
                run.validation.record(self.checks, step, run, outcome)
        if run.progress is not None and (step == self.limit or step % max(1, self.limit // 200) == 0):
            run.progress(step, self.limit, _latest({name: values[-1] for name, values in history.items()}))

    def outcome(self) -> Outcome:
        """The result at this state."""
        with self.run.workspace.asking():
            return self.algorithm.outcome(self.state, self.run)

    def diverged(self, error: FloatingPointError) -> None:
        """The run ends at the last finite state; the history ends before the step that was not finite."""
        self.ending, self.open, self.moving, self.moved = Ending(Status.DIVERGED, str(error)), False, False, True
        self.done = min(self.done, error.steps) if isinstance(error, NonFiniteStepError) else self.done
        self.records.cut(self.done)

    # ------------------------------------------------------------------------------------------------ checkpoints
    def write(self, *, first: bool = False) -> None:
        """Put all that the run goes on from on the disk; the ``first`` shows that it can be."""
        assert self.run.checkpoint is not None
        keep = self.run.checkpoint.write if first else self.run.checkpoint.keep
        keep(
            self.done,
            {
                "limit": self.limit,
                "open": self.open,
                "ending": None if self.ending is None else _ending_written(self.ending),
                "state": self.algorithm.state_dict(self.state),
                "source": self.source.state_dict(),
                "generators": generators(),
                "records": self.records.state_dict(),
                "checks": self.checks,
                "threads": self.threads,
            },
        )
        self.moved = False

    def resume(self) -> None:
        """Go on where the checkpoint stands; without one, write the first, which shows that it can be written."""
        if self.run.checkpoint is None:
            return
        saved = self.run.checkpoint.saved
        if saved is None:
            try:
                self.write(first=True)
            except (TypeError, NotImplementedError) as error:
                raise IncompatibleError(f"checkpoint: {self.algorithm.label} cannot be resumed: {error}") from error
            return
        try:
            self._load(saved)
        except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"checkpoint: {self.run.checkpoint.records.path} does not hold a state of {self.algorithm.label} on "
                f"{self.run.program.name!r} ({type(error).__name__}: {error}); choose a new folder"
            ) from error
        self.run.checkpoint.saved = None
        set_generators(saved["generators"])
        over = self.ending is not None or (self.done == self.limit and not self.open)
        how = "as it had ended" if over else "went on from a checkpoint"
        self.run.notes["resumed"] = f"{how} after {self.done} of {self.limit} steps"

    def _load(self, saved: Mapping[str, Any]) -> None:
        if saved["limit"] > self.limit:
            raise ValueError(
                f"checkpoint: it belongs to a run of {saved['limit']} steps, and now there are {self.limit}; give as "
                "many or more, or choose a new folder"
            )
        self.state = self.algorithm.load_state_dict(self.state, saved["state"])
        self.source.load_state_dict(saved["source"])
        self.records.load_state_dict(saved["records"], self.run.data.device)
        self.done, self.open, self.checks = self.records.steps, saved["open"], saved["checks"]
        self.threads = int(saved.get("threads", 0))
        ending = saved["ending"]
        self.ending = None if ending is None else Ending(ending["status"], ending["message"])
        if self.checks and self.limit > saved["limit"] and not self._due(int(self.checks["step"][-1])):
            self.checks = {name: values[:-1] for name, values in self.checks.items()}  # only the end made it due

    def _due(self, step: int) -> bool:
        return self.run.validation is not None and bool(self.run.validation.due(step, self.limit))

    def finish(self) -> None:
        """The last checkpoint: of a run that has ended, or that was interrupted between two steps."""
        if self.run.checkpoint is not None and self.moved and not self.moving:
            self.write()


def _end(algorithm: Iterative, history: Mapping[str, Any], run: Run) -> str | None:
    """Why the run ends here, if it does. A rule may look at a clock: of several processes the first one's counts."""
    with run.ranks.told():
        why = algorithm.stop(history)
    early = run.ranks.same("early" if isinstance(why, EarlyStop) else None)
    why = run.ranks.same(None if why is None else str(why))
    return EarlyStop(why) if early is not None and why is not None else why


def _ending_written(ending: Ending) -> dict[str, Any] | None:
    """What ends a run for good; an interruption does not."""
    if ending.status is Status.INTERRUPTED:
        return None
    return {"status": str(ending.status), "message": ending.message}


def _latest(info: Mapping[str, Any]) -> str:
    return "  ".join(f"{name} {float(value):.4g}" for name, value in list(info.items())[:3])
