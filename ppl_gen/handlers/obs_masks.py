"""Outcomes that `obs_mask` hides: what stands in their place is never read, be it NaN or outside of the support."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import biject_to

__all__ = ["hidden_outcomes_unread"]


@contextlib.contextmanager
def hidden_outcomes_unread() -> Iterator[None]:
    """Inside, ``pyro.sample(..., obs=y, obs_mask=mask)`` has a value of the support wherever ``mask`` is False.

    A mask multiplies a density by zero, and zero times NaN, or times the slope of a log at zero, is NaN. Pyro's own
    statement draws what is hidden at another site, so that nothing reads the value that is put here.

    >>> import pyro.distributions as dist
    >>> y, seen = torch.tensor([1.0, torch.nan]), torch.tensor([True, False])
    >>> with hidden_outcomes_unread(), pyro.plate("data", 2):
    ...     trace = pyro.poutine.trace(lambda: pyro.sample("y", dist.LogNormal(0.0, 1.0), obs=y, obs_mask=seen))
    ...     trace.get_trace().nodes["y_observed"]["value"]
    tensor([1., 1.])
    """
    outer = pyro.primitives._masked_observe

    def observe(name: str, fn: Any, obs: Any, obs_mask: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(obs, Tensor) and isinstance(obs_mask, Tensor) and obs_mask.dtype is torch.bool:
            obs = _filled(fn, obs, obs_mask)
        return outer(name, fn, obs, obs_mask, *args, **kwargs)

    pyro.primitives._masked_observe = observe
    try:
        yield
    finally:
        pyro.primitives._masked_observe = outer


def _filled(fn: Any, obs: Tensor, mask: Tensor) -> Tensor:
    """``obs`` with a value of the support where the mask is False; as it is where the shapes do not fit."""
    seen = mask.reshape(mask.shape + (1,) * fn.event_dim)
    try:
        with torch.no_grad():
            return torch.where(seen, obs, _inside(fn).to(obs))
    except RuntimeError:  # Pyro says what is wrong with the shape of a mask
        return obs


def _inside(fn: Any) -> Tensor:
    """A value of the support, of the shape of one event unless the support is another for each row."""
    try:
        support = fn.support
        if getattr(support, "is_discrete", False) and fn.has_enumerate_support:
            value: Tensor = fn.enumerate_support(expand=False)[0]
        elif getattr(support, "is_discrete", False):
            least = getattr(getattr(support, "base_constraint", support), "lower_bound", 0)
            value = torch.zeros(fn.event_shape) + least
        else:
            transform = _onto(support)
            value = transform(torch.zeros(transform.inverse_shape(fn.shape())))
    except (AttributeError, NotImplementedError):  # a distribution of the user's own
        return torch.zeros(fn.event_shape)
    return value if _varies(support) else value.reshape(-1, *fn.event_shape)[0]


def _onto(support: Any) -> Any:
    try:
        return biject_to(support)
    except NotImplementedError:  # of a mixture, whose components have one
        return biject_to(support.base_constraint)


def _varies(support: Any) -> bool:
    """Whether bounds are tensors, and may differ from row to row."""
    parts = vars(support).values() if hasattr(support, "__dict__") else ()
    return any(isinstance(p, Tensor) or (hasattr(p, "is_discrete") and _varies(p)) for p in parts)
