"""Sample statements read as another kind of site: names of values, and vectors as one draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pyro.poutine.messenger import Messenger

__all__ = ["AsEvents", "Restated"]


class Restated(Messenger):
    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = frozenset(names)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.names:
            msg["infer"]["_deterministic"] = True


class AsEvents(Messenger):
    def __init__(self, dims: Mapping[str, int]) -> None:
        super().__init__()
        self.dims = dims

    def _pyro_sample(self, msg: Any) -> None:
        dims = self.dims.get(msg["name"])
        if dims is not None and len(msg["fn"].batch_shape) >= dims:
            msg["fn"] = msg["fn"].to_event(dims)
