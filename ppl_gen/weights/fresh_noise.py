"""Random numbers under `torch.vmap`, which refuses to write them into a tensor that all runs share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["FreshNoise"]


class FreshNoise(TorchFunctionMode):
    """Noise written into an empty tensor is made as a new one.

    Pyro says ``requires_grad_()`` of every parameter that it hands out, which `torch.vmap` refuses too: nothing happens
    then, unless ``learning`` and the tensor has no gradient yet.

    >>> with FreshNoise():
    ...     draw = torch.vmap(lambda _: torch.empty(2).exponential_(), randomness="different")
    ...     draw(torch.zeros(3)).shape
    torch.Size([3, 2])
    """

    def __init__(self, *, learning: bool = False) -> None:
        super().__init__()
        self.learning = learning

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "requires_grad_" and (not self.learning or args[0].requires_grad):
            return args[0]
        if name not in ("normal_", "exponential_", "cauchy_", "uniform_"):
            return func(*args, **kwargs)
        like, rest = args[0], [*args[1:], *(v for k, v in kwargs.items() if k != "generator")]
        options = {"dtype": like.dtype, "device": like.device}
        if name == "normal_":
            mean, std = rest or (0.0, 1.0)
            return mean + std * torch.randn(like.shape, **options)
        u = torch.rand(like.shape, **options)
        if name == "uniform_":
            low, high = rest or (0.0, 1.0)
            return low + (high - low) * u
        if name == "exponential_":
            return -torch.log1p(-u) / (rest[0] if rest else 1.0)
        loc, scale = rest or (0.0, 1.0)
        return loc + scale * torch.tan(math.pi * (u - 0.5))
