r"""Maps of `one_way` with weights of their own, which a network of the row may move: theta = weight + change(x)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pyro.nn import ConditionalAutoRegressiveNN
from torch import Tensor, nn

from ppl_gen.nn.one_way import inverse_autoregressive, planar, radial, sylvester

__all__ = ["MAPS", "FlowMap"]

_SMALL = 0.1  # sd of weights at the start: near the identity, and not at it, where some gradients vanish


class FlowMap(nn.Module):
    """A map of vectors: z (... x size) -> z' and the log determinant of its Jacobian at z.

    Args:
        size: of the vectors.
        units: of the kinds that have any.
        number: of the map among those of its flow; orders alternate.
    """

    def __init__(self, size: int, units: int, number: int) -> None:
        super().__init__()

    @property
    def numbers(self) -> int:
        """How many numbers a row may move it by."""
        return sum(value.numel() for value in self.parameters())

    def forward(self, z: Tensor, change: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """With ``change``, ... x `numbers`, each row goes through a map of its own."""
        raise NotImplementedError

    def _moved(self, weights: Sequence[Tensor], change: Tensor | None) -> list[Tensor]:
        if change is None:
            return list(weights)
        parts = change.split([weight.numel() for weight in weights], -1)
        moved = zip(weights, parts, strict=True)
        return [weight + part.reshape((*part.shape[:-1], *weight.shape)) for weight, part in moved]


def _small(*shape: int) -> nn.Parameter:
    return nn.Parameter(_SMALL * torch.randn(shape))


class _Planar(FlowMap):
    def __init__(self, size: int, units: int, number: int) -> None:
        super().__init__(size, units, number)
        weight = torch.randn(size)
        across = math.log(math.expm1(1.0)) * weight / weight.square().sum()  # where w'u, constrained, is zero
        self.weight, self.shift = nn.Parameter(weight), _small()
        self.direction = nn.Parameter(across + _SMALL * torch.randn(size))

    def forward(self, z: Tensor, change: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return planar(z, *self._moved([self.direction, self.weight, self.shift], change))


class _Radial(FlowMap):
    def __init__(self, size: int, units: int, number: int) -> None:
        super().__init__(size, units, number)
        self.centre, self.width = nn.Parameter(torch.randn(size)), _small()
        self.strength = nn.Parameter(torch.tensor(math.log(math.expm1(1.0))))  # beta near zero

    def forward(self, z: Tensor, change: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return radial(z, *self._moved([self.centre, self.width, self.strength], change))


class _Sylvester(FlowMap):
    def __init__(self, size: int, units: int, number: int) -> None:
        super().__init__(size, units, number)
        count = min(size, units)
        self.frame = nn.Parameter(torch.randn(count, size))
        self.outer, self.inner = _small(count, count), nn.Parameter(torch.randn(count, count) / count**0.5)
        self.shift = nn.Parameter(torch.randn(count))

    def forward(self, z: Tensor, change: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return sylvester(z, *self._moved([self.frame, self.outer, self.inner, self.shift], change))


class _Autoregressive(FlowMap):
    """Its network reads the row's numbers beside z, as many as z has; none: zeros."""

    def __init__(self, size: int, units: int, number: int) -> None:
        super().__init__(size, units, number)
        order = torch.arange(size)
        order = order.flip(0) if number % 2 else order
        width = units * size
        self.size = size
        self.network = ConditionalAutoRegressiveNN(size, size, [width], permutation=order, nonlinearity=nn.ELU())
        for value in self.network.layers[-1].parameters():
            nn.init.normal_(value, 0.0, _SMALL / width**0.5)

    @property
    def numbers(self) -> int:
        return self.size

    def forward(self, z: Tensor, change: Tensor | None = None) -> tuple[Tensor, Tensor]:
        context = torch.zeros_like(z) if change is None else change.expand(z.shape)
        return inverse_autoregressive(z, *self.network(z, context))


#: The kinds by name.
MAPS: dict[str, type[FlowMap]] = {
    "planar": _Planar,
    "radial": _Radial,
    "sylvester": _Sylvester,
    "iaf": _Autoregressive,
}
