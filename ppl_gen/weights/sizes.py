"""How much memory one run of a program takes at most at a time, by which many runs at once are cut into parts."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Largest", "is_view"]


class Largest(TorchDispatchMode):
    """``numbers`` of the largest tensor that was made inside; views of others take no memory.

    >>> import torch
    >>> with Largest() as largest:
    ...     found = (torch.zeros(10).expand(500, 10).sum(0) + torch.zeros(20, 1)).sum()
    >>> largest.numbers
    200
    """

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 1

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True would import the compiler to switch it off

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not is_view(func):
            made = (leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
            self.numbers = max(self.numbers, *made, 1)
        return result


def is_view(operation: Any) -> bool:
    """Whether what an operation gives shares the memory of what it was given, and nothing is written."""
    aliases = (returned.alias_info for returned in operation._schema.returns)
    return any(alias is not None and not alias.is_write for alias in aliases)
