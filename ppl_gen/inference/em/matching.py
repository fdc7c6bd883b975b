"""Which M-step each global site can have in closed form, judged from a probe; and these M-steps together."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch import Tensor
from torch import distributions as td

from ppl_gen.inference.em.closed_forms import Locations, ProbabilityTable, Ratios, unequal
from ppl_gen.inference.em.coordinates import Affine, Coordinates, unwrapped
from ppl_gen.inference.em.density_form import Key, Reading
from ppl_gen.inference.em.expectation import Problem
from ppl_gen.inference.em.probe import DensityProbe

__all__ = ["Derived", "matched"]

_CYCLES = 50
_STILL = 1e-11
_KINDS = {
    "table": "weighted counts",
    "loc": "weighted least squares",
    "scale": "weighted residuals",
    "rate": "weighted events",
    "odds": "weighted successes",
}


_WORDS = {"probs": "table of probabilities", "loc": "location"}


class _NotDerivedError(Exception):
    """Why a site has no closed form."""


@dataclass(frozen=True, eq=False)
class Derived:
    """Closed-form M-steps of some sites, by what was found; ``reasons`` say why others have none."""

    kinds: dict[str, str]
    reasons: dict[str, str]
    coordinates: Coordinates | None = None
    tables: tuple[ProbabilityTable, ...] = ()
    ratios: tuple[Ratios, ...] = ()
    locations: Locations | None = None
    coupled: bool = False

    def __call__(self, values: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """New values of the sites in ``kinds``."""
        if self.coordinates is None:
            return {}
        new = {table.site: table(values[table.site], weights) for table in self.tables}
        vector = self.coordinates.vector(values)
        for ratios in self.ratios:
            if ratios.role != "scale":
                vector = ratios(vector, weights)
        scales = [ratios for ratios in self.ratios if ratios.role == "scale"]
        for _ in range(_CYCLES if self.coupled else 1):
            before = vector
            if self.locations is not None:
                vector = self.locations(vector, weights)
            for ratios in scales:
                vector = ratios(vector, weights)
            if bool(((vector - before).abs() <= _STILL * (1 + before.abs())).all()):
                break
        moved = self.coordinates.values(vector)
        return {name: new[name] if name in new else moved[name] for name in self.kinds}


def matched(problem: Problem, probe: DensityProbe | None, names: Collection[str]) -> Derived:
    """The closed forms that ``names`` have."""
    if probe is None:
        return Derived({}, dict.fromkeys(names, "what is observed changes with it"))
    linked = _linked(problem, probe) if problem.prior else set()
    roles: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for name in names:
        try:
            if name in linked:
                raise _NotDerivedError("its prior depends on other sites, or theirs on it")
            roles[name] = _role(problem, probe, name)
        except _NotDerivedError as error:
            reasons[name] = str(error)
    found = _built(problem, probe, roles, reasons)
    kinds = {name: _KINDS[role] for name, role in roles.items() if name not in reasons}
    return Derived(kinds, reasons, probe.coordinates, *found)


def _built(
    problem: Problem, probe: DensityProbe, roles: Mapping[str, str], reasons: dict[str, str]
) -> tuple[tuple[ProbabilityTable, ...], tuple[Ratios, ...], Locations | None, bool]:
    tables, ratios, located = [], [], []
    for name, role in roles.items():
        try:
            if role == "table":
                tables.append(_table(problem, probe, name))
            elif role == "loc":
                located.append((name, _normal_prior(problem, probe, name)))
            else:
                ratios.append(_ratios(problem, probe, name, role))
        except _NotDerivedError as error:
            reasons[name] = str(error)
    locations = _locations(problem, probe, located) if located else None
    scales = any(r.role == "scale" for r in ratios)
    # Under a prior, how far a location is drawn to it depends on the scale of its rows.
    coupled = locations is not None and scales and (problem.prior or _uneven(locations, probe.vector))
    return tuple(tables), tuple(ratios), locations, coupled


def _linked(problem: Problem, probe: DensityProbe) -> set[str]:
    """Global sites whose priors depend on each other."""
    found = set()
    for key, moves in probe.moved.items():
        if key.role == "prior":
            others = set(moves) - {key.site}
            found |= others | ({key.site} if others else set())
    return found


def _role(problem: Problem, probe: DensityProbe, name: str) -> str:
    keys = [key for key, moves in probe.moved.items() if name in moves and key.role != "prior"]
    if not keys:
        raise _NotDerivedError("no density of the rows depends on it")
    for key in keys:
        if key.role == "other":
            raise _NotDerivedError(f"the density of {key.site!r} has no known form in it")
    if name not in probe.coordinates.slices:
        for key in keys:
            rows = probe.rows.get(key, {}).get(name)
            if rows is None or bool((probe.moved[key][name] & ~rows.any(-1)).any()):
                raise _NotDerivedError(f"the table of probabilities of {key.site!r} does not consist of its rows")
        return "table"
    roles = {key.role for key in keys}
    if len(roles) > 1:
        raise _NotDerivedError(f"it enters {' and '.join(sorted(roles))} at once")
    role = roles.pop()
    bent = [key.site for key in keys if key not in probe.affine]
    if role == "probs" or bent:
        site = bent[0] if bent else keys[0].site
        raise _NotDerivedError(f"the {_WORDS.get(role, role)} of {site!r} is not affine in its coordinates")
    if role == "loc":
        _check_location(probe, name, keys)
    else:
        _check_single(probe, name, keys)
    return role


def _check_location(probe: DensityProbe, name: str, keys: list[Key]) -> None:
    units = probe.coordinates.slices[name]
    transform = probe.coordinates.transforms[name]
    free = probe.vector[units].reshape(probe.coordinates.shapes[name])
    if not torch.equal(transform(free), free):
        raise _NotDerivedError("a location may not leave its support, as least squares could")
    for key in keys:
        if Key(key.site, "scale") not in probe.affine:
            raise _NotDerivedError(f"the scale of {key.site!r} has no known form")


def _check_single(probe: DensityProbe, name: str, keys: list[Key]) -> None:
    """Each position of the parameter is one coordinate (to one power), and no other site takes part."""
    for key in keys:
        affine = probe.affine[key]
        columns, _ = affine.column(probe.coordinates.slices[name])
        used = (columns != 0).any(-1)
        if bool(((affine.columns[used] != 0).sum(-1) != 1).any()):
            raise _NotDerivedError(f"the {key.role} of {key.site!r} mixes it with other parameters")
        if key.role == "scale" and Key(key.site, "loc") not in probe.affine:
            raise _NotDerivedError(f"the location of {key.site!r} has no known form")


def _table(problem: Problem, probe: DensityProbe, name: str) -> ProbabilityTable:
    parts = [
        (probe.readings[key.site], rows[name].T.to(probe.vector))
        for key, rows in probe.rows.items()
        if name in rows and bool(rows[name].any())
    ]
    extra = None
    if problem.prior:
        prior = _inner(probe.priors[name])
        if not isinstance(prior, td.Dirichlet) or bool((prior.concentration < 1).any()):
            raise _NotDerivedError("its prior is not a Dirichlet with concentrations of at least 1")
        extra = prior.concentration - 1
    return ProbabilityTable(name, parts, extra)


def _ratios(problem: Problem, probe: DensityProbe, name: str, role: str) -> Ratios:
    units = probe.coordinates.slices[name]
    count = units.stop - units.start
    power, offset = probe.vector.new_zeros(count), probe.vector.new_zeros(count)
    parts = []
    for key, affine in probe.affine.items():
        if key.role != role or name not in probe.moved[key]:
            continue
        columns, which = affine.column(units)
        chosen = columns.new_zeros(count, len(columns))
        for unit, column in zip(which.tolist(), columns.T, strict=True):
            used = column != 0
            chosen[unit] = used.to(column)
            first = column[used][0]
            constant = affine.constant[used]
            powers = torch.cat([column[used], power[unit].reshape(1)]) if power[unit] != 0 else column[used]
            if not torch.allclose(powers, first.expand_as(powers), rtol=1e-9, atol=1e-9):
                raise _NotDerivedError(f"it enters the {role} of {key.site!r} in several powers")
            offsets = torch.cat([constant, offset[unit].reshape(1)]) if power[unit] != 0 else constant
            if role == "odds" and not torch.allclose(offsets, constant[0].expand_as(offsets), rtol=1e-9, atol=1e-9):
                raise _NotDerivedError(f"it enters the odds of {key.site!r} with several offsets")
            power[unit], offset[unit] = first, constant[0] if role == "odds" else 0.0
        parts.append((probe.readings[key.site], affine, chosen))
    if bool((power == 0).any()):
        raise _NotDerivedError("part of it enters no density of the rows")
    located = {key.site: affine for key, affine in probe.affine.items() if key.role == "loc"}
    prior = None
    if problem.prior:
        entry = _inner(probe.priors[name])
        if entry.event_shape:
            raise _NotDerivedError("its prior ties its entries together")
        prior = entry, unwrapped(problem.transforms[name]), probe.coordinates.shapes[name]
    return Ratios(name, units, role, parts, power, offset, located, prior)


def _normal_prior(problem: Problem, probe: DensityProbe, name: str) -> tuple[Tensor, Tensor] | None:
    """Mean and precision of a site's normal prior, one for each coordinate; None under maximum likelihood."""
    if not problem.prior:
        return None
    prior, shape = _inner(probe.priors[name]), probe.coordinates.shapes[name]
    if not isinstance(prior, td.Normal):
        raise _NotDerivedError("its prior is not normal")
    return prior.loc.expand(shape).reshape(-1), prior.scale.expand(shape).reshape(-1) ** -2


def _locations(
    problem: Problem, probe: DensityProbe, located: list[tuple[str, tuple[Tensor, Tensor] | None]]
) -> Locations:
    slices = [probe.coordinates.slices[name] for name, _ in located]
    units = torch.cat([torch.arange(s.start, s.stop) for s in slices]).to(probe.vector.device)
    parts: list[tuple[Reading, Affine, Affine, Tensor]] = []
    for key, affine in probe.affine.items():
        if key.role == "loc" and any(name in probe.moved[key] for name, _ in located):
            wide = affine.columns.new_zeros(len(affine.constant), probe.coordinates.size)
            wide[:, affine.which] = affine.columns
            scale = probe.affine[Key(key.site, "scale")]
            parts.append((probe.readings[key.site], affine, scale, wide[:, units]))
    separate = all(bool(((columns != 0).sum(-1) <= 1).all()) for *_, columns in parts)
    priors = [prior for _, prior in located if prior is not None]
    joined = (torch.cat([p[0] for p in priors]), torch.cat([p[1] for p in priors])) if priors else None
    return Locations(units, parts, joined, separate)


def _uneven(locations: Locations, vector: Tensor) -> bool:
    return any(unequal(*part, vector) for part in locations.parts)


def _inner(fn: Any) -> Any:
    while isinstance(fn, td.Independent | ExpandedDistribution):
        fn = fn.base_dist
    return fn
