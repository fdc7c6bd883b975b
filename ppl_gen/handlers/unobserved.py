"""A program without its observations, and with the sites that merely name a value left as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro.poutine.uncondition_messenger import UnconditionMessenger

from ppl_gen.handlers.sites import is_deterministic

__all__ = ["unobserved"]


class _Unobserved(UnconditionMessenger):
    """Pyro's own draws deterministic sites again, by which their plates are added to their shape once more."""

    def _pyro_sample(self, msg: Any) -> None:
        if not is_deterministic(msg):
            super()._pyro_sample(msg)


def unobserved(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model with its observed sites drawn instead.

    >>> import pyro, torch, pyro.distributions as dist
    >>> def model():
    ...     with pyro.plate("data", 3):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         return pyro.deterministic("twice", 2 * z)
    >>> unobserved(model)().shape, pyro.poutine.uncondition(model)().shape
    (torch.Size([3]), torch.Size([3, 3]))
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        with _Unobserved():
            return model(*args, **kwargs)

    return run
