"""The potential that chains move in, captured: run by the program, replayed from a tape, or compiled."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl_gen.capture.arrays import ArrayRecording, array_recording
from ppl_gen.capture.compiled import CannotCompileError, compiled
from ppl_gen.capture.narrow import narrowed
from ppl_gen.capture.recorder import record
from ppl_gen.capture.replay import Recording, agrees, recording
from ppl_gen.capture.tape import RecordingRefused, Tape
from ppl_gen.fitting.run import Run
from ppl_gen.inference.mcmc.c_potential import CPotential, c_potential
from ppl_gen.inference.mcmc.kernel import Chain, Function
from ppl_gen.inference.potentials import note_unrecorded
from ppl_gen.inference.unconstrained import Unconstrained

__all__ = ["Potential", "captured"]

#: Seconds on one thread, measured: an operation, and each number that it makes. The compiler's first use in a process
#: is most of it importing; then it takes so much for each operation. That of C is quick, and makes no fewer loops than
#: there are operations: large tensors go through memory each time.
_GRAPH, _NUMPY, _INDUCTOR, _C = (2.0e-6, 1.5e-9), (3.5e-7, 4.0e-9), (1.0e-7, 1.2e-9), (2.0e-9, 4.0e-10)
_COMPILER, _COMPILING = 5.0, 0.025
_C_COMPILER, _C_COMPILING, _C_NUMBERS = 0.2, 0.003, 3_000_000


@dataclass(frozen=True)
class Potential:
    """U and dU/du as functions of one flat vector, in the form in which chains evaluate them.

    ``path`` says which: the program itself ("eager"), the replay of a recording in torch's operations ("graph") or, for
    small tensors, in NumPy's ("numpy"), or compiled, from C ("c") or by torch ("inductor").
    ``reason`` says why no faster one was taken, ``seconds`` what capturing took; ``each`` guesses what one evaluation
    takes, from the number of operations and their size.
    """

    function: Recording | CPotential | Function
    path: str
    reason: str = ""
    seconds: float = 0.0
    each: float = 0.0

    def load(self) -> Function:
        """The function itself."""
        return self.function.load() if isinstance(self.function, Recording) else self.function

    def logp(self, chain: Chain) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
        """The log density and its gradient in NumPy's arrays, for one chain: u -> -U(u), -dU/du."""
        if isinstance(self.function, ArrayRecording):
            return _negated(self.function.load_arrays())
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


def _negated(replay: Callable[[np.ndarray], tuple[Any, ...]]) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
    def logp(u: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = replay(u)
        return -float(value), -gradient

    return logp


def captured(
    run: Run, density: Unconstrained, points: Sequence[Tensor], gradients: int, path: str = "", *, threads: bool = False
) -> Potential:
    """The potential of a run that evaluates it about so many times; at all ``points`` at which the density is
    a number it agrees with the program.

    ``path`` is the one that a run began with, and goes on by; ``threads`` says that code in C can be called. Which is
    taken otherwise follows from the number of operations, their size and ``gradients``, and never from a clock.
    """
    program = density.potential_and_gradient
    if run.compile is False:
        return Potential(program, "eager", "compile=False")
    began = time.perf_counter()
    points = [point for point in points if not bool(program(point)[0].isnan())]
    try:
        tape = narrowed(record(lambda: program(points[0]), [points[0]]), [points[0]])
        made: Recording = recording(tape)
        agrees(made.load(), program, points)
    except RecordingRefused as refused:
        return Potential(program, "eager", note_unrecorded(run, refused), time.perf_counter() - began)
    made, kind, reason = _replayed(run, tape, made, program, points, path)
    if threads and (path == "c" or (not path and _worth_c(run.compile, tape, gradients, kind))):
        found, why = _in_c(tape, program, points)
        if found is not None:
            return Potential(found, "c", "", time.perf_counter() - began, _seconds(tape, _C))
        reason = reason or why
    if path == "inductor" or (not path and _worth_compiling(run.compile, tape, gradients, kind)):
        function, reason = _compiled(tape, program, points)
        if function is not None:
            return Potential(function, "inductor", "", time.perf_counter() - began, _seconds(tape, _INDUCTOR))
    each = _seconds(tape, _NUMPY if kind == "numpy" else _GRAPH)
    return Potential(made, kind, reason, time.perf_counter() - began, each)


def _replayed(
    run: Run, tape: Tape, made: Recording, program: Function, points: Sequence[Tensor], path: str
) -> tuple[Recording, str, str]:
    """The tape in NumPy's operations where these are quicker and known, else in torch's; the path; why not NumPy's."""
    if path != "numpy" and (
        run.compile == "graph" or path == "graph" or _seconds(tape, _GRAPH) < _seconds(tape, _NUMPY)
    ):
        return made, "graph", ""
    try:
        arrays = array_recording(tape, points[0])
        agrees(arrays.load(), program, points)
    except RecordingRefused as refused:
        return made, "graph", str(refused)
    return arrays, "numpy", ""


def _seconds(tape: Tape, each: tuple[float, float]) -> float:
    """Of one evaluation."""
    return each[0] * len(tape.calls) + each[1] * tape.numbers


def _worth_compiling(mode: str | bool, tape: Tape, gradients: int, kind: str) -> bool:
    """Whether compiling saves more in so many evaluations than it takes."""
    if mode != "auto":
        return mode == "inductor"
    saved = _seconds(tape, _NUMPY if kind == "numpy" else _GRAPH) - _seconds(tape, _INDUCTOR)
    return saved * gradients > _COMPILER + _COMPILING * len(tape.calls)


def _worth_c(mode: str | bool, tape: Tape, gradients: int, kind: str) -> bool:
    """The same for a compiler of C."""
    saved = _seconds(tape, _NUMPY if kind == "numpy" else _GRAPH) - _seconds(tape, _C)
    takes = _C_COMPILER + _C_COMPILING * len(tape.calls)
    return mode == "auto" and tape.numbers < _C_NUMBERS and saved * gradients > takes


def _in_c(tape: Tape, program: Function, points: Sequence[Tensor]) -> tuple[CPotential | None, str]:
    """The tape in C, or None and why there is none."""
    try:
        made = c_potential(tape, points[0])
        agrees(made, program, points)
    except RecordingRefused as refused:
        return None, str(refused)
    return made, ""


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
