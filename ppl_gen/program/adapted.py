"""Ways of writing a program that Pyro runs and that say less than an algorithm asks: what is left out is filled in.

A plate without a size, ``pyro.plate("data")``, takes that of the rows it is given; so does one that is written for
minibatches, ``pyro.plate("data", 60000, len(x))``, where the loop hands out the rows. A latent vector outside of every
plate, ``pyro.sample("eta", Normal(zeros(8), 1))``, is one draw of eight numbers, as ``.to_event(1)`` says. A site that
observes its own value, computed anew, ``pyro.sample("twice", Delta(2 * z), obs=2 * z)``, is deterministic, whether that
moves with draws or with parameters.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.subsample_messenger import SubsampleMessenger
from torch import nn

from ppl_gen.data.batching import Batch, Dataset
from ppl_gen.errors import PROGRAM_ERRORS
from ppl_gen.handlers.opened import within
from ppl_gen.handlers.read_sites import innermost
from ppl_gen.handlers.restated import AsEvents, Restated
from ppl_gen.handlers.sites import is_deterministic, is_subsample
from ppl_gen.program.differentiable import leaves_below
from ppl_gen.program.only_summed import by_branches
from ppl_gen.program.program import Program
from ppl_gen.workspace.isolation import without_side_effects

__all__ = ["adapted"]

_FAILED = PROGRAM_ERRORS


def adapted(program: Program, batch: Batch, data: Dataset, *, vectors: bool) -> tuple[Program, dict[str, str]]:
    """``program`` with plates that have a size and, if the algorithm reads ``vectors`` so, with events for vectors.

    Returns the program and notes on what was changed. A program that does not run is left to the dry run to explain.
    """
    asked: dict[str, tuple[Any, Any]] = {}
    with _sizes_asked(asked):
        trace = _trace(program.model, batch)
        program, notes = by_branches(program, batch, trace)
        if notes:
            trace = _trace(program.model, batch)
    if trace is None:
        return program, {}
    size, part = asked.get(program.data_plate, (0, None))
    if size is None or (part is not None and part == batch.rows):
        dims = {name: data.dim(name) for name in data.entries}
        sized = functools.partial(_sized, plate=program.data_plate, dims=dims, positional=data.positional)
        made = isinstance(getattr(program.guide, "func", program.guide), type)  # a class is called with the model
        guide = program.guide if made or program.guide is None else sized(program.guide)
        program = replace(program, model=sized(program.model), guide=guide)
        trace = _trace(program.model, batch) or trace
    if names := _restated(program.model, batch, trace):
        program = replace(program, model=within(program.model, lambda args, kwargs: Restated(names)))
    if vectors and (found := _vectors(trace)):
        notes["vectors"] = f"{', '.join(found)}: outside of every plate, read as one draw each (.to_event)"
        program = replace(program, model=within(program.model, lambda args, kwargs: AsEvents(found)))
    return program, notes


def _trace(model: Callable[..., Any], batch: Batch, run: int = 0) -> poutine.Trace | None:
    """One run of the program; others, by number, draw otherwise."""
    with contextlib.suppress(*_FAILED), without_side_effects(), pyro.validation_enabled(False):
        torch.manual_seed(run)
        trace: poutine.Trace = poutine.trace(model).get_trace(*batch.args, **batch.kwargs)
        return trace
    return None


@contextlib.contextmanager
def _sizes_asked(found: dict[str, tuple[Any, Any]]) -> Iterator[None]:
    """Collects, by name of plate, the size and the size of a subsample that the program asks for."""

    def kept(call: Callable[..., Any], name: str, size: Any = None, part: Any = None, *rest: Any, **more: Any) -> Any:
        found.setdefault(name, (size, part))
        return call(name, size, part, *rest, **more)

    with _settling(kept):
        yield


@contextlib.contextmanager
def _settling(how: Callable[..., Any]) -> Iterator[None]:
    """Pyro settles the size of every plate in one static method, without a message that a handler could answer."""
    outer = SubsampleMessenger.__dict__["_subsample"]
    SubsampleMessenger._subsample = staticmethod(functools.partial(how, outer.__func__))
    try:
        yield
    finally:
        SubsampleMessenger._subsample = outer


def _sized(
    function: Callable[..., Any], *, plate: str, dims: Mapping[str, int], positional: Sequence[str]
) -> Callable[..., Any]:
    """``function`` with as many rows in ``plate``, if that has no size, as the arguments have in their ``dims``."""
    signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)

    def context(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> AbstractContextManager[None]:
        # A guide may call its arguments otherwise than the model: those by order are the data's, in the data's order.
        values = {**signature.bind_partial(*args, **kwargs).arguments, **dict(zip(positional, args, strict=False))}
        return _size(plate, next((v.shape[dims[n]] for n, v in values.items() if n in dims and v is not None), None))

    return within(function, context)


@contextlib.contextmanager
def _size(plate: str, rows: int | None) -> Iterator[None]:
    def filled(call: Callable[..., Any], name: str, size: Any = None, part: Any = None, *rest: Any, **more: Any) -> Any:
        if name == plate and rows is not None and (size is None or part == rows):
            return call(name, rows, None, *rest, **more)
        return call(name, size, part, *rest, **more)

    with _settling(filled):
        yield


def _vectors(trace: poutine.Trace) -> dict[str, int]:
    """Sites outside of every plate that have batch dimensions, and how many; none where a value is of another shape."""
    found = {}
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or is_subsample(node) or not node["fn"].batch_shape:
            continue
        if any(frame.vectorized for frame in node["cond_indep_stack"]):
            continue
        if tuple(torch.as_tensor(node["value"]).shape) != tuple(node["fn"].shape()) or node["fn"].has_enumerate_support:
            return {}
        found[name] = len(node["fn"].batch_shape)
    return found


def _restated(model: Callable[..., Any], batch: Batch, trace: poutine.Trace) -> list[str]:
    """Names of the observed Deltas at the value observed: equal numbers that move from run to run are no data."""
    found = [name for name, node in trace.nodes.items() if node["type"] == "sample" and _at_its_value(node)]
    if not found:
        return []
    learned = set(_learned(model, batch, found))
    first, second = (_trace(model, batch, run) for run in (1, 2))
    if first is None or second is None:
        return sorted(learned)
    nodes = [(name, first.nodes.get(name), second.nodes.get(name)) for name in found]
    both = [(name, a, b) for name, a, b in nodes if a and b and _at_its_value(a) and _at_its_value(b)]
    return [name for name, a, b in both if name in learned or _differ(a, b)]


def _learned(model: Callable[..., Any], batch: Batch, names: Sequence[str]) -> list[str]:
    """Those of the Deltas whose place and value follow the parameters, and in the same way: of two parameters that
    begin at one number, each moves by itself.
    """
    found = []
    with contextlib.suppress(*_FAILED), without_side_effects(), pyro.validation_enabled(False), torch.enable_grad():
        trace = poutine.trace(model).get_trace(*batch.args, **batch.kwargs)
        for name in names:
            value = trace.nodes[name]["value"]
            place = innermost(trace.nodes[name]["fn"]).v.expand(value.shape)
            if not (place.requires_grad and value.requires_grad):
                continue
            weights, leaves = torch.rand_like(value), leaves_below([place, value])
            slopes = [
                torch.autograd.grad((x * weights).sum(), leaves, allow_unused=True, retain_graph=True)
                for x in (place, value)
            ]
            if all(_same_slope(a, b) for a, b in zip(*slopes, strict=True)):
                found.append(name)
    return found


def _same_slope(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.allclose(one, other, rtol=1e-5, atol=1e-8)


def _differ(one: Any, other: Any) -> bool:
    return not torch.equal(one["value"], other["value"])


def _at_its_value(node: Any) -> bool:
    if not node["is_observed"] or is_deterministic(node) or not isinstance(node["value"], torch.Tensor):
        return False
    inner, value = innermost(node["fn"]), node["value"]
    if not isinstance(inner, dist.Delta) or tuple(value.shape) != tuple(node["fn"].shape()):
        return False
    return bool(torch.equal(inner.v.expand(value.shape), value)) if inner.v.dim() <= value.dim() else False
