"""The potential that chains move in, captured: run by the program, replayed from a tape, or compiled."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ppl_gen.capture.compiled import CannotCompileError, compiled
from ppl_gen.capture.replay import Recording, agrees, recording
from ppl_gen.capture.tape import RecordingRefused, Tape, record
from ppl_gen.fitting.run import Run
from ppl_gen.inference.mcmc.kernel import Chain, Function
from ppl_gen.inference.unconstrained import Unconstrained

__all__ = ["Potential", "captured"]

#: Seconds, measured on one thread: an operation of a replay, and each number that it makes; the same compiled; the
#: first use of the compiler in a process, most of it importing, and what it takes for each operation.
_CALL, _NUMBER = 2e-6, 1.5e-9
_COMPILED, _COMPILED_NUMBER = 5e-8, 4e-10
_COMPILER, _COMPILING = 9.0, 0.02


@dataclass(frozen=True)
class Potential:
    """U and dU/du as functions of one flat vector, in the form in which chains evaluate them.

    ``path`` says which: the program itself ("eager"), the replay of a recording ("graph"), or compiled ("inductor").
    ``reason`` says why no faster one was taken, ``seconds`` what capturing took.
    """

    function: Recording | Function
    path: str
    reason: str = ""
    seconds: float = 0.0

    def load(self) -> Function:
        """The function itself."""
        return self.function.load() if isinstance(self.function, Recording) else self.function

    def logp(self, chain: Chain) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
        """The log density and its gradient in NumPy's arrays, for one chain: u -> -U(u), -dU/du."""
        function, dtype, device = self.load(), chain.dtype, chain.device

        def logp(u: np.ndarray) -> tuple[float, np.ndarray]:
            value, gradient = function(torch.from_numpy(u).to(device, dtype))
            return -float(value), -gradient.cpu().double().numpy()

        return logp

    def seconds_each(self, chain: Chain) -> float:
        """How long one evaluation takes, by the clock: for how many processes to use, which changes no draw."""
        function, times = self.load(), []
        for _ in range(5):
            began = time.perf_counter()
            function(chain.start)
            times.append(time.perf_counter() - began)
        return min(times)


def captured(run: Run, density: Unconstrained, points: Sequence[Tensor], gradients: int, path: str = "") -> Potential:
    """The potential of a run that evaluates it about so many times; at all ``points`` it agrees with the program.

    ``path`` is the one that a run began with, and goes on by. Which is taken otherwise follows from the number of
    operations, their size and ``gradients``, and never from a clock.
    """
    program = density.potential_and_gradient
    if run.compile is False:
        return Potential(program, "eager", "compile=False")
    began = time.perf_counter()
    try:
        tape = record(lambda: program(points[0]), [points[0]])
        made = recording(tape)
        agrees(made.load(), program, points)
    except RecordingRefused as refused:
        reason = str(refused).splitlines()[0]  # below it stand the shapes that Pyro adds to what goes through a program
        run.notes["potential"] = f"evaluated by running the program each time, as it cannot be recorded: {reason}"
        return Potential(program, "eager", reason, time.perf_counter() - began)
    wanted = path or ("inductor" if run.compile == "inductor" else "")
    function, reason = None, ""
    if wanted == "inductor" or (not wanted and run.compile == "auto" and _worth_compiling(tape, gradients)):
        function, reason = _compiled(tape, program, points)
    seconds = time.perf_counter() - began
    if function is not None:
        return Potential(function, "inductor", "", seconds)
    return Potential(made, "graph", reason, seconds)


def _worth_compiling(tape: Tape, gradients: int) -> bool:
    """Whether compiling saves more in so many evaluations than it takes."""
    calls = len(tape.calls)
    saved = (_CALL - _COMPILED) * calls + (_NUMBER - _COMPILED_NUMBER) * tape.numbers
    return saved * gradients > _COMPILER + _COMPILING * calls


def _compiled(tape: Tape, program: Function, points: Sequence[Tensor]) -> tuple[Function | None, str]:
    """The compiled tape, or None and why there is none."""
    try:
        made = compiled(tape, [points[0]])

        def function(u: Tensor) -> tuple[Tensor, ...]:
            value, gradient = made(u)
            return value, gradient

        agrees(function, program, points)
    except CannotCompileError as error:
        return None, str(error)
    except RecordingRefused:
        return None, "compiled, it gives other numbers than the program"
    return function, ""
