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

from ppl_gen.capture.tape import Call, Constant, Slot, Tape

__all__ = ["CannotCompileError", "compiled", "seconds_saved"]

_CALL = 3e-6  # seconds that a call of an operation from Python costs, measured; compiled, they are fused
_BYTES = 5e9  # bytes a second that go through memory where pointwise operations are not fused


class CannotCompileError(RuntimeError):
    """The tape cannot be compiled on this machine; the message says why."""


def seconds_saved(tape: Tape) -> float:
    """What compiling saves at each replay, guessed from the number of operations and never from a clock.

    >>> from ppl_gen.capture.tape import record
    >>> x = torch.zeros(3)
    >>> seconds_saved(record(lambda: x.exp().sum(), [x]))
    6e-06
    """
    return _CALL * len(tape.calls)


def compiled(tape: Tape, inputs: Sequence[Tensor]) -> Callable[..., Sequence[Any]]:
    """A function of those inputs that the tape uses, given as examples: the leaves of its result.

    Random numbers are those of torch's own operations in the tape's order, so that the path does not change them. It
    is called once here: buffers and generators move on.

    Raises:
        CannotCompileError: without a C++ compiler, or where inductor gives up.
    """
    module, constants = _module(tape)
    held = [constant.detach().contiguous() for constant in constants]  # expanded ones would be asserted to stay so
    examples = [*inputs, *held]
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
            found = iter(function(*values, *held))
            return [
                next(found) if made else (value.clone() if isinstance(value, Tensor) else value)
                for made, value in zip(computed, given, strict=True)
            ]

    return replay


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


def _module(tape: Tape) -> tuple[torch.fx.GraphModule, list[Tensor]]:
    """The tape as a graph of torch.fx, its tensor constants as further inputs."""
    graph = torch.fx.Graph()
    nodes: dict[Slot, torch.fx.Node] = {Slot(place): graph.placeholder(f"x{place}") for place in tape.used}
    constants: list[Tensor] = []
    places: dict[int, torch.fx.Node] = {}
    for call in tape.calls:
        for leaf in call.inputs:
            if isinstance(leaf, Constant) and isinstance(leaf.value, Tensor) and id(leaf.value) not in places:
                places[id(leaf.value)] = graph.placeholder(f"c{len(constants)}")
                constants.append(leaf.value)
    for call in tape.calls:
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
