r"""A second look, beyond the mass of a fit: many short Hamiltonian chains on the program's own density.

Two groups of chains move at once. Those that begin at draws of the fit leave their distribution as it is if the fit is
the posterior, whatever their number of steps (each step keeps the posterior invariant), and drift towards the posterior
if it is not: their means and spreads afterwards are compared with those of the fit. Those that begin elsewhere (at
draws pulled four times as far from the centre, and at draws of the prior) show whether there is a place of comparable
density that the fit does not know.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from ppl_gen.capture.replay import record_checked
from ppl_gen.capture.tape import RecordingRefused
from ppl_gen.data.batching import Dataset
from ppl_gen.diagnostics.short_chains import Function, State, quenched, sampled, scale_of
from ppl_gen.errors import PROGRAM_ERRORS
from ppl_gen.fitting.posteriors.base import spread
from ppl_gen.inference.unconstrained import Unconstrained
from ppl_gen.program.info import ProgramInfo
from ppl_gen.weights.weighed import numbers

if TYPE_CHECKING:
    from ppl_gen.fits.result import Fit

__all__ = ["SecondLook", "moved"]

MAX_ELEMENTS = 4_000_000  # numbers of data times chains that one gradient may touch
FEWEST = 32  # chains that say something
FREE = 400_000  # of these however short the fit; beyond, no more than its steps have touched
GRADIENTS = 250  # of every chain
MAX_SIZE = 2000  # unconstrained numbers of one chain
WIDER = 4.0  # how many times farther from the centre
NATS = 3.0  # a place counts if its density is no more than so much below the least of the fit's own chains


@dataclass(frozen=True)
class SecondLook:
    """What short chains found.

    Args:
        draws: all draws of the fit, unconstrained, draws x numbers.
        end: where they were afterwards, over three moments: (3 chains) x numbers.
        names: one label for every number.
        rows: the row that every number belongs to, -1 for what all rows share.
        chains: how many of them.
        dispersed: how many began elsewhere; 0 where none did.
        elsewhere: how many of these ended where the fit has no mass, at a comparable density.
        gain: mean log density there above that of the fit's own chains, in nats.
        place: the number in which they are farthest away, and where.
    """

    draws: np.ndarray
    end: np.ndarray
    names: list[str]
    rows: np.ndarray
    chains: int
    dispersed: int = 0
    elsewhere: int = 0
    gain: float = 0.0
    place: str = ""


def moved(
    fit: Fit,
    draws: Mapping[str, Tensor],
    data: Dataset,
    *,
    chains: int,
    dispersed: Mapping[str, Tensor] | None,
    relabel: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> SecondLook | str:
    """Short chains from draws of a fit; or a sentence that says why none were run. Call inside ``fit.bound()``.

    ``draws``: joint draws of all latent sites that are not summed out, draws x shape; ``dispersed``: values to begin
    at elsewhere in addition (draws of the prior), None to begin nowhere else; ``data``: the rows the draws are for.
    """
    cells = numbers(fit, data, _table(fit, data))
    paid = int(fit.cost.get("steps", 0)) * cells // GRADIENTS if fit.judged_by != "chains" else MAX_ELEMENTS
    chains = min(chains, min(MAX_ELEMENTS, max(FREE, paid)) // cells)
    if chains < FEWEST:
        return f"no short chains were run, as the data are too many for it ({cells} numbers)"
    batch = data.batch()
    try:
        density = Unconstrained(fit.joint, batch, fit.info)
        if missing := [name for name in density.sites if name not in draws]:
            return f"no short chains were run, as the fit has no draws of {', '.join(missing)}"
        if density.size > MAX_SIZE:
            return f"no short chains were run, as there are too many latent numbers ({density.size})"
        points = _points(density, draws)
        elsewhere = _elsewhere(density, points, dispersed, max(16, chains // 4)) if dispersed is not None else None
        begun = points[spread(len(points), chains)]
        function = _together(density, begun)
        return _run(fit.info, density, function, points, begun, elsewhere, relabel)
    except PROGRAM_ERRORS as e:
        return f"no short chains were run, as the density could not be evaluated for many points at once ({_brief(e)})"


def _table(fit: Fit, data: Dataset) -> int:
    """By how much the tables of sums over finite sites of rows exceed the data, where continuous latents stand beside.

    Each value of a finite site has a distribution of its own of what is observed below it: topics times words.
    """
    local = fit.info.select(local=True)
    if all(site.finite for site in local) or not any(site.finite for site in local):
        return 1
    batch = data.batch()
    nodes = poutine.trace(fit.joint).get_trace(*batch.args, **batch.kwargs).nodes
    states = [_states(nodes[site.name]["fn"]) for site in local if site.finite and site.name in nodes]
    below = [_states(nodes[s.name]["fn"]) for s in fit.info.select(kind="observed", local=True) if s.name in nodes]
    return max(states, default=1) * max(below, default=1)


def _states(fn: Any) -> int:
    try:
        return len(fn.enumerate_support(expand=False)) if fn.has_enumerate_support else 1
    except NotImplementedError:  # vectors of finite numbers
        return 1


def _brief(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


def _points(density: Unconstrained, draws: Mapping[str, Tensor]) -> Tensor:
    """Draws x numbers: the unconstrained vectors of joint draws; those on the edge of a support are left out."""
    known = {name: draws[name] for name in density.sites}
    count = len(next(iter(known.values())))
    rows = []
    for i in range(count):
        parts = density.parts_of({name: value[i] for name, value in known.items()})
        if len(parts) == len(known):
            row = torch.cat([parts[name].reshape(-1) for name in density.sites])
            if bool(row.isfinite().all()):
                rows.append(row)
    if len(rows) < max(16, count // 2):
        raise ValueError("the draws lie on the edge of their support")
    return torch.stack(rows)


def _elsewhere(density: Unconstrained, points: Tensor, prior: Mapping[str, Tensor] | None, count: int) -> Tensor:
    """Points x numbers, where further chains begin: draws pulled from the centre, and draws of the prior."""
    centre = points.median(0).values
    wide = centre + WIDER * (points[spread(len(points), count)] - centre)
    if not prior:
        return wide
    known = {name: value for name, value in prior.items() if name in density.sites}
    if len(known) < len(density.sites):
        return wide
    try:
        return torch.cat([wide, _points(density, known)[:count]])
    except (ValueError, RuntimeError):
        return wide


def _together(density: Unconstrained, points: Tensor) -> Function:
    """Potential (points, nats) and gradient (as the points) of many points x numbers at once, as each gives alone."""
    one = torch.func.grad_and_value(density.potential)

    def many(u: Tensor) -> tuple[Tensor, Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            gradient, value = torch.vmap(one)(u)
        return value.detach(), gradient.detach()

    alone = [density.potential_and_gradient(point) for point in (points[0], points[-1])]
    values, gradients = many(torch.stack([points[0], points[-1]]))
    for i, (value, gradient) in enumerate(alone):
        near = torch.allclose(values[i], value, rtol=1e-4, atol=1e-3)
        if not (
            near and torch.allclose(gradients[i], gradient, rtol=1e-2, atol=1e-2 * float(gradient.abs().max() + 1))
        ):
            raise RuntimeError("together the points give other densities than alone")
    return many


def _recorded(many: Function, point: Tensor) -> Function:
    try:
        replay = record_checked(many, [point, 1.01 * point]).load()
    except (RecordingRefused, RuntimeError):
        return many

    def replayed(u: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = replay(u)
        return value, gradient

    return replayed


def _run(
    info: ProgramInfo,
    density: Unconstrained,
    many: Function,
    points: Tensor,
    begun: Tensor,
    elsewhere: Tensor | None,
    relabel: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None,
) -> SecondLook:
    """``points``: all draws, draws x numbers; ``begun`` and ``elsewhere``: chains x numbers."""
    scale = scale_of(points)
    count = len(begun)
    u = begun if elsewhere is None else torch.cat([begun, elsewhere])
    many = _recorded(many, u)
    state = State(u, *many(u))
    if elsewhere is not None:
        state = quenched(many, state, scale, count)
    state, ends = sampled(many, state, scale, count)
    own = torch.cat([end[:count] for end in ends])
    names, rows = _names(density), _rows(density, info)
    if elsewhere is None:
        return SecondLook(_array(points), _array(own), names, rows, count)
    found, gain, place = _places(density, points, own, state, count, relabel, names)
    return SecondLook(_array(points), _array(own), names, rows, count, len(elsewhere), found, gain, place)


def _places(
    density: Unconstrained,
    points: Tensor,
    own: Tensor,
    state: State,
    count: int,
    relabel: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None,
    names: list[str],
) -> tuple[int, float, str]:
    """How many chains that started elsewhere ended outside of the fit's mass at a comparable density.

    ``points``: draws x numbers; ``own``: where the first ``count`` chains were, (3 chains) x numbers.
    """
    ends, values = state.u[count:], state.value[count:]
    if relabel is not None:
        ends = _relabelled(density, ends, relabel)
        own = _relabelled(density, own, relabel)
        points = _relabelled(density, points, relabel)
    known = torch.cat([points, own])
    centre = known.median(0).values
    spread = (known - centre).abs().median(0).values.clamp_min(1e-6 * (1.0 + centre.abs())) * 1.4826
    reach = ((known - centre) / spread).abs().amax(0)
    beyond = ((ends - centre) / spread).abs() / reach.clamp_min(3.0)
    least = float(torch.quantile(state.value[:count].double(), 0.99)) + NATS
    found = (beyond.amax(1) > 1.5) & (values < least)
    number = int(found.sum())
    if not number:
        return 0, 0.0, ""
    gain = float(state.value[:count].mean() - values[found].mean())
    worst = int(beyond[found].mean(0).argmax())
    return number, gain, names[worst]


def _relabelled(density: Unconstrained, u: Tensor, relabel: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Tensor:
    """Points x numbers, with their components in the order of ``relabel``."""
    rows = [density.values(point) for point in u]
    values = {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(density.sites)}
    return _points(density, {**values, **relabel(values)})


def _names(density: Unconstrained) -> list[str]:
    found = []
    for name, shape in density.sites.items():
        found += [name + (str(list(index)) if index else "") for index in np.ndindex(tuple(shape))]
    return found


def _rows(density: Unconstrained, info: ProgramInfo) -> np.ndarray:
    """The row that each number of a point belongs to, -1 for what all rows share."""
    found = [np.zeros(0, dtype=np.int64)]
    for name, shape in density.sites.items():
        site, places = info.sites[name], np.indices(tuple(shape))
        axis = len(shape) - len(site.event_shape) + (info.plate_dim or -1)
        found.append(places[axis].reshape(-1) if site.local and axis >= 0 else np.full(int(np.prod(shape)), -1))
    return np.concatenate(found)


def _array(value: Tensor) -> np.ndarray:
    return value.detach().double().cpu().numpy()
