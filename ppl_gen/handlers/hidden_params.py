"""Parameters that a program uses and keeps from inference: what `poutine.block` hides, gradients do not move."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from pyro.params.param_store import ParamStoreDict
from pyro.poutine.messenger import Messenger
from torch import Tensor

__all__ = ["hidden_parameters"]


class _Seen(Messenger):
    """The parameters whose statements reach the caller, as Pyro's own SVI counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def _pyro_post_param(self, msg: Any) -> None:
        self.names.add(msg["name"])


@contextlib.contextmanager
def hidden_parameters(known: set[str]) -> Iterator[None]:
    """Add to ``known`` the parameters that are read inside and that no handler outside of the calls hears of.

    `pyro.infer.SVI` moves the parameters that it sees; ``with poutine.block(hide_types=["param"])`` keeps what was
    learned before. A parameter that is not read at all, of a branch that was not taken say, is not hidden.

    >>> import pyro, torch
    >>> with pyro.get_param_store().scope():
    ...     found = set()
    ...     with hidden_parameters(found), pyro.poutine.block(hide_types=["param"]):
    ...         _ = pyro.param("kept", torch.zeros(2))
    >>> found
    {'kept'}
    """
    read: set[str] = set()
    plain = ParamStoreDict.__getitem__

    def noting(store: ParamStoreDict, name: str) -> Tensor:
        read.add(name)
        return plain(store, name)

    # Handlers that hide a statement hide it from ours too: only the store hears of all.
    ParamStoreDict.__getitem__ = noting
    try:
        with _Seen() as seen:
            yield
    finally:
        ParamStoreDict.__getitem__ = plain
    known |= read - seen.names
