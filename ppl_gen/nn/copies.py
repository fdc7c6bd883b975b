"""Copies of networks that users pass."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ppl_gen.errors import PROGRAM_ERRORS

__all__ = ["computed_anew", "originals", "own_copy", "plain_copy"]

Network = TypeVar("Network", bound=nn.Module)
_ORIGINALS: WeakKeyDictionary[nn.Module, ref[nn.Module]] = WeakKeyDictionary()  # of the copies made below


def computed_anew(*networks: nn.Module) -> dict[int, Any]:
    """For `copy.deepcopy`: weights that the older norms of torch leave behind at each call, without their history.

    They belong to no graph of the copy, whose next call computes its own.

    >>> import torch
    >>> net = torch.nn.utils.spectral_norm(nn.Linear(2, 1))
    >>> _ = net(torch.ones(1, 2))
    >>> copy.deepcopy(net, computed_anew(net))(torch.ones(1, 2)).shape
    torch.Size([1, 1])
    """
    memo: dict[int, Any] = {}
    for network in networks:
        for part in network.modules():
            for hook in part._forward_pre_hooks.values():
                held = vars(part).get(hook.name) if isinstance(hook, SpectralNorm | WeightNorm) else None
                if isinstance(held, Tensor):
                    memo[id(held)] = held.detach().clone()
    return memo


def plain_copy(network: Network) -> Network:
    """A deep copy of a network, whose older norms (`computed_anew`) are no hindrance."""
    return copy.deepcopy(network, computed_anew(network))


def own_copy(name: str, network: Network) -> Network:
    """A copy that may be trained while the network stays as it is; no layer of it works in place.

    A first layer that does so would change the rows that it reads, which are those of the user.

    Raises:
        ValueError: naming the argument, for a network that cannot be copied.
    """
    try:
        own = plain_copy(network)
    except PROGRAM_ERRORS as error:
        raise ValueError(
            f"{name}: this {type(network).__name__} cannot be copied: {str(error).splitlines()[0]} A tensor that it "
            "keeps from its last call is in the way: pass it as it was made"
        ) from error
    hasty: list[Any] = [part for part in own.modules() if getattr(part, "inplace", False) is True]
    for part in hasty:
        part.inplace = False
    _ORIGINALS[own] = ref(network)
    return own


def originals(network: nn.Module) -> Iterator[nn.Module]:
    """What parts of a network were copied from, where that is still there: networks that users passed.

    >>> passed = nn.Linear(2, 1)
    >>> list(originals(nn.Sequential(own_copy("network", passed)))) == [passed]
    True
    """
    for part in network.modules():
        kept = _ORIGINALS.get(part)
        if kept is not None and (found := kept()) is not None:
            yield found
