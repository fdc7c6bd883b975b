"""Given values held against the support of their site."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyro.poutine.messenger import Messenger

__all__ = ["GivenOutsideError", "InSupport"]


class GivenOutsideError(Exception):
    """Not a ValueError on its way: Pyro's tracer would append a table of shapes to that."""


class InSupport(Messenger):
    """Refuses given values outside of the support of their site, before anything is computed from them."""

    def __init__(self, distributions: Mapping[str, str]) -> None:
        super().__init__()
        self.distributions = distributions

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] not in self.distributions:
            return
        try:
            inside = msg["fn"].support.check(msg["value"])
        except (NotImplementedError, AttributeError):  # distributions that do not say
            return
        if not bool(inside.all()):
            raise GivenOutsideError(
                f"given: {msg['name']!r}: got a value outside of the support of its "
                f"{self.distributions[msg['name']]}, {msg['fn'].support}"
            )

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        super().__exit__(kind, error, traceback)
        if isinstance(error, GivenOutsideError):
            raise ValueError(str(error)) from None
