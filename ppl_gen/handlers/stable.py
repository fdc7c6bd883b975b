"""Pyro's stable distributions under `torch.vmap`: their transforms write through ``.data`` and look at values.

Many draws at once is how rows get their own latents and how draws are weighed. Inside `torch.vmap`, where Pyro's
versions raise, these take their place; everywhere else Pyro's own run. Both give the same numbers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import stable as transforms
from pyro.infer.reparam import stable as reparam
from torch import Tensor

__all__ = ["batched_stable"]

_SHIFT_RADIUS = 0.005  # of stabilities around 1 that Pyro's `_safe_shift` interpolates across


@contextlib.contextmanager
def batched_stable() -> Iterator[None]:
    """Inside, `Stable` can be drawn and reparameterised under `torch.vmap`.

    >>> import torch, pyro.distributions as dist
    >>> with batched_stable():
    ...     draws = torch.vmap(lambda a: dist.Stable(a, 0.0 * a).rsample(), randomness="different")
    ...     draws(torch.tensor([1.2, 1.5, 1.8])).shape
    torch.Size([3])
    """
    with contextlib.ExitStack() as stack:
        for owner, name, ours in _REPLACED:
            theirs = getattr(owner, name)
            setattr(owner, name, _either(theirs, ours))
            stack.callback(setattr, owner, name, theirs)
        yield


def _either(theirs: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        inside = torch._C._functorch.maybe_current_level() is not None
        return (ours if inside else theirs)(*args, **kwargs)

    return call


def _unsafe_standard(alpha: Tensor, beta: Any, v: Tensor, w: Tensor, coords: str) -> Tensor:
    """Chambers-Mallows-Stuck, away from a stability of 1."""
    eps, half_pi = torch.finfo(v.dtype).eps, math.pi / 2
    v = v.clamp(min=2 * eps - half_pi, max=half_pi - 2 * eps)
    ha, inverse = half_pi * alpha, alpha.reciprocal()
    b = beta * ha.tan()
    angle = b.atan() - ha + alpha * (v + half_pi)
    base = ((1 + b * b).rsqrt() * v.cos()).pow(inverse)
    z = angle.sin() / base * ((angle - v).cos().clamp(min=eps) / w).pow(inverse - 1)
    z = torch.where(z.isnan(), torch.zeros_like(z), z)
    return z - b if coords == "S0" else z


def _standard(alpha: Tensor, beta: Any, uniform: Tensor, exponential: Tensor, coords: str) -> Tensor:
    if not _any((alpha - 1).abs() <= transforms.RADIUS):
        return _unsafe_standard(alpha, beta, uniform, exponential, coords)
    if coords == "S":  # discontinuous at a stability of 1
        z = _standard(alpha, beta, uniform, exponential, "S0")
        return torch.where(alpha == 1, z, z + beta * (math.pi / 2 * alpha).tan())
    ends = _around_one(alpha, transforms.RADIUS)
    return sum((_unsafe_standard(a, beta, uniform, exponential, coords) * weight for a, weight in ends), alpha * 0)


def _safe_shift(alpha: Tensor, skew: Tensor, t_scale: Tensor, skew_abs: Tensor) -> Tensor:
    if not _any((alpha - 1).abs() <= _SHIFT_RADIUS):
        return _shift(alpha, skew, t_scale)
    ends = _around_one(alpha, _SHIFT_RADIUS)
    return sum((_shift(a, skew, skew_abs.pow(a.reciprocal())) * weight for a, weight in ends), alpha * 0)


def _shift(alpha: Tensor, skew: Tensor, t_scale: Tensor) -> Tensor:
    return (skew.sign() * t_scale - skew) * (math.pi / 2 * alpha).tan()


def _around_one(alpha: Tensor, radius: float) -> list[tuple[Tensor, Tensor]]:
    """Both ends of the interval around 1 and their weights in it; outside, the stability itself, twice by half.

    Gradients reach the stability as if nothing had been moved, as with Pyro's.
    """
    near, ends = (alpha - 1).abs() <= radius, []
    for end in (1 - radius, 1 + radius):
        moved = torch.where(near, torch.full_like(alpha, end), alpha).detach()
        weight = torch.where(near, 1 - (moved - alpha.detach()).abs() / (2 * radius), torch.full_like(alpha, 0.5))
        ends.append((alpha + (moved - alpha.detach()), weight))
    return ends


def _any(chosen: Tensor) -> bool:
    """Whether some are true; where that differs between the draws that are under way at once, it may be."""
    try:
        return bool(chosen.any())
    except RuntimeError:
        return True


def _symmetric(self: Any, msg: Any) -> dict[str, Any]:
    """`SymmetricStableReparam.apply` without its assertion and its checks, which were made as draws went alone."""
    name, (fn, event_dim) = msg["name"], self._unwrap(msg["fn"])
    a = fn.stability
    half_pi = a.new_tensor(math.pi / 2)
    uniform = dist.Uniform(-half_pi, half_pi).expand(a.shape)
    u = pyro.sample(f"{name}_uniform", self._wrap(uniform, event_dim))
    e = pyro.sample(f"{name}_exponential", self._wrap(dist.Exponential(a.new_ones(a.shape)), event_dim))
    z = _unsafe_standard(a / 2, 1, u, e, coords="S")
    scale = fn.scale * (math.pi / 4 * a).cos().pow(a.reciprocal()) * z.sqrt()
    normal = dist.Normal(fn.loc, scale.clamp(min=torch.finfo(scale.dtype).tiny) * 2**0.5)
    return {"fn": self._wrap(normal, event_dim), "value": msg["value"], "is_observed": msg["is_observed"]}


_REPLACED: list[tuple[Any, str, Callable[..., Any]]] = [
    (transforms, "_unsafe_standard_stable", _unsafe_standard),
    (transforms, "_standard_stable", _standard),
    (reparam, "_unsafe_standard_stable", _unsafe_standard),
    (reparam, "_standard_stable", _standard),
    (reparam, "_safe_shift", _safe_shift),
    (reparam.SymmetricStableReparam, "apply", _symmetric),
]
