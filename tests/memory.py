"""How much memory a computation takes at once, by the tensors that it makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Largest"]


class Largest(TorchDispatchMode):
    """Within it, ``numbers`` is how many the largest tensor holds that an operation has put out so far."""

    numbers = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        held = [
            value.untyped_storage().nbytes() // value.element_size()
            for value in tree_leaves(made)
            if isinstance(value, Tensor)
        ]
        self.numbers = max(self.numbers, *held, 0)
        return made
