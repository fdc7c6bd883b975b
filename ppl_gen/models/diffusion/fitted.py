"""The chain behind a fit, for questions that only a diffusion model answers."""

from __future__ import annotations

from typing import Any

from ppl_gen.errors import IncompatibleError
from ppl_gen.fits.result import Fit, require_fit

__all__ = ["chain_of"]


def chain_of(fit: Fit, kinds: type | tuple[type, ...], asked: str, models: str) -> Any:
    """The chain that a fit's model is a method of; ask it inside ``fit.bound()``.

    Raises:
        TypeError: for what is no fit.
        IncompatibleError: for a fit of another program than the ``models`` named.
    """
    require_fit(fit)
    owner = getattr(fit.program.model, "__self__", None)
    if not isinstance(owner, kinds):
        raise IncompatibleError(f"{asked} needs a fit of {models}, got one of {fit.program.name!r}")
    return owner
