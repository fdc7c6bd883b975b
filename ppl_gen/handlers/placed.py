"""Latent sites placed at points without constraints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to

from ppl_gen.handlers.sites import is_subsample

__all__ = ["Lifted", "Placed"]


class Placed(Messenger):
    """Continuous latent sites at T(u), summing log |det dT/du|; discrete ones at one value of their support."""

    def __init__(self, parts: Mapping[str, Tensor], state: int = 0) -> None:
        super().__init__()
        self.parts, self.state = parts, state
        self.values: dict[str, Tensor] = {}
        self.log_det: Tensor | float = 0.0

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or is_subsample(msg):
            return
        name, fn = msg["name"], msg["fn"]
        if name in self.parts:
            transform, part = biject_to(fn.support), self.parts[name]
            value = self.values[name] = transform(part)
            self.log_det = self.log_det + transform.log_abs_det_jacobian(part, value).sum()
        else:
            value = fn.enumerate_support(expand=True)[self.state]
        msg["value"], msg["done"] = value, True


class Lifted(Messenger):
    """Latent sites at given values z, keeping T^-1(z)."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values
        self.parts: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if name not in self.values or msg["is_observed"]:
            return
        value = self.values[name]
        while value.dim() > len(fn.shape()) and len(value) == 1:  # as a run of vectorised particles leaves it
            value = value[0]
        if value.shape != fn.shape():
            raise ValueError(f"start: site {name!r} has shape {tuple(fn.shape())}, and the value {tuple(value.shape)}")
        self.parts[name] = biject_to(fn.support).inv(value)
        msg["value"], msg["done"] = value, True
