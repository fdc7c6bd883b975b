r"""Limited-memory BFGS, one iteration at a time: a path is a value that can be kept, and gone on with to the same bits.

.. math:: u_{t+1} = u_t - \lambda_t H_t \nabla U(u_t)

H_t is the inverse Hessian that the last pairs of steps and changes of slope imply, and lambda_t satisfies the weak
Wolfe conditions, found by bisection (Nocedal and Wright 2006, sections 3.1 and 7.2; Lewis and Overton 2013).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

__all__ = ["Path", "advanced", "begun", "implied_direction"]

#: U(u) and its slope, detached.
Potential = Callable[[Tensor], tuple[Tensor, ...]]

_ARMIJO, _CURVATURE = 1e-4, 0.9
_TRIES = 40  # bisections: a millionth of a millionth of the first length
_ROUNDING = 8  # units in the last place of the potential: smaller falls cannot be told from none


@dataclass(frozen=True)
class Path:
    """Where a minimisation stands: the point, the potential and slope there, and the pairs it remembers.

    ``steps`` and ``slopes`` are pairs x size, oldest first: s = u' - u and y = slope' - slope, with s'y > 0. ``gap`` is
    the fall that a last step would bring, g'Hg / 2 in nats, 0 where rounding hides it; ``stuck``: no step lowers U.
    """

    u: Tensor
    value: Tensor
    slope: Tensor
    steps: Tensor
    slopes: Tensor
    gap: float = float("inf")
    stuck: bool = False
    evaluations: int = 1

    def state_dict(self) -> dict[str, Any]:
        """All of it, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Path:
        """The inverse of `state_dict`."""
        kept: dict[str, Any] = {field.name: saved[field.name] for field in fields(cls)}
        kept |= {name: value.clone() for name, value in kept.items() if isinstance(value, Tensor)}
        return cls(**kept)


def begun(potential: Potential, u: Tensor) -> Path:
    """The path at its first point.

    >>> path = begun(lambda u: (u @ u / 2, u), torch.ones(2))
    >>> float(path.value), path.steps.shape
    (1.0, torch.Size([0, 2]))
    """
    value, slope = _at(potential, u)
    none = u.new_zeros(0, len(u))
    return Path(u, value, slope, none, none)


def advanced(potential: Potential, path: Path, memory: int) -> Path:
    """The path after one iteration; the same point, ``stuck``, where no step along the direction lowers the potential.

    >>> path = begun(lambda u: (u @ u / 2, u), torch.ones(2))
    >>> path = advanced(lambda u: (u @ u / 2, u), path, memory=5)
    >>> float(path.value) < 1.0, path.steps.shape
    (True, torch.Size([1, 2]))
    """
    if path.stuck:
        return path
    first = not len(path.steps)
    direction = -implied_direction(path)
    length = min(1.0, 1.0 / float(path.slope.abs().sum().clamp(min=1e-300))) if first else 1.0
    found, evaluations = _searched(potential, path, direction, length)
    evaluations += path.evaluations
    if found is None:
        if first:
            return _with(path, stuck=True, evaluations=evaluations)
        empty = path.steps[:0]  # what is remembered may be of another region: once more, downhill
        return _with(path, steps=empty, slopes=empty, evaluations=evaluations)
    u, value, slope = found
    step, change = u - path.u, slope - path.slope
    steps, slopes = path.steps, path.slopes
    seen = max(_noise(value), torch.finfo(u.dtype).eps * float(change @ change))
    if float(step @ change) > seen:  # the curvature of a smaller step is one of rounding
        # Copies: a product rounds otherwise where its numbers begin elsewhere in memory, and a path that was kept and
        # read again has to go on to the same bits.
        steps = torch.cat([steps, step[None]])[-memory:].clone()
        slopes = torch.cat([slopes, change[None]])[-memory:].clone()
    after = Path(u, value, slope, steps, slopes, evaluations=evaluations)
    gap = 0.5 * float(slope @ implied_direction(after))
    return _with(after, gap=0.0 if gap <= _noise(value) else gap)


def implied_direction(path: Path) -> Tensor:
    """H g by the two loops over the remembered pairs; g itself where there are none.

    >>> path = begun(lambda u: (u @ u / 2, u), torch.ones(2))
    >>> implied_direction(path)
    tensor([1., 1.])
    """
    direction = path.slope.clone()
    if not len(path.steps):
        return direction
    shares = []
    for s, y in zip(path.steps.flip(0), path.slopes.flip(0), strict=True):
        share = (s @ direction) / (s @ y)
        direction = direction - share * y
        shares.append(share)
    s, y = path.steps[-1], path.slopes[-1]
    direction = direction * ((s @ y) / (y @ y))
    for s, y, share in zip(path.steps, path.slopes, reversed(shares), strict=True):
        direction = direction + (share - (y @ direction) / (s @ y)) * s
    return direction


def _with(path: Path, **changes: Any) -> Path:
    return Path(**{**path.state_dict(), **changes})


def _at(potential: Potential, u: Tensor) -> tuple[Tensor, Tensor]:
    value, slope = potential(u)
    return value, slope


def _noise(value: Tensor) -> float:
    return _ROUNDING * torch.finfo(value.dtype).eps * max(1.0, abs(float(value)))


def _searched(
    potential: Potential, path: Path, direction: Tensor, length: float
) -> tuple[tuple[Tensor, Tensor, Tensor] | None, int]:
    """A point along the direction that satisfies both conditions, or the lowest found; None where none is lower."""
    fall = float(path.slope @ direction)
    if not fall < 0:
        return None, 0
    low, high = 0.0, float("inf")
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for tried in range(1, _TRIES + 1):
        u = path.u + length * direction
        value, slope = _at(potential, u)
        rise = float(value - path.value)
        # Beyond the last digits a fall cannot be seen, and the slope alone says whether the step is a good one.
        enough = rise <= _ARMIJO * length * fall + _noise(path.value) and bool(slope.isfinite().all())
        if enough and (best is None or float(value) < float(best[1])):
            best = (u, value, slope)
        if not enough:
            high = length
        elif float(slope @ direction) < _CURVATURE * fall:
            low = length
        else:
            return (u, value, slope), tried
        length = 2.0 * length if high == float("inf") else 0.5 * (low + high)
    return best, _TRIES
