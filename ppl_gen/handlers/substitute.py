"""Values of one's own at latent sites, which stay latent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.infer.autoguide.initialization import init_to_median
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ppl_gen.handlers.sites import is_subsample

__all__ = ["Chosen", "Exchanged", "Median", "Nudged", "Substitute"]


class Substitute(Messenger):
    """Latent sites take the given values and stay latent: their prior terms can be counted or left out."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = True


class Exchanged(Messenger):
    """Latent sites take the given values after they were drawn, so that later draws meet the same random numbers.

    It stands around what traces the program.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"] = self.values[msg["name"]]


class Median(Messenger):
    """Global sites at the median of a few prior draws."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg: dict[str, object]) -> None:
        if msg["name"] in self.names and msg["value"] is None:
            with torch.no_grad():
                msg["value"] = init_to_median(msg)


class Nudged(Messenger):
    """Moves what was observed, all numbers of a row at once, up or down by a share of the sd over rows."""

    def __init__(self, names: list[str], way: int, size: float) -> None:
        super().__init__()
        self._names, self._way, self._size = names, way, size

    def _pyro_sample(self, msg: Any) -> None:
        value = msg["value"]
        if msg["name"] not in self._names or not isinstance(value, Tensor) or not value.is_floating_point():
            return  # a deterministic site counts as observed too
        shape = value.shape[1:]
        signs = torch.randint(2, shape, generator=torch.Generator().manual_seed(self._way)) * 2.0 - 1.0
        scale = value.std(0) if len(value) > 1 else torch.zeros(shape)
        msg["value"] = value + self._size * scale.to(value) * signs.to(value)


class Chosen(Messenger):
    """Latent sites that nothing else gives take ``choose(fn)``, or a draw where that is None."""

    def __init__(self, choose: Callable[[Any], Tensor | None]) -> None:
        super().__init__()
        self.choose = choose

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["done"] or is_subsample(msg):
            return
        value = self.choose(msg["fn"])
        if value is not None:
            msg["value"], msg["done"] = value, True
