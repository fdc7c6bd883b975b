"""Particles of the latent sites of rows, in a plate of their own."""

from __future__ import annotations

from typing import Any

from pyro.poutine.plate_messenger import PlateMessenger

from ppl_gen.handlers.sites import in_plate

__all__ = ["LocalParticles"]


class LocalParticles(PlateMessenger):
    """A plate of particles left of all others, around those sites only that stand inside the data plate.

    There batch shapes become particles x plates, ``nesting`` dims of plates in all.
    """

    def __init__(self, count: int, data_plate: str, nesting: int) -> None:
        super().__init__("_particles", count, dim=-1 - nesting)
        self.data_plate = data_plate

    def _process_message(self, msg: Any) -> None:
        if in_plate(msg, self.data_plate):
            super()._process_message(msg)
