"""Compiling a tape by inductor, called directly: the guards of `torch.compile` cost 50 to 100 us a call."""

from __future__ import annotations

import contextlib
import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_unflatten

from ppl_gen.capture.replay import recording
from ppl_gen.capture.tape import Call, Constant, Slot, Tape

__all__ = ["CannotCompileError", "compiled", "worth_compiling"]

#: Inductor of older torch aborts the process ("free(): invalid next size", seen with 2.13) on long eliminations.
ABORTS = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 15)
#: Seconds, measured: what each operation costs in Python and in memory that compiled ones share; what the compiler
#: costs at all, and for each operation.
_CALL, _COMPILER, _COMPILING = 8e-6, 8.0, 0.02
#: Bytes a second of large tensors that need not be written and read again once operations are fused, measured.
_MEMORY = 4e9


class CannotCompileError(RuntimeError):
    """The tape cannot be compiled on this machine; the message says why."""


def worth_compiling(tape: Tape, steps: int) -> bool:
    """Whether compiling saves more in so many replays than it takes, guessed from numbers and never by a clock.

    >>> from ppl_gen.capture.recorder import record
    >>> x = torch.zeros(3)
    >>> tape = record(lambda: x.exp().sum(), [x])
    >>> worth_compiling(tape, 2000), worth_compiling(tape, 10_000_000)
    (False, True)
    >>> y = torch.zeros(10_000_000)
    >>> worth_compiling(record(lambda: y.exp().square().sum(), [y]), 2000)
    True
    """
    saved = _CALL * len(tape.calls) + tape.large / _MEMORY
    return saved * steps > _COMPILER + _COMPILING * len(tape.calls)


def compiled(tape: Tape, inputs: Sequence[Tensor]) -> Callable[..., Sequence[Any]]:
    """A function of those inputs that the tape uses, given as examples: the leaves of its result.

    Random numbers are those of torch's own operations in the tape's order, so that the path does not change them. It
    is called once here: buffers and generators move on.

    Raises:
        CannotCompileError: without a C++ compiler, or where inductor gives up.
    """
    early, drawn = _early_draws(tape)
    first = recording(Tape(0, early, drawn, tape.structure, ())).load() if early else None
    module, constants = _module(tape, _without(tape.calls, early), drawn)
    held = [constant.detach().contiguous() for constant in constants]  # expanded ones would be asserted to stay so
    examples = [*inputs, *(first() if first else ()), *held]
    try:
        with _quiet():
            from torch._inductor import config
            from torch._inductor.compile_fx import compile_fx

            with torch.no_grad(), config.patch(fallback_random=True, compile_threads=1):
                function: Any = compile_fx(module, examples)
                function(*examples)  # it is compiled at the first call
    except Exception as error:  # whatever a compiler throws, the run goes on by the other path
        raise CannotCompileError(_reason(error)) from error
    given = [None if isinstance(leaf, Slot) else leaf.value for leaf in tape.results]
    computed = [isinstance(leaf, Slot) for leaf in tape.results]

    def replay(*values: Tensor) -> Sequence[Any]:
        with torch.no_grad():
            found = iter(function(*values, *(first() if first else ()), *held))
            return [
                next(found) if made else (value.clone() if isinstance(value, Tensor) else value)
                for made, value in zip(computed, given, strict=True)
            ]

    return replay


def _early_draws(tape: Tape) -> tuple[tuple[Call, ...], tuple[Slot, ...]]:
    """The draws that depend on no input, with the calls behind them; and what of it the other calls read.

    Inductor drops draws that nobody reads, and may change their order: the numbers would not be those of the program.
    Draws that follow one which depends on an input stay where they are.
    """
    behind: dict[Slot, list[Call]] = {}  # for slots that depend on no input
    early: list[Call] = []
    for call in tape.calls:
        slots = [leaf for leaf in call.inputs if isinstance(leaf, Slot)]
        if any(slot not in behind for slot in slots):
            if call.draws or (call.writes and any(slot in behind for slot in slots)):
                break
            continue
        calls = [*(other for slot in slots for other in behind[slot]), call]
        behind |= {slot: calls for slot in call.outputs if slot is not None}
        if call.draws:
            early += [other for other in calls if not any(other is seen for seen in early)]
    made = {slot for call in early for slot in call.outputs if slot is not None}
    read = {leaf for call in _without(tape.calls, early) for leaf in call.inputs if isinstance(leaf, Slot)}
    read |= {leaf for leaf in tape.results if isinstance(leaf, Slot)}
    return tuple(early), tuple(sorted(made & read, key=lambda slot: slot.number))


def _without(calls: Sequence[Call], some: Sequence[Call]) -> list[Call]:
    gone = {id(call) for call in some}
    return [call for call in calls if id(call) not in gone]


def _reason(error: Exception) -> str:
    name = type(error).__name__
    if "CxxCompiler" in name or "No working C++ compiler" in str(error):
        return "no C++ compiler was found, so the graph was not compiled"
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"inductor could not compile it ({name}: {first[:200]})"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inductor's import speaks of GPUs that are not there, and its passes warn of what concerns torch alone."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _module(tape: Tape, calls: Sequence[Call], drawn: Sequence[Slot]) -> tuple[torch.fx.GraphModule, list[Tensor]]:
    """Some ``calls`` of the tape as a graph of torch.fx; what was ``drawn`` and its constants are further inputs."""
    graph = torch.fx.Graph()
    nodes: dict[Slot, torch.fx.Node] = {Slot(place): graph.placeholder(f"x{place}") for place in tape.used}
    nodes |= {slot: graph.placeholder(f"d{slot.number}") for slot in drawn}
    constants: list[Tensor] = []
    places: dict[int, torch.fx.Node] = {}
    for call in calls:
        for leaf in call.inputs:
            if isinstance(leaf, Constant) and isinstance(leaf.value, Tensor) and id(leaf.value) not in places:
                places[id(leaf.value)] = graph.placeholder(f"c{len(constants)}")
                constants.append(leaf.value)
    for call in calls:
        _add(graph, call, nodes, places)
    graph.output(tuple(nodes[leaf] for leaf in tape.results if isinstance(leaf, Slot)))
    return torch.fx.GraphModule(torch.nn.Module(), graph), constants


def _add(graph: torch.fx.Graph, call: Call, nodes: dict[Slot, torch.fx.Node], places: dict[int, torch.fx.Node]) -> None:
    def node(leaf: Slot | Constant) -> Any:
        if isinstance(leaf, Slot):
            return nodes[leaf]
        return places[id(leaf.value)] if isinstance(leaf.value, Tensor) else leaf.value

    args, kwargs = tree_unflatten([node(leaf) for leaf in call.inputs], call.structure)
    made = graph.call_function(call.operation, tuple(args), kwargs)
    returns = call.operation._schema.returns
    several = len(returns) > 1 or (len(returns) == 1 and isinstance(returns[0].type, torch.ListType))
    for place, slot in enumerate(call.outputs):
        if slot is None:
            continue
        if slot in call.inputs and call.writes:
            nodes[slot] = made if not several else nodes[slot]
            continue
        nodes[slot] = graph.call_function(operator.getitem, (made, place)) if several else made
