"""Training steps captured: what a player computes on a batch, replayed without the Python of the program.

The first steps run the program itself. Then, for each player and each shape of batch, its step is recorded as a tape of
tensor operations, replayed once beside the program under the same random numbers, and used from there on if both agree;
it is compared again once in `VERIFY` steps. A program that cannot be captured runs as it is, and the fit says why.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ppl_gen.capture.compiled import ABORTS, CannotCompileError, compiled, worth_compiling
from ppl_gen.capture.recorder import record
from ppl_gen.capture.replay import recording
from ppl_gen.capture.tape import RecordingRefused, Tape
from ppl_gen.data.batching import Batch
from ppl_gen.data.calls import ByStep
from ppl_gen.errors import PROGRAM_ERRORS
from ppl_gen.inference.agreement import close, difference, nudged
from ppl_gen.inference.batch_inputs import constants_of, shape_of, tensors_of, with_tensors
from ppl_gen.inference.buffers import Buffers
from ppl_gen.inference.gradients import Step, gradients
from ppl_gen.inference.objectives.game import Game, GameState
from ppl_gen.workspace.isolation import validation_off
from ppl_gen.workspace.watch import Watch
from ppl_gen.workspace.workspace import Workspace

__all__ = ["EAGER", "Steps"]

EAGER = 2  # steps of the program itself, the first of them with all checks
VERIFY = 1000  # steps from one comparison with the program to the next
LOOK = 50  # steps from one look at what the program holds in Python to the next
SHAPES = 4  # kinds of batches of one player that are captured
AGAIN = 3  # times that a step is captured anew because something frozen has changed
FEW = 100  # steps: for fewer, capturing costs more than it saves
MANY = 6  # finite latent sites: hidden chains are summed out step by step


@dataclass
class _Way:
    """One captured step: the function, which of the inputs it takes, and how its results are named."""

    tape: Tape
    replay: Callable[..., Sequence[Any]]
    buffers: Sequence[tuple[nn.Module, str]]  # those that were there when it was recorded: more may come later
    before: tuple[str, ...]  # names of the states that it takes
    parts: tuple[str, ...]
    states: tuple[str, ...]  # and of those that it gives
    kept: Any  # what its key identifies by address
    compiled: bool = False
    used: int = 0

    def step(self, inputs: Sequence[Tensor]) -> Step:
        value, *rest = self.replay(*[inputs[place] for place in self.tape.used])
        parts, state = len(self.parts), len(rest) - len(self.states)
        return Step(
            value,
            dict(zip(self.parts, rest[:parts], strict=True)),
            list(rest[parts:state]),
            dict(zip(self.states, rest[state:], strict=True)),
        )


@dataclass
class Steps:
    """The steps of one run, by the program itself or by what was captured of it.

    ``mode`` is the user's ``compile``; ``limit`` the number of steps of the run; ``watched`` whether functions of the
    user run between steps, so that something frozen may change; ``summed`` how many finite latent sites there are;
    ``whole`` the batch that never changes, if there is one.
    """

    game: Game
    workspace: Workspace
    leaves: Mapping[str, Mapping[str, Tensor]]
    functions: Sequence[Callable[..., Any]]
    mode: str | bool
    limit: int
    constants: Mapping[str, Any]
    positional: Sequence[str]
    watched: bool
    summed: int = 0
    whole: Batch | None = None
    path: str = "eager"
    reason: str = ""
    seconds: float = 0.0
    done: int = 0
    _watch: Watch | None = None
    _ways: dict[Any, _Way] = field(default_factory=dict)
    _again: int = 0
    _by_value: bool = False  # numbers that change by step are part of what is captured, and no inputs
    _times: dict[Any, int] = field(default_factory=dict)
    note: str = ""  # why it was not compiled

    def __post_init__(self) -> None:
        if self.mode is False:
            self.reason = "compile=False"
        elif self.mode == "alone":
            self.reason = "several processes learn together"
        elif self.mode == "auto" and self.limit < FEW:
            self.reason = f"for {self.limit} steps, capturing would cost more than it saves"
        self._preset = self.reason
        self._buffers = Buffers(self.workspace, self.game)
        self._moving = [name for name, value in self.constants.items() if isinstance(value, ByStep)]
        self._params = [leaf for leaves in self.leaves.values() for leaf in leaves.values()]
        self._detached = [leaf.detach() for leaf in self._params]

    def __call__(self, player: str, batch: Batch, state: GameState) -> Step:
        """Losses, gradients and the next state of ``player`` on ``batch``."""
        if not self.reason and self.done > EAGER:
            way, taken = self._way(player, batch, state)
            if way is not None:
                way.used += 1
                if way.used % VERIFY == 0:
                    return self._verified(way, player, taken, batch, state)
                return way.step(self._inputs(way, taken, state))
        return self._program(player, batch, state)

    def begin_round(self) -> None:
        """To be called before each round of all players, after whatever the user's functions did since the last."""
        done, self.done = self.done, self.done + 1
        if self.reason:
            return
        if done == EAGER - 1:
            self._watch = self._looked()
        elif done == EAGER or (done > EAGER and (self.watched or done % LOOK == 0)):
            self._look()

    def _program(self, player: str, batch: Batch, state: GameState) -> Step:
        with validation_off():
            return gradients(self.game, player, list(self.leaves[player].values()), batch, state)

    def cost(self) -> dict[str, float | str]:
        """Which path ran, what building it took, and why no other was taken: for `Fit.cost`."""
        said = self.reason or self.note
        built: dict[str, float | str] = {"path": self.path, "capture_seconds": self.seconds}
        return {**built, "path_reason": said} if said else built

    def state_dict(self) -> dict[str, Any]:
        """Which path ran so far: a run that goes on takes the same one."""
        reason = "" if self.reason == self._preset else self.reason
        return {
            "done": self.done,
            "path": self.path,
            "reason": reason,
            "note": self.note,
            "again": self._again,
            "by value": self._by_value,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on by the path of the run that gave ``saved``; it is captured anew at the next step."""
        self.done, self.note, self._again = int(saved["done"]), saved["note"], int(saved["again"])
        self.path, self._by_value = saved["path"], bool(saved["by value"])
        self.reason = self._preset or saved["reason"]
        self._ways.clear()
        if self.mode == "auto" and saved["path"] != "eager":
            self.mode = saved["path"]
        if not self.reason and self.done >= EAGER:
            self._watch = self._looked()

    # ------------------------------------------------------------------------------------------- what is frozen
    def _looked(self) -> Watch:
        return Watch([*self.functions, self.game.loss], self._buffers.modules())

    def _look(self) -> None:
        """Whether all that is frozen is as it was: else capture anew, or let the program run."""
        assert self._watch is not None
        changed = self._watch.changed()
        stale = any(way.tape.stale for way in self._ways.values())
        if not changed and not stale:
            return
        what = ", ".join(changed) or "a tensor that the program reads from outside"
        self._ways.clear()
        self._again += 1
        if self.done == EAGER + 1 or self._again > AGAIN:
            how = "changes from step to step" if self.done == EAGER + 1 else "keeps changing during the run"
            self._refuse(f"{what} {how}; what changes by step can be passed as pg.by_step(...)")
        else:
            self._watch = self._looked()

    def _refuse(self, reason: str) -> None:
        self.path, self.reason = "eager", reason
        self._ways.clear()

    # --------------------------------------------------------------------------------------------------- inputs
    def _inputs(self, way: _Way, batch: Batch, state: GameState) -> list[Tensor]:
        """All that may differ from step to step: parameters, buffers, the game's state, the batch."""
        buffers: list[Any] = [module._buffers[name] for module, name in way.buffers]
        return [*self._detached, *buffers, *(state[name] for name in way.before), *self._tensors(batch)]

    def _tensors(self, batch: Batch) -> list[Tensor]:
        return [] if batch is self.whole else tensors_of(batch)

    def _with_tensors(self, batch: Batch) -> Batch:
        """The batch with the numbers that change by step as tensors, while these are inputs."""
        if not self._moving or self._by_value:
            return batch
        return with_tensors(batch, self._moving, self.positional, self._params[0])

    def _key(self, player: str, batch: Batch) -> tuple[Any, ...]:
        return (player,) if batch is self.whole else (player, *shape_of(batch))

    # -------------------------------------------------------------------------------------------------- capture
    def _way(self, player: str, batch: Batch, state: GameState) -> tuple[_Way | None, Batch]:
        given, batch = batch, self._with_tensors(batch)
        key = self._key(player, batch)
        way = self._ways.get(key)
        if way is not None:
            return way, batch
        if self._by_value and not self._held(key):
            return None, given
        if sum(other[0] == player for other in self._ways) >= SHAPES:
            self._refuse("the batches differ in shape, or in what they hold beside tensors, from step to step")
            return None, given
        began = time.perf_counter()
        try:
            way = self._ways[key] = self._captured(player, batch, given, state)
        except (RecordingRefused, *PROGRAM_ERRORS) as error:
            if batch is not given:  # with a tensor in place of a number that changes by step it is another program
                self._by_value, self.note = True, f"the program ran while {', '.join(self._moving)} changed by step"
            else:
                self._refuse(str(error).splitlines()[0] if str(error) else type(error).__name__)
            return None, given
        finally:
            self.seconds += time.perf_counter() - began
        return way, batch

    def _held(self, key: tuple[Any, ...]) -> bool:
        """Whether the numbers that may change by step have not done so for a while."""
        times = self._times.get(key, 0) + 1
        self._times = {key: times, **{other: n for other, n in self._times.items() if other[:3] != key[:3]}}
        return times > LOOK

    def _captured(self, player: str, batch: Batch, given: Batch, state: GameState) -> _Way:
        """Record the step on a batch, compile it where that pays, and compare it with the program on it as given."""
        state = {name: value.clone() for name, value in state.items()}  # objects of their own, whatever they alias
        names: list[tuple[str, ...]] = []

        def one() -> list[Tensor]:
            step = self._program(player, batch, state)
            names[:] = [tuple(step.parts), tuple(step.state)]
            return [step.value, *step.parts.values(), *step.gradients, *step.state.values()]

        with self._buffers.put_back_after() as (buffers, _):
            places = self._buffers.places()
            inputs, first = [*self._params, *buffers, *state.values(), *self._tensors(batch)], len(self._params)
            tape = record(one, inputs, draws=True, writable=range(first, first + len(buffers)))
            if any(now is not before for now, before in zip(self._buffers.values(), buffers, strict=True)):
                raise RecordingRefused("a module puts a new tensor in place of a buffer; write into it by copy_()")
        replay = recording(tape, tape.used).load()
        way = _Way(tape, replay, places, tuple(state), names[0], names[1], constants_of(batch))
        if self._worth_compiling(tape):
            self._compile(way, batch, state)
        problem = self._difference(way, player, batch, given, state)
        if problem and way.compiled:
            way.replay, way.compiled = replay, False
            self.note = f"compiled, {problem}"
            problem = self._difference(way, player, batch, given, state)
        if problem:
            raise RecordingRefused(problem)
        if way.compiled or self.path == "eager":
            self.path = "inductor" if way.compiled else "graph"
        return way

    def _compile(self, way: _Way, batch: Batch, state: GameState) -> None:
        with self._buffers.put_back_after():
            inputs = self._inputs(way, batch, state)
            try:
                way.replay = compiled(way.tape, [inputs[place] for place in way.tape.used])
                way.compiled = True
            except CannotCompileError as error:
                self.note = str(error)

    def _worth_compiling(self, tape: Tape) -> bool:
        wanted = self.mode == "inductor" or (self.mode == "auto" and worth_compiling(tape, self.limit - self.done))
        if wanted and self.summed >= MANY and ABORTS:
            self.note = "not compiled: this version of torch may abort on long eliminations"
            return False
        return wanted and not self._by_value  # those come and go, and a run that goes on could not tell when

    # ------------------------------------------------------------------------------------------------- agreement
    def _difference(self, way: _Way, player: str, batch: Batch, given: Batch, state: GameState) -> str:
        """What of the replay differs from the program at this step, in words; everything is left as it was."""
        with self._buffers.put_back_after() as (buffers, put_back):
            theirs = self._program(player, given, state)
            drawn, after = torch.get_rng_state(), [buffer.clone() for buffer in buffers]
            put_back()
            ours = way.step(self._inputs(way, batch, state))
            if not torch.equal(torch.get_rng_state(), drawn):
                return "it draws other random numbers than the program"
            if not all(map(close, buffers, after)):
                return "its buffers differ"
            found = difference(ours, theirs, compiled=way.compiled)
            if not found or not way.compiled:
                return found
            put_back()
            with nudged(self._detached):
                beside = self._program(player, given, state)
            return difference(ours, theirs, compiled=True, nudged=beside)

    def _verified(self, way: _Way, player: str, batch: Batch, given: Batch, state: GameState) -> Step:
        problem = self._difference(way, player, batch, given, state)
        if problem:
            self._refuse(f"after {self.done - 1} steps, {problem}")
            return self._program(player, given, state)
        return way.step(self._inputs(way, batch, state))
