"""What the densities of a program's rows look like as functions of its global sites, found by running it.

The program is traced at two random points, and beside the first with one site moved at a time. Where every position of
a parameter follows one coordinate of that site, two random moves tell which one, and how; else each coordinate is moved
by itself. What is affine in the coordinates is recognised by its values at the second point, rows of probability tables
by being equal to rows of a global site at both. Coordinates are unconstrained: the logarithm of a positive site, for
instance, so that a scale that is a power of a global site, times a constant, has a logarithm that is affine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform

from ppl_gen.enumeration.enumerated_trace import packed_sites
from ppl_gen.inference.em.coordinates import Affine, Coordinates, elementwise
from ppl_gen.inference.em.density_form import Key, Reading, read
from ppl_gen.inference.em.expectation import Problem

__all__ = ["DensityProbe", "probed"]

# Beyond these a probe takes longer, or its tables more memory (0.3 GB), than gradient steps would.
_MOST_MOVES = 300
_MOST_ENTRIES = 40_000_000
_TOLERANCE = 1e-9
_SLOPED = ("loc", "scale", "rate", "odds")


@dataclass(frozen=True, eq=False)
class DensityProbe:
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


def probed(problem: Problem, values: Mapping[str, Tensor], sites: set[str], seed: int) -> DensityProbe | None:
    """Probe ``sites`` (those that weights were found for) around ``values``; None where what is observed moves too."""
    coordinates = Coordinates(problem.transforms, values)
    generator = torch.Generator().manual_seed(seed)
    first, second = ({n: _moved(problem.transforms[n], values[n], generator) for n in problem.names} for _ in range(2))

    def readings(point: Mapping[str, Tensor]) -> dict[str, Reading]:
        found = packed_sites(problem.trace(point))
        return {name: read(name, site, inside=name in sites) for name, site in found}

    with torch.no_grad():
        origin = coordinates.vector(first)
        base, other = readings(first), readings(second)
        if base.keys() != other.keys() or not all(reading.alike(other[name]) for name, reading in base.items()):
            return None
        keys = {Key(name, role): v for name, reading in base.items() for role, v in reading.parameters.items()}
        moves: dict[Key, dict[str, Tensor]] = {key: {} for key in keys}
        tables: dict[Key, dict[str, Tensor | None]] = {key: {} for key in keys}
        for name, units in coordinates.slices.items():
            _columns(name, _mover(coordinates, name, first, keys, readings), origin[units], generator, moves, tables)
        whole = [name for name in problem.names if name not in coordinates.transforms]
        for name in whole:
            for key, change in _changes(keys, readings({**first, name: second[name]})).items():
                moves[key][name] = _positions(key, change)
        affine = _affine(keys, other, tables, coordinates, origin, coordinates.vector(second))
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
    return DensityProbe(coordinates, origin, base, affine, moves, rows, priors)


def _changes(keys: Mapping[Key, Tensor], found: Mapping[str, Reading]) -> dict[Key, Tensor]:
    """By parameter that differs from what it was: by how much. Infinities that stay do not differ."""
    pairs = ((key, before, found[key.site].parameters[key.role]) for key, before in keys.items())
    return {key: torch.where(a == b, 0.0, a - b) for key, b, a in pairs if not torch.equal(a, b)}


def _mover(
    coordinates: Coordinates,
    name: str,
    point: Mapping[str, Tensor],
    keys: Mapping[Key, Tensor],
    readings: Callable[[Mapping[str, Tensor]], dict[str, Reading]],
) -> Callable[[Tensor], dict[Key, Tensor]]:
    """What a step of one site away from ``point`` changes, all other sites being the same to the last bit."""
    transform, shape = coordinates.transforms[name], coordinates.shapes[name]
    origin = transform.inv(point[name]).reshape(-1)
    return lambda step: _changes(keys, readings({**point, name: transform((origin + step).reshape(shape))}))


def _columns(
    name: str,
    changed: Callable[[Tensor], dict[Key, Tensor]],
    origin: Tensor,
    generator: torch.Generator,
    moves: Mapping[Key, dict[str, Tensor]],
    tables: Mapping[Key, dict[str, Tensor | None]],
) -> None:
    """Fill in which positions of each parameter one site moves, and the slopes, positions x coordinates of the site.

    None stands for slopes that are too many to find.
    """
    count = len(origin)
    steps = [1 + _drawn(torch.rand, origin, generator) for _ in range(2)]
    one, two = (changed(step) for step in steps)
    several = []
    for key in {**one, **two}:
        pair = [found.get(key, torch.zeros(1, dtype=origin.dtype)) for found in (one, two)]
        moves[key][name] = torch.stack([_positions(key, change) for change in torch.broadcast_tensors(*pair)]).any(0)
        if key.role in _SLOPED:
            tables[key][name] = _single(pair[0].reshape(-1), pair[1].reshape(-1), steps)
            if tables[key][name] is None and pair[0].numel() * count <= _MOST_ENTRIES:
                several.append(key)
    if several and count <= _MOST_MOVES:
        alone = [changed(unit) for unit in torch.eye(count, dtype=origin.dtype, device=origin.device)]
        for key in several:
            size = len(moves[key][name])
            tables[key][name] = torch.stack(
                [c[key].reshape(-1) if key in c else origin.new_zeros(size) for c in alone], -1
            )


def _single(one: Tensor, two: Tensor, steps: list[Tensor]) -> Tensor | None:
    """Slopes, positions x coordinates, where each position follows one at most: the ratio of two moves says which."""
    used = (one != 0) | (two != 0)
    count = len(steps[0])
    if one.shape != two.shape or len(one) * count > _MOST_ENTRIES:
        return None
    ratio, (known, order) = one[used] / two[used], (steps[0] / steps[1]).sort()
    after = torch.searchsorted(known, ratio).clamp(max=count - 1)
    before = (after - 1).clamp(min=0)
    nearest = torch.where((known[after] - ratio).abs() < (known[before] - ratio).abs(), after, before)
    unit = order[nearest]
    if not bool(((known[nearest] - ratio).abs() <= _TOLERANCE).all()):
        return None
    table = one.new_zeros(len(one), count)
    table[used.nonzero().squeeze(-1), unit] = one[used] / steps[0][unit]
    return table


def _positions(key: Key, change: Tensor) -> Tensor:
    """Which positions of a parameter change, true or false, flattened; a row of probabilities is one position."""
    return ((change != 0).any(-1) if key.role == "probs" else change != 0).reshape(-1)


def _moved(transform: Transform, value: Tensor, generator: torch.Generator) -> Tensor:
    """A random point near ``value``; for a table of probabilities, anywhere."""
    free = transform.inv(value)
    noise = _drawn(torch.randn, free, generator)
    if elementwise(transform):
        return transform(free + noise)
    return transform(noise)


def _drawn(kind: Callable[..., Tensor], like: Tensor, generator: torch.Generator) -> Tensor:
    """On the CPU, where the generator is, whatever device the program runs on."""
    return kind(like.shape, generator=generator, dtype=like.dtype, device="cpu").to(like.device)


def _affine(
    keys: Mapping[Key, Tensor],
    other: Mapping[str, Reading],
    tables: Mapping[Key, Mapping[str, Tensor | None]],
    coordinates: Coordinates,
    origin: Tensor,
    second: Tensor,
) -> dict[Key, Affine]:
    """The parameters that are affine in all coordinates; ``tables``: their slopes by site, positions x coordinates."""
    found = {}
    numbers = torch.arange(coordinates.size, device=origin.device)
    for key, value in keys.items():
        columns = {name: table for name, table in tables[key].items() if table is not None}
        if key.role not in _SLOPED or len(columns) < len(tables[key]):
            continue
        flat = value.reshape(-1).to(origin.dtype)  # constants of the program may be in single precision
        which = torch.cat([numbers[:0], *(numbers[coordinates.slices[name]] for name in columns)])
        table = torch.cat([flat.new_zeros(len(flat), 0), *columns.values()], -1)
        used = (table != 0).any(0)
        which, table = which[used], table[:, used]
        affine = Affine(value.shape, flat - table @ origin[which], which, table)
        actual, expected = other[key.site].parameters[key.role], affine.at(second)
        terms = affine.constant.abs() + table.abs() @ second[which].abs()
        if bool(((actual - expected).abs() <= _TOLERANCE * terms.reshape(value.shape)).all()):
            found[key] = affine
    return found


def _rows(
    one: Tensor, two: Tensor, first: Mapping[str, Tensor], second: Mapping[str, Tensor], names: Iterable[str]
) -> dict[str, Tensor]:
    """By site: which rows of a table of probabilities (``one`` at the first point, ``two`` at the second) are its.

    Rows of the table x rows of the site, true or false.
    """
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
