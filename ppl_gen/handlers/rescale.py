"""The data plate rescaled: what a minibatch stands for."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from pyro.poutine.messenger import Messenger

__all__ = ["RescalePlate", "Weigh"]


class RescalePlate(Messenger):
    """Multiplies the scale of every site inside the data plate by N / (rows of the whole plate as the program saw it).

    Unbiased for the full-data loss with local and global latents, guide sites, nested plates, masks and enumeration.
    """

    def __init__(self, plate: str | None, total: int | None) -> None:
        super().__init__()
        self.plate, self.total = plate, total

    def _pyro_sample(self, msg: Any) -> None:
        if self.plate is None or self.total is None:
            return
        for frame in msg["cond_indep_stack"]:
            if frame.name == self.plate:
                full = frame.full_size or frame.size
                if full != self.total:
                    msg["scale"] = msg["scale"] * (self.total / full)


class Weigh(Messenger):
    """Multiplies the scale of the latent sites ``names``, or of all where it is None."""

    def __init__(self, names: Collection[str] | None, factor: float) -> None:
        super().__init__()
        self.names, self.factor = names, factor

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and (self.names is None or msg["name"] in self.names):
            msg["scale"] = msg["scale"] * self.factor
