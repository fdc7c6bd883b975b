"""Where the draws of latent sites lead: marks and gradients that their consequences bear, and a look at them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from pyro.ops.provenance import ProvenanceTensor, detach_provenance
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Followed", "Leaves", "ShapesKept", "Watch"]


class ShapesKept(TorchFunctionMode):
    """Context in which draws have their shapes though the parameters of their distributions bear marks.

    Pyro's marks turn shapes into tuples, and ``x.new((3,))`` is the number 3 to torch, ``x.new(())`` no number at all.
    Exponential, Cauchy, Laplace, Geometric, Multinomial and what is made of them draw by ``new``: where AutoGaussian
    and AutoStructured ask what depends on what, they would draw other shapes, or nothing.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.new and len(args) == 2 and isinstance(args[1], torch.Size):
            return args[0].new_empty(args[1])
        return func(*args, **(kwargs or {}))


class Followed(Messenger):
    """Marks the value of each latent site by its name; what is computed from it bears the mark."""

    def __enter__(self) -> Any:
        self._shapes = ShapesKept()
        self._shapes.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        self._shapes.__exit__(*error)
        return super().__exit__(*error)

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
