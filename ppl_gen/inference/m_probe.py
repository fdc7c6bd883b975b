"""What the densities of a program's rows look like as functions of its global sites, found by running it.

The program is traced at two random points, and once with each coordinate moved. Parameters of densities that are
affine in the coordinates are recognised by their values at the second point, rows of probability tables by being equal
to rows of a global site at both. Coordinates are unconstrained: the logarithm of a positive site, for instance, so that
a scale that is a power of a global site, times a constant, has a logarithm that is affine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from torch import Tensor
from torch import distributions as td
from torch.distributions import Transform, constraints

from ppl_gen.inference.enumerated import packed_sites
from ppl_gen.inference.expectation import Problem

__all__ = ["Affine", "Coordinates", "Key", "Probe", "Reading", "probed"]

# Beyond these a probe takes longer, or its tables more memory (0.3 GB), than gradient steps would.
MOST_COORDINATES = 300
_MOST_ENTRIES = 40_000_000
_TOLERANCE = 1e-9


class Key(NamedTuple):
    """One parameter of the density at one site: ``probs``, ``odds``, ``rate``, ``loc`` or ``scale``.

    ``other`` stands for the whole log density of a row, ``prior`` for that of a site outside the rows.
    """

    site: str
    role: str


@dataclass(frozen=True, eq=False)
class Reading:
    """A site inside the rows: its family, its value, and the parameters of its density in their coordinates.

    ``shape`` is that of the log-prob, ``event`` that of one draw. Parameters and value keep dims of size one where they
    do not vary. ``mask`` is a mask on the distribution itself (masks of the site are in the weights already).
    """

    site: str
    family: str
    shape: torch.Size
    event: torch.Size
    value: Tensor
    mask: Tensor | None
    parameters: dict[str, Tensor]

    @property
    def full(self) -> torch.Size:
        return self.shape + self.event

    def spread(self, weight: Tensor) -> Tensor:
        """Packed weights of this site, over all its positions."""
        wide = weight.reshape(*self.shape, *[1] * len(self.event)).expand(self.full)
        return wide if self.mask is None else wide * self.mask


def compact(value: Tensor) -> Tensor:
    """Without the dims along which it was only expanded."""
    for dim, (stride, size) in enumerate(zip(value.stride(), value.shape, strict=True)):
        if stride == 0 and size > 1:
            value = value.narrow(dim, 0, 1)
    return value


def padded(value: Tensor, dims: int) -> Tensor:
    """With dims of size one in front, ``dims`` in all."""
    return value.reshape(*[1] * (dims - value.dim()), *value.shape)


def _read(name: str, site: Mapping[str, Any], *, inside: bool) -> Reading:
    fn, value, log_prob = site["fn"], site["value"], site["packed"]["unscaled_log_prob"]
    shape = torch.broadcast_shapes(fn.batch_shape, value.shape[: value.dim() - fn.event_dim])
    event, mask = torch.Size(fn.event_shape), None
    if not inside:
        return Reading(name, "prior", shape, event, value.new_zeros(()), None, {"prior": log_prob})
    if isinstance(fn, MaskedDistribution) and isinstance(fn._mask, Tensor):
        mask, fn = fn._mask, fn.base_dist
    while isinstance(fn, td.Independent | ExpandedDistribution):
        fn = fn.base_dist
    family, parameters = _family(fn, value)
    if not parameters or shape.numel() != log_prob.numel():
        return Reading(name, "other", shape, event, value, None, {"other": log_prob})
    if family == "categories" and isinstance(fn, td.OneHotCategorical):
        value, event = value.argmax(-1), event[:-1]
    dims = len(shape) + len(event)
    if mask is not None:
        mask = mask.to(log_prob.dtype).reshape(*mask.shape, *[1] * len(event))
    sized = {role: padded(compact(v), dims + (role == "probs")) for role, v in parameters.items()}
    return Reading(name, family, shape, event, padded(compact(value), dims), mask, sized)


def _family(fn: Any, value: Tensor) -> tuple[str, dict[str, Tensor]]:
    if isinstance(fn, td.Normal):
        return "normal", {"loc": fn.loc, "scale": compact(fn.scale).log()}
    if isinstance(fn, td.Poisson):
        return "poisson", {"rate": compact(fn.rate).log()}
    if isinstance(fn, td.Exponential):
        return "exponential", {"rate": compact(fn.rate).log()}
    if isinstance(fn, td.Bernoulli):
        return "successes", {"odds": _given(fn, "logits", _odds)}
    if isinstance(fn, td.OneHotCategorical):
        fn = fn._categorical
    if isinstance(fn, td.Categorical):
        return "categories", {"probs": _given(fn, "logits", lambda p: p, lambda v: v.softmax(-1))}
    return "other", {}


def _odds(probs: Tensor) -> Tensor:
    return probs.log() - torch.log1p(-probs)


def _given(fn: Any, logits: str, from_probs: Any, from_logits: Any = lambda v: v) -> Tensor:
    """Of probabilities and logits, the one that the distribution was made with: the other is computed at full size."""
    if "probs" in fn.__dict__:
        return from_probs(compact(fn.probs))
    return from_logits(compact(getattr(fn, logits)))


class Coordinates:
    """Unconstrained coordinates of the sites whose entries move independently of each other, as one vector."""

    def __init__(self, transforms: Mapping[str, Transform], values: Mapping[str, Tensor]) -> None:
        self.transforms = {n: t for n, t in transforms.items() if _elementwise(t) and values[n].is_floating_point()}
        self.shapes = {name: values[name].shape for name in self.transforms}
        self.slices: dict[str, slice] = {}
        start = 0
        for name, shape in self.shapes.items():
            self.slices[name] = slice(start, start + shape.numel())
            start += shape.numel()
        self.size = start

    def units(self) -> Iterator[tuple[int, str]]:
        """Each coordinate and the site that it belongs to."""
        for name, units in self.slices.items():
            yield from ((unit, name) for unit in range(units.start, units.stop))

    def vector(self, values: Mapping[str, Tensor]) -> Tensor:
        parts = [t.inv(values[name]).reshape(-1) for name, t in self.transforms.items()]
        return torch.cat(parts) if parts else torch.zeros(0)

    def values(self, vector: Tensor) -> dict[str, Tensor]:
        return {
            name: transform(vector[self.slices[name]].reshape(self.shapes[name]))
            for name, transform in self.transforms.items()
        }


def _elementwise(transform: Transform) -> bool:
    while isinstance(transform, td.transforms.IndependentTransform):
        transform = transform.base_transform
    return transform.domain.event_dim == 0


@dataclass(frozen=True, eq=False)
class Affine:
    """A parameter that is ``constant + columns @ coordinates[which]``, flattened; ``shape`` is its own."""

    shape: torch.Size
    constant: Tensor
    which: Tensor
    columns: Tensor

    def at(self, vector: Tensor) -> Tensor:
        if not len(self.which):
            return self.constant.reshape(self.shape)
        return (self.constant + self.columns @ vector[self.which]).reshape(self.shape)

    def column(self, units: slice) -> tuple[Tensor, Tensor]:
        """The columns of the coordinates in ``units``, and the numbers of these within it."""
        inside = (self.which >= units.start) & (self.which < units.stop)
        return self.columns[:, inside], self.which[inside] - units.start


@dataclass(frozen=True, eq=False)
class Probe:
    """What was found: readings by site, affine parameters, and which sites move which parameters.

    ``rows[key][site]`` says which rows of a probability table are which rows of a simplex-valued site (positions x
    rows, true or false); ``moved[key][site]`` which positions that site moves. ``vector`` is the first point, and
    ``priors`` are the distributions of the global sites there.
    """

    coordinates: Coordinates
    vector: Tensor
    readings: dict[str, Reading]
    affine: dict[Key, Affine]
    moved: dict[Key, dict[str, Tensor]]
    rows: dict[Key, dict[str, Tensor]]
    priors: dict[str, Any]


def probed(problem: Problem, values: Mapping[str, Tensor], sites: set[str], seed: int) -> Probe | None:
    """Probe ``sites`` (those that weights were found for) around ``values``; None if there are too many coordinates."""
    coordinates = Coordinates(problem.transforms, values)
    if coordinates.size > MOST_COORDINATES:
        return None
    generator = torch.Generator().manual_seed(seed)
    whole = [name for name in problem.names if name not in coordinates.transforms]
    first, second = ({n: _moved(problem.transforms[n], values[n], generator) for n in problem.names} for _ in range(2))

    def readings(point: Mapping[str, Tensor]) -> dict[str, Reading]:
        found = packed_sites(problem.trace(point))
        return {name: _read(name, site, inside=name in sites) for name, site in found}

    with torch.no_grad():
        origin = coordinates.vector(first)
        base, other = readings(first), readings(second)
        if any(not _same(reading, other[name]) for name, reading in base.items()):
            return None
        keys = {Key(name, role): v for name, reading in base.items() for role, v in reading.parameters.items()}
        moves: dict[Key, dict[str, Tensor]] = {key: {} for key in keys}
        columns: dict[Key, dict[int, Tensor]] = {key: {} for key in keys}
        room = _MOST_ENTRIES
        for unit, name in coordinates.units():
            step = torch.zeros_like(origin)
            step[unit] = 1.0
            for key, change in _changes(keys, readings(first | coordinates.values(origin + step))):
                columns[key][unit] = change.reshape(-1)
                moves[key][name] = _positions(key, change) | moves[key].get(name, False)
                room -= change.numel()
            if room < 0:
                return None
        for name in whole:
            for key, change in _changes(keys, readings({**first, name: second[name]})):
                moves[key][name] = _positions(key, change)
        affine = _affine(keys, other, columns, origin, coordinates.vector(second))
        rows = {key: _rows(key, base, other, first, second, moves[key], whole) for key in keys if key.role == "probs"}
    for key in _learned(problem, first, sites):
        affine.pop(key, None)
        rows.pop(key, None)
    nodes: Mapping[str, Any] = problem.trace(first).nodes
    priors = {name: nodes[name]["fn"] for name in problem.names}
    return Probe(coordinates, origin, base, affine, moves, rows, priors)


def _changes(keys: Mapping[Key, Tensor], found: Mapping[str, Reading]) -> Iterator[tuple[Key, Tensor]]:
    """By parameter that differs from what it was: by how much. Infinities that stay do not differ."""
    for key, before in keys.items():
        after = found[key.site].parameters[key.role]
        if not torch.equal(after, before):
            yield key, torch.where(after == before, 0.0, after - before)


def _positions(key: Key, change: Tensor) -> Tensor:
    return ((change != 0).any(-1) if key.role == "probs" else change != 0).reshape(-1)


def _moved(transform: Transform, value: Tensor, generator: torch.Generator) -> Tensor:
    """A random point near ``value``; for a table of probabilities, anywhere."""
    free = transform.inv(value)
    noise = torch.randn(free.shape, generator=generator, dtype=free.dtype).to(free.device)
    if _elementwise(transform):
        return transform(free + noise)
    return transform(noise)


def _same(one: Reading, two: Reading) -> bool:
    """What is observed must not depend on the point, or weighted sums of it could not be taken once and for all."""
    return one.family == two.family and one.shape == two.shape and torch.equal(one.value, two.value)


def _affine(
    keys: Mapping[Key, Tensor],
    other: Mapping[str, Reading],
    columns: Mapping[Key, Mapping[int, Tensor]],
    origin: Tensor,
    second: Tensor,
) -> dict[Key, Affine]:
    found = {}
    for key, value in keys.items():
        if key.role in ("probs", "other", "prior"):
            continue
        which = torch.tensor(sorted(columns[key]), dtype=torch.long, device=origin.device)
        flat = value.reshape(-1)
        table = torch.stack([columns[key][int(u)] for u in which], -1) if len(which) else flat.new_zeros(len(flat), 0)
        affine = Affine(value.shape, flat - table @ origin[which], which, table)
        actual, expected = other[key.site].parameters[key.role], affine.at(second)
        slack = _TOLERANCE * (1 + float(actual.abs().amax()))
        if math.isfinite(slack) and actual.shape == value.shape and bool(((actual - expected).abs() <= slack).all()):
            found[key] = affine
    return found


def _rows(
    key: Key,
    base: Mapping[str, Reading],
    other: Mapping[str, Reading],
    first: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    moves: Mapping[str, Tensor],
    whole: list[str],
) -> dict[str, Tensor]:
    one, two = (r[key.site].parameters["probs"].flatten(0, -2) for r in (base, other))
    found = {}
    for name in whole:
        if name in moves and first[name].shape[-1] == one.shape[-1]:
            pairs = ((one, first[name].flatten(0, -2)), (two, second[name].flatten(0, -2)))
            if len(one) * pairs[0][1].numel() > _MOST_ENTRIES:
                continue
            near = [(table[:, None] - rows.reshape(-1, rows.shape[-1])).abs().amax(-1) < _TOLERANCE for table, rows in pairs]
            found[name] = near[0] & near[1]
    return found


def _learned(problem: Problem, point: Mapping[str, Tensor], sites: set[str]) -> list[Key]:
    """Parameters of densities that depend on what Pyro holds (networks): these change from step to step."""
    if not problem.leaves:
        return []
    keys = []
    with torch.enable_grad():
        trace = problem.trace(point)
        for name, site in packed_sites(trace):
            if name not in sites:
                continue
            for role, value in _read(name, site, inside=True).parameters.items():
                if value.requires_grad:
                    found = torch.autograd.grad(
                        value.sum(), list(problem.leaves.values()), allow_unused=True, retain_graph=True
                    )
                    if any(gradient is not None for gradient in found):
                        keys.append(Key(name, role))
    return keys
