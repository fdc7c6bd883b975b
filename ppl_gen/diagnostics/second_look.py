r"""A second look, beyond the mass of a fit: many short Hamiltonian chains on the program's own density.

Two groups of chains move at once. Those that begin at draws of the fit leave their distribution as it is if the fit is
the posterior, whatever their number of steps (each step keeps the posterior invariant), and drift towards the posterior
if it is not: their means and spreads afterwards are compared with those of the fit. Those that begin elsewhere (at
draws pulled four times as far from the centre, and at draws of the prior) show whether there is a place of comparable
density that the fit does not know.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ppl_gen.data.batching import Dataset
from ppl_gen.errors import IncompatibleError
from ppl_gen.inference.tape import RecordingRefused, record_checked
from ppl_gen.inference.unconstrained import Unconstrained

if TYPE_CHECKING:
    from ppl_gen.result import Fit

__all__ = ["SecondLook", "moved"]

STEPS = 30  # iterations of each chain, of about 6 gradients; in the first third the step size is adapted
QUENCH = 25  # iterations downhill of chains that begin elsewhere
CELLS = 4_000_000  # numbers of data times chains that one gradient may touch
MAX_SIZE = 2000  # unconstrained numbers of one chain
DENSE = 60  # up to here the chains know the correlations of the draws
WIDER = 4.0  # how many times farther from the centre
NATS = 3.0  # a place counts if its density is no more than so much below the least of the fit's own chains

Function = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class SecondLook:
    """What short chains found.

    Args:
        draws: all draws of the fit, unconstrained, draws x numbers.
        start: where the chains at the fit's draws began, chains x numbers, unconstrained.
        end: where they were afterwards, over three moments: (3 chains) x numbers.
        names: one label for every number.
        chains: how many of them.
        dispersed: how many began elsewhere; 0 where none did.
        elsewhere: how many of these ended where the fit has no mass, at a comparable density.
        gain: mean log density there above that of the fit's own chains, in nats.
        place: the number in which they are farthest away, and where.
    """

    draws: np.ndarray
    start: np.ndarray
    end: np.ndarray
    names: list[str]
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
    cells = max(1, data.elements)
    chains = min(chains, CELLS // cells)
    if chains < 32:
        return f"no short chains were run, as the data are too many for it ({data.elements} numbers)"
    batch = data.batch()
    try:
        density = Unconstrained(fit.joint, batch, fit.info)
        if missing := [name for name in density.sites if name not in draws]:
            return f"no short chains were run, as the fit has no draws of {', '.join(missing)}"
        if density.size > MAX_SIZE:
            return f"no short chains were run, as there are too many latent numbers ({density.size})"
        points = _points(density, draws)
        elsewhere = _elsewhere(density, points, dispersed, max(16, chains // 4)) if dispersed is not None else None
        begun = points[_spread(len(points), chains)]
        function = _together(density, begun)
        return _run(density, function, points, begun, elsewhere, relabel)
    except (
        IncompatibleError,
        RuntimeError,
        ValueError,
        TypeError,
        IndexError,
        AssertionError,
        NotImplementedError,
    ) as e:
        return f"no short chains were run, as the density could not be evaluated for many points at once ({_brief(e)})"


def _brief(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


def _spread(total: int, count: int) -> Tensor:
    return torch.linspace(0, total - 1, min(count, total)).round().long()


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
    centre = points.median(0).values
    wide = centre + WIDER * (points[_spread(len(points), count)] - centre)
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
    """Potential and gradient of many points at once, replayed from a recording where one serves."""
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
    density: Unconstrained,
    many: Function,
    points: Tensor,
    begun: Tensor,
    elsewhere: Tensor | None,
    relabel: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None,
) -> SecondLook:
    scale = _scale(points)
    count = len(begun)
    u = begun if elsewhere is None else torch.cat([begun, elsewhere])
    many = _recorded(many, u)
    state = _State(u, *many(u))
    if elsewhere is not None:
        state = _quenched(many, state, scale, count)
    state, ends = _sampled(many, state, scale, count)
    own = torch.cat([end[:count] for end in ends])
    names = _names(density)
    if elsewhere is None:
        return SecondLook(_array(points), _array(begun), _array(own), names, count)
    found, gain, place = _places(density, points, own, state, count, relabel, names)
    return SecondLook(_array(points), _array(begun), _array(own), names, count, len(elsewhere), found, gain, place)


@dataclass(frozen=True)
class _State:
    u: Tensor
    value: Tensor
    gradient: Tensor

    def where(self, accept: Tensor, other: _State) -> _State:
        wide = accept[:, None]
        return _State(
            torch.where(wide, other.u, self.u),
            torch.where(accept, other.value, self.value),
            torch.where(wide, other.gradient, self.gradient),
        )


def _scale(points: Tensor) -> Tensor:
    """The Cholesky factor of the draws' covariance where they are enough for it, else their standard deviations."""
    deviations = points.std(0).clamp_min(1e-6 * (1.0 + points.abs().amax(0)))
    size = points.shape[1]
    if size > DENSE or len(points) < 5 * size:
        return deviations
    centred = (points - points.mean(0)) / deviations
    correlation = centred.T @ centred / (len(points) - 1)
    shrunk = 0.95 * correlation + 0.05 * torch.eye(size, dtype=points.dtype)
    return deviations[:, None] * torch.linalg.cholesky(shrunk)


def _times(scale: Tensor, x: Tensor) -> Tensor:
    return x * scale if scale.dim() == 1 else x @ scale.T


def _transposed(scale: Tensor, x: Tensor) -> Tensor:
    return x * scale if scale.dim() == 1 else x @ scale


def _leapfrog(
    many: Function, state: _State, p: Tensor, scale: Tensor, step: Tensor, count: int
) -> tuple[_State, Tensor]:
    """``count`` leaps of size ``step`` (chains x 1), in units in which the draws of the fit have unit variance."""
    u, gradient = state.u, state.gradient
    value = state.value
    p = p - 0.5 * step * _transposed(scale, gradient)
    for i in range(count):
        u = u + step * _times(scale, p)
        value, gradient = many(u)
        gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
        p = p - (1.0 if i < count - 1 else 0.5) * step * _transposed(scale, gradient)
    return _State(u, value, gradient), p


def _sampled(many: Function, state: _State, scale: Tensor, own: int) -> tuple[_State, list[Tensor]]:
    """Hamiltonian steps with one step size for all, adapted to the acceptance of the first ``own`` chains."""
    size, ends = 0.5 * state.u.shape[1] ** -0.25, []
    for iteration in range(STEPS):
        p = torch.randn_like(state.u)
        leaps = int(torch.randint(3, 9, ()))
        step = torch.full((len(state.u), 1), size, dtype=state.u.dtype) * (0.8 + 0.4 * torch.rand(len(state.u), 1))
        proposed, q = _leapfrog(many, state, p, scale, step, leaps)
        change = state.value - proposed.value + 0.5 * (p.square().sum(1) - q.square().sum(1))
        chance = change.nan_to_num(-math.inf, math.inf, -math.inf).clamp_max(0.0).exp()
        state = state.where(torch.rand_like(chance) < chance, proposed)
        if iteration < STEPS // 3:
            size *= math.exp(2.0 * (float(chance[:own].mean()) - 0.75))
        if iteration in (STEPS - 11, STEPS - 6, STEPS - 1):
            ends.append(state.u)
    return state, ends


def _quenched(many: Function, state: _State, scale: Tensor, own: int) -> _State:
    """Chains that begin elsewhere first go downhill, each with a step of its own; the others stay."""
    step = torch.full((len(state.u), 1), 0.5 * state.u.shape[1] ** -0.25, dtype=state.u.dtype)
    free = torch.arange(len(state.u)) >= own
    for _ in range(QUENCH):
        proposed, _ = _leapfrog(many, state, torch.zeros_like(state.u), scale, step, 3)
        lower = (proposed.value < state.value) & free
        lost = ~state.value.isfinite() & proposed.value.isfinite() & free
        state = state.where(lower | lost, proposed)
        step = torch.where((lower | lost)[:, None], 1.3 * step, 0.3 * step)
    return state


def _places(
    density: Unconstrained,
    points: Tensor,
    own: Tensor,
    state: _State,
    count: int,
    relabel: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None,
    names: list[str],
) -> tuple[int, float, str]:
    """How many chains that began elsewhere ended outside of the fit's mass at a comparable density."""
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
    rows = [density.values(point) for point in u]
    values = {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(density.sites)}
    return _points(density, {**values, **relabel(values)})


def _names(density: Unconstrained) -> list[str]:
    found = []
    for name, shape in density.sites.items():
        found += [name + (str(list(index)) if index else "") for index in np.ndindex(tuple(shape))]
    return found


def _array(value: Tensor) -> np.ndarray:
    return value.detach().double().cpu().numpy()
