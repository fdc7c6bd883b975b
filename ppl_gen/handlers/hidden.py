"""Latent sites taken out of sight, or out from under a mask."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to

__all__ = ["Hidden", "Unmasked", "plausible"]


class Unmasked(Messenger):
    """Latent halves of partly observed sites, and sites idle under a mask, unmasked: they follow their prior there.

    Nothing depends on them there, so that integrates to one. Under its mask the site has no density in these rows:
    chains run away, guides learn nonsense, and finite sites count each value once.
    """

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.names = frozenset(names)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.names and not msg["is_observed"]:
            msg["mask"] = None


class Hidden(Messenger):
    """Sites that nothing outside the program sees: no trace, no replay, no density; each takes one fixed value.

    The value lies in the support of the site. It is no draw: a run of the program stays free of randomness here.
    """

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.names = frozenset(names)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.names and not msg["is_observed"]:
            msg["value"], msg["done"], msg["stop"] = plausible(msg["fn"]), True, True


def plausible(fn: Any) -> Tensor:
    """A value inside the support of ``fn``, in its shape."""
    if getattr(fn.support, "is_discrete", False):
        if fn.has_enumerate_support:
            first: Tensor = fn.enumerate_support(expand=True)[0]
            return first
        # Counts without a bound: nothing may be drawn here, as many draws of the rest go through the program at once.
        least = getattr(getattr(fn.support, "base_constraint", fn.support), "lower_bound", 0)
        return torch.zeros(fn.shape()) + least
    transform = biject_to(fn.support)
    value: Tensor = transform(torch.zeros(transform.inverse_shape(fn.shape())))
    return value.expand(fn.shape())
