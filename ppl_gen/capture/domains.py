"""Observed values held against the supports of their sites, batch by batch, without running the program for each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from pyro.distributions import MaskedDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import constraints
from torch.nn.modules.module import register_module_forward_pre_hook

from ppl_gen.capture.recorder import record
from ppl_gen.capture.replay import Recording, recording
from ppl_gen.capture.tape import Call, Leaf, RecordingRefused, Slot, Tape
from ppl_gen.data.batching import Batch, Dataset
from ppl_gen.errors import PROGRAM_ERRORS
from ppl_gen.handlers.read_sites import innermost
from ppl_gen.handlers.sites import is_deterministic, is_subsample
from ppl_gen.workspace.isolation import isolated, validation_off, without_side_effects

__all__ = ["ByRuns", "Domains", "domains_of", "outside", "refuse_outside"]

_PIECE = 4096  # rows that are looked at in one go


@dataclass(frozen=True)
class _Site:
    """An observed site: its name, what its distribution is called, its support, and the dim of its rows in a check."""

    name: str
    kind: str
    support: str
    dim: int | None


@dataclass(frozen=True)
class Domains:
    """What observed values must be, as operations on ``rows`` rows of the ``inputs``; it can be pickled.

    Called with data and a batch of them, it gives the sentence that names site, row and value outside; empty where all
    are inside.
    """

    recording: Recording
    inputs: tuple[str, ...]
    sites: tuple[_Site, ...]
    rows: int

    @cached_property
    def _check(self) -> Callable[..., tuple[Any, ...]]:
        return self.recording.load()

    def __reduce__(self) -> tuple[Any, ...]:
        return Domains, tuple(getattr(self, field.name) for field in fields(self))

    def __call__(self, data: Dataset, batch: Batch) -> str:
        named = _named(data, batch)
        for first, values in _parts(data, named, batch.rows or 0, self.rows):
            fine, *found = self._check(*[values[name] for name in self.inputs])
            if not bool(fine):
                return _said(self.sites, batch, first, found)
        return ""


@dataclass(frozen=True)
class ByRuns:
    """The same of a program that cannot be recorded: it is run on the rows. For sites whose bounds are numbers."""

    model: Callable[..., Any]
    plate: str | None
    names: tuple[str, ...]

    def __call__(self, data: Dataset, batch: Batch) -> str:
        seen = _Observed(self.plate, self.names)
        with without_side_effects(), isolated(0), validation_off(), seen:
            self.model(*batch.args, **batch.kwargs)
        found = [part for name in seen.sites for part in (seen.inside[name], seen.values[name])]
        return _said(list(seen.sites.values()), batch, 0, found)


def _said(sites: Sequence[_Site], batch: Batch, first: int, found: Sequence[Any]) -> str:
    """Which of the sites holds a value outside, in words; ``found`` has for each what is inside, and the values."""
    for site, inside, value in zip(sites, found[::2], found[1::2], strict=True):
        if bool(inside.all()):
            continue
        place = (~inside).nonzero()[0].tolist()
        at = value[tuple(place)] if value.dim() >= inside.dim() else value
        shown = f"{float(at):g}" if at.numel() == 1 else str(at.tolist()[:4])
        row = None if site.dim is None else (first + place[site.dim]) % (batch.rows or 1)
        if row is not None and batch.index is not None:
            row = int(batch.index[row])
        where = "" if row is None else f"row {row} of the data: "
        return f"{where}{shown} lies outside of the support of {site.name!r}, a {site.kind}: {site.support}"
    return ""


def _named(data: Dataset, batch: Batch) -> dict[str, Any]:
    return {**dict(zip(data.positional, batch.args, strict=True)), **batch.kwargs}


def _parts(data: Dataset, named: dict[str, Any], rows: int, size: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Exactly ``size`` rows at a time: the last ones overlap those before, and fewer are repeated."""
    starts = [*range(0, rows - size + 1, size), *([rows - size] if rows > size and rows % size else [])] or [0]
    for first in starts:
        part = dict(named)
        for name in data.entries:
            if name not in named or rows == size:
                continue
            value, dim = named[name], data.dim(name)
            if rows > size:
                part[name] = value.narrow(dim, first, size)
            else:
                part[name] = value.index_select(dim, torch.arange(size, device=value.device) % rows)
        yield first, part


def domains_of(
    model: Callable[..., Any], data: Dataset, plate: str | None, *, learned: Sequence[Tensor] = ()
) -> Domains | ByRuns | None:
    """The checks of a program on these data, recorded on their first rows; None where nothing can lie outside.

    Supports that move with a latent site or with one of the ``learned`` parameters are left out, and so is a
    distribution whose author switched its validation off. A program that cannot be recorded has to be run.
    """
    batch = data.glimpse()
    named = {name: value for name, value in _named(data, batch).items() if isinstance(value, Tensor)}
    if not batch.rows or not named:
        return None
    try:
        with _looking() as buffers:
            first = _Observed(plate)
            with first:
                model(*batch.args, **batch.kwargs)
    except PROGRAM_ERRORS:
        return None
    if not first.sites:
        return None
    try:
        return _recorded(model, batch, named, plate, list(first.sites), learned, buffers)
    except (RecordingRefused, *PROGRAM_ERRORS):
        fixed = tuple(name for name in first.sites if name in first.fixed)
        return ByRuns(model, plate, fixed) if fixed else None


@contextmanager
def _looking() -> Iterator[list[Tensor]]:
    """A run only to look; gives the buffers of all networks that are called inside."""
    buffers: dict[int, Tensor] = {}

    def see(module: torch.nn.Module, _inputs: object) -> None:
        buffers.update({id(b): b for b in module._buffers.values() if b is not None})

    found: list[Tensor] = []
    hook = register_module_forward_pre_hook(see)
    try:
        with without_side_effects(), isolated(0):
            yield found
    finally:
        hook.remove()
        found += buffers.values()


def _recorded(
    model: Callable[..., Any],
    batch: Batch,
    named: dict[str, Tensor],
    plate: str | None,
    sites: list[str],
    learned: Sequence[Tensor],
    buffers: Sequence[Tensor],
) -> Domains | None:
    seen = _Observed(plate, sites)

    def checks() -> list[Tensor]:
        with seen:
            model(*batch.args, **batch.kwargs)
        return [part for name in seen.sites for part in (seen.inside[name], seen.values[name])]

    inputs = [*named.values(), *learned, *buffers]
    places = range(len(inputs) - len(buffers), len(inputs))
    with without_side_effects(), isolated(0), validation_off():
        tape = record(checks, inputs, draws=True, writable=places)
    moved = {Slot(place) for place in range(len(named), len(inputs))}
    kept, calls = [], set()
    for number, name in enumerate(seen.sites):
        needed = _slice(tape, tape.results[2 * number : 2 * number + 2], moved)
        if needed is not None:
            kept.append((name, tape.results[2 * number : 2 * number + 2]))
            calls |= needed
    if not kept:
        return None
    return _written(tape, [call for number, call in enumerate(tape.calls) if number in calls], kept, seen, named, batch)


def _written(
    tape: Tape,
    calls: list[Call],
    kept: Sequence[tuple[str, Sequence[Leaf]]],
    seen: _Observed,
    named: dict[str, Tensor],
    batch: Batch,
) -> Domains:
    """The operations of the kept sites, and whether all is inside, as text."""
    results = tuple(leaf for _, leaves in kept for leaf in leaves)
    text = recording(replace(tape, calls=tuple(calls), results=results), range(len(named)))
    inside = ", ".join(f"v{leaf.number}.all()" for leaf in results[::2] if isinstance(leaf, Slot))
    lines = text.source.splitlines()
    given = lines[-1].strip().removeprefix("return (")
    several = inside.replace(", ", " & ") or "True"
    lines[-1] = f"    return ({several}, {given}"
    sites = tuple(seen.sites[name] for name, _ in kept)
    return Domains(replace(text, source="\n".join(lines)), tuple(named), sites, batch.rows or 0)


def _slice(tape: Tape, results: Sequence[Leaf], moved: Collection[Slot]) -> set[int] | None:
    """The numbers of the calls that ``results`` need; None where they hang on a draw or on what is ``moved``."""
    needed = {leaf for leaf in results if isinstance(leaf, Slot)}
    calls: set[int] = set()
    for number in range(len(tape.calls) - 1, -1, -1):
        call = tape.calls[number]
        if needed.isdisjoint(call.outputs):
            continue
        if call.draws or call.writes:
            return None
        calls.add(number)
        needed |= {leaf for leaf in call.inputs if isinstance(leaf, Slot)}
    return None if not needed.isdisjoint(moved) else calls


class _Observed(Messenger):
    """Observed sites whose support is not all numbers: whether each value is inside, and the values."""

    def __init__(self, plate: str | None, only: Collection[str] | None = None) -> None:
        super().__init__()
        self.plate, self.only = plate, only
        self.sites: dict[str, _Site] = {}
        self.inside: dict[str, Tensor] = {}
        self.values: dict[str, Tensor] = {}
        self.fixed: set[str] = set()  # those whose bounds are numbers

    def _pyro_post_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if not msg["is_observed"] or is_subsample(msg) or is_deterministic(msg):
            return
        if innermost(fn)._validate_args is False if self.only is None else name not in self.only:
            return
        try:
            support = fn.support
            while isinstance(support, constraints._IndependentConstraint):
                support = support.base_constraint
            if support is constraints.real or constraints.is_dependent(support):
                return
            inside = support.check(msg["value"])
        except (NotImplementedError, AttributeError):  # distributions that do not say
            return
        rest = fn.event_dim - support.event_dim
        for mask in (msg["mask"], fn._mask if isinstance(fn, MaskedDistribution) else None):
            if isinstance(mask, Tensor):
                inside = inside | ~mask[(..., *[None] * rest)]
        frame = next((f for f in msg["cond_indep_stack"] if f.name == self.plate and f.vectorized), None)
        dim = None if frame is None or inside.dim() < rest - frame.dim else inside.dim() + frame.dim - rest
        self.sites[name] = _Site(name, type(innermost(fn)).__name__, str(support), dim)
        self.inside[name], self.values[name] = inside, msg["value"]
        if not any(isinstance(bound, Tensor) for bound in vars(support).values()):
            self.fixed.add(name)


def outside(domains: Callable[[Dataset, Batch], str] | None, data: Dataset) -> str:
    """What of all rows lies outside of its support; empty where nothing does."""
    if domains is None or data.rows is None:
        return ""
    for index in torch.arange(data.rows, device="cpu").split(_PIECE):
        if said := domains(data, data.batch(index)):
            return said
    return ""


def refuse_outside(model: Callable[..., Any], data: Dataset, plate: str | None, what: str = "data") -> None:
    """Hold all rows of large data, of which a dry run sees the first alone, against the supports of the program.

    Raises:
        ValueError: naming row, site and value.
    """
    if data.rows is None or (data.glimpse().rows or 0) >= data.rows:
        return
    if said := outside(domains_of(model, data, plate), data):
        raise ValueError(f"{what}: {said}. Mend the value, or drop the row")
