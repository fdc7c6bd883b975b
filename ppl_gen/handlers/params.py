"""The values that `pyro.param` starts from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

__all__ = ["InitialValues", "OwnInitialValues"]


class InitialValues(Messenger):
    """Collects the tensors that `pyro.param` starts from: they are learned, so their values do not matter."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def _pyro_param(self, msg: Any) -> None:
        self.found += msg["args"][1:2]


class OwnInitialValues(Messenger):
    """`pyro.param` keeps the very tensor it was given; copy it, so that training does not write into a closure."""

    def __init__(self, own: Callable[[nn.Parameter], None], place: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.own, self.place = own, place

    def _pyro_param(self, msg: Any) -> None:
        if len(msg["args"]) < 2:
            return
        name, value, *rest = msg["args"]
        if isinstance(value, nn.Parameter):
            self.own(value)  # a module holds it, perhaps: the object has to stay the same
        elif isinstance(value, Tensor):
            msg["args"] = (name, self.place(value), *rest)
        elif callable(value):
            msg["args"] = (name, lambda: self.place(value()), *rest)
