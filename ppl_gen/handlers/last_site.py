"""Which site a program had reached when it failed: errors of torch name tensors, and not the statement beside them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from pyro.poutine.messenger import Messenger

from ppl_gen.errors import IncompatibleError
from ppl_gen.handlers.sites import is_subsample

__all__ = ["LastSite", "UndrawableError", "drawing"]


class UndrawableError(IncompatibleError):
    """A question needs draws of a site whose distribution has none."""


class LastSite(Messenger):
    """Remembers the sample statement that was reached last, and whether it was left again.

    >>> import torch, pyro, pyro.distributions as dist
    >>> def model():
    ...     z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    ...     pyro.sample("x", dist.Normal(z @ torch.ones(3), 1.0))
    >>> with LastSite() as last:
    ...     try:
    ...         model()
    ...     except RuntimeError:
    ...         pass
    >>> last.where
    "after site 'z', before the next"
    """

    def __init__(self) -> None:
        super().__init__()
        self.where = "before the first site"

    def _pyro_sample(self, msg: Any) -> None:
        if not is_subsample(msg):
            self.where = f"at site {msg['name']!r}"

    def _pyro_post_sample(self, msg: Any) -> None:
        if not is_subsample(msg):
            self.where = f"after site {msg['name']!r}, before the next"

    def said(self, error: BaseException) -> str:
        """Where ``error`` was raised, unless it says so; nothing where the program had come to its end."""
        if "at site '" in str(error) or "sites named" in str(error) or _of_a_check(error.__traceback__):
            return ""
        return self.where


@contextlib.contextmanager
def drawing(program: str) -> Iterator[None]:
    """Runs of a program that draw: a distribution that gives densities only is refused by the name of its site."""
    with LastSite() as last:
        try:
            yield
        except NotImplementedError as error:
            text = (str(error).strip() or "it has no sample method").splitlines()[0]
            raise UndrawableError(
                f"{program!r} {last.where}: its distribution gives densities, and no draws ({text}); questions that "
                "draw new values of this site cannot be answered"
            ) from error


def _of_a_check(traceback: TracebackType | None) -> bool:
    """Whether an error comes from looking at a finished trace, when the last site is not the one at fault."""
    while traceback is not None:
        if traceback.tb_frame.f_code.co_name == "check_densities":
            return True
        traceback = traceback.tb_next
    return False
