"""Pyro's flat prior, which has no value for a first run, and what to write instead."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from pyro.distributions import ImproperUniform

from ppl_gen.errors import IncompatibleError

__all__ = ["refuse_undrawable"]


def refuse_undrawable(error: BaseException, traceback: TracebackType | None) -> None:
    """Raise IncompatibleError, with the name of the site, where ``error`` says that `ImproperUniform` has no draws."""
    if not isinstance(error, NotImplementedError) or "ImproperUniform does not support sampling" not in str(error):
        return
    raise IncompatibleError(
        f"at site {_site(traceback)!r}: ImproperUniform has no draws, and a program is first run at draws of its "
        "priors; write ppl_gen.models.improper.Flat(support, event_shape, batch_shape), the same density with a value "
        "to begin at"
    ) from error


def _site(traceback: TracebackType | None) -> str:
    """The site that was being drawn: Pyro's error does not say, and the frames that it came through do."""
    name = "?"
    while traceback is not None:
        msg: Any = traceback.tb_frame.f_locals.get("msg")
        if isinstance(msg, dict) and isinstance(msg.get("fn"), ImproperUniform):
            name = str(msg["name"])
        traceback = traceback.tb_next
    return name
