"""Copies of networks that users pass."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

from ppl_gen.errors import PROGRAM_ERRORS

__all__ = ["own_copy"]

Network = TypeVar("Network", bound=nn.Module)


def own_copy(name: str, network: Network) -> Network:
    """A copy that may be trained while the network stays as it is; no layer of it works in place.

    A first layer that does so would change the rows that it reads, which are those of the user.

    Raises:
        ValueError: naming the argument, for a network that cannot be copied.
    """
    try:
        own = copy.deepcopy(network)
    except PROGRAM_ERRORS as error:
        raise ValueError(
            f"{name}: this {type(network).__name__} cannot be copied: {str(error).splitlines()[0]} A tensor that it "
            "keeps from its last call is in the way: pass it as it was made, and take "
            "torch.nn.utils.parametrizations.weight_norm for the older torch.nn.utils.weight_norm"
        ) from error
    hasty: list[Any] = [part for part in own.modules() if getattr(part, "inplace", False) is True]
    for part in hasty:
        part.inplace = False
    return own
