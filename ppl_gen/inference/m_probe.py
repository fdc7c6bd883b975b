"""What the densities of a program's rows look like as functions of its global sites, found by running it.

The program is traced at two random points, and once with each coordinate moved. Parameters of densities that are
affine in the coordinates are recognised by their values at the second point, rows of probability tables by being equal
to rows of a global site at both. Coordinates are unconstrained: the logarithm of a positive site, for instance, so that
a scale that is a power of a global site, times a constant, has a logarithm that is affine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributions as td
from torch.distributions import Transform

from ppl_gen.inference.enumerated import packed_sites
from ppl_gen.inference.expectation import Problem
from ppl_gen.inference.m_readings import Key, Reading, read

__all__ = ["Affine", "Coordinates", "Probe", "probed", "unwrapped"]

# Beyond these a probe takes longer, or its tables more memory (0.3 GB), than gradient steps would.
MOST_COORDINATES = 300
_MOST_ENTRIES = 40_000_000
_TOLERANCE = 1e-9


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


def unwrapped(transform: Transform) -> Transform:
    """Without the dims that are only declared to belong to the event."""
    while isinstance(transform, td.transforms.IndependentTransform):
        transform = transform.base_transform
    return transform


def _elementwise(transform: Transform) -> bool:
    return unwrapped(transform).domain.event_dim == 0


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
    """Probe ``sites`` (those that weights were found for) around ``values``.

    None where there are too many coordinates, or where what is observed depends on them.
    """
    coordinates = Coordinates(problem.transforms, values)
    if coordinates.size > MOST_COORDINATES:
        return None
    generator = torch.Generator().manual_seed(seed)
    first, second = ({n: _moved(problem.transforms[n], values[n], generator) for n in problem.names} for _ in range(2))

    def readings(point: Mapping[str, Tensor]) -> dict[str, Reading]:
        found = packed_sites(problem.trace(point))
        return {name: read(name, site, inside=name in sites) for name, site in found}

    with torch.no_grad():
        origin = coordinates.vector(first)
        # There and back, so that a step in one coordinate leaves the others the same to the last bit.
        first |= coordinates.values(origin)
        base, other = readings(first), readings(second)
        if base.keys() != other.keys() or not all(reading.alike(other[name]) for name, reading in base.items()):
            return None
        keys = {Key(name, role): v for name, reading in base.items() for role, v in reading.parameters.items()}
        moves: dict[Key, dict[str, Tensor]] = {key: {} for key in keys}
        columns = _columns(coordinates, origin, first, keys, moves, readings)
        if columns is None:
            return None
        whole = [name for name in problem.names if name not in coordinates.transforms]
        for name in whole:
            for key, change in _changes(keys, readings({**first, name: second[name]})):
                moves[key][name] = _positions(key, change)
        affine = _affine(keys, other, columns, origin, coordinates.vector(second))
        rows = {
            key: _rows(value, other[key.site].parameters["probs"], first, second, [n for n in whole if n in moves[key]])
            for key, value in keys.items()
            if key.role == "probs"
        }
        nodes: Mapping[str, Any] = problem.trace(first).nodes
        priors = {name: nodes[name]["fn"] for name in problem.names}
    for key in _learned(problem, first, sites):
        affine.pop(key, None)
        rows.pop(key, None)
        if key.role == "prior":
            moves[key]["pyro.param"] = torch.ones(1, dtype=torch.bool)
    return Probe(coordinates, origin, base, affine, moves, rows, priors)


def _columns(
    coordinates: Coordinates,
    origin: Tensor,
    point: Mapping[str, Tensor],
    keys: Mapping[Key, Tensor],
    moves: Mapping[Key, dict[str, Tensor]],
    readings: Callable[[Mapping[str, Tensor]], dict[str, Reading]],
) -> dict[Key, dict[int, Tensor]] | None:
    """By parameter: how it changes with each coordinate that it changes with. ``moves`` is filled in beside."""
    room = _MOST_ENTRIES
    columns: dict[Key, dict[int, Tensor]] = {key: {} for key in keys}
    for unit, name in coordinates.units():
        step = torch.zeros_like(origin)
        step[unit] = 1.0
        for key, change in _changes(keys, readings({**point, **coordinates.values(origin + step)})):
            columns[key][unit] = change.reshape(-1)
            moves[key][name] = _positions(key, change) | moves[key].get(name, False)
            room -= change.numel()
        if room < 0:
            return None
    return columns


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
        terms = affine.constant.abs() + table.abs() @ second[which].abs()
        if bool(((actual - expected).abs() <= _TOLERANCE * terms.reshape(value.shape)).all()):
            found[key] = affine
    return found


def _rows(
    one: Tensor, two: Tensor, first: Mapping[str, Tensor], second: Mapping[str, Tensor], names: Iterable[str]
) -> dict[str, Tensor]:
    """By site: which rows of a table of probabilities (``one`` at the first point, ``two`` at the second) are its."""
    size, found = one.shape[-1], {}
    for name in names:
        if first[name].shape[-1] == size and one.numel() * first[name].numel() <= _MOST_ENTRIES:
            pairs = ((one, first[name]), (two, second[name]))
            near = [
                (table.reshape(-1, 1, size) - ours.reshape(-1, size)).abs().amax(-1) < _TOLERANCE
                for table, ours in pairs
            ]
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
            for role, value in read(name, site, inside=name in sites).parameters.items():
                if value.requires_grad:
                    found = torch.autograd.grad(
                        value.sum(), list(problem.leaves.values()), allow_unused=True, retain_graph=True
                    )
                    if any(gradient is not None for gradient in found):
                        keys.append(Key(name, role))
    return keys
