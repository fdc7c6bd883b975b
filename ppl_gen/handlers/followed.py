"""Where the draws of latent sites lead: marks and gradients that their consequences bear, and a look at them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from pyro.ops.provenance import ProvenanceTensor, detach_provenance
from pyro.poutine.messenger import Messenger
from torch import Tensor

__all__ = ["Followed", "Leaves", "Watch"]


class Followed(Messenger):
    """Marks the value of each latent site by its name; what is computed from it bears the mark."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and isinstance(msg["value"], Tensor):
            msg["value"] = ProvenanceTensor(detach_provenance(msg["value"]), frozenset({msg["name"]}))


class Leaves(Messenger):
    """Makes each draw of a latent site that needs no gradient yet one that asks for it."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.names, self.made = set(names), list[Tensor]()

    def _pyro_post_sample(self, msg: Any) -> None:
        value = msg["value"]
        if msg["name"] in self.names and value.is_floating_point() and not value.requires_grad:
            leaf = value.detach().requires_grad_()
            self.made.append(leaf)
            msg["value"] = leaf.clone()  # a program may write into its draws, and torch not into leaves


class Watch(Messenger):
    def __init__(self, names: list[str], see: Callable[[Any], None]) -> None:
        super().__init__()
        self._names, self._see = names, see

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self._names and msg["type"] == "sample":
            self._see(msg)
