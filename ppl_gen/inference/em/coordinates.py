"""Unconstrained coordinates of global sites, and parameters that are affine in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributions as td
from torch.distributions import Transform

__all__ = ["Affine", "Coordinates", "elementwise", "unwrapped"]


class Coordinates:
    """Unconstrained coordinates of the sites whose entries move independently of each other, as one vector."""

    def __init__(self, transforms: Mapping[str, Transform], values: Mapping[str, Tensor]) -> None:
        self.transforms = {n: t for n, t in transforms.items() if elementwise(t) and values[n].is_floating_point()}
        self.shapes = {name: values[name].shape for name in self.transforms}
        self.slices: dict[str, slice] = {}
        start = 0
        for name, shape in self.shapes.items():
            self.slices[name] = slice(start, start + shape.numel())
            start += shape.numel()
        self.size = start

    def vector(self, values: Mapping[str, Tensor]) -> Tensor:
        """All coordinates of the sites at ``values``, flattened and joined."""
        parts = [t.inv(values[name]).reshape(-1) for name, t in self.transforms.items()]
        return torch.cat(parts) if parts else torch.zeros(0)

    def values(self, vector: Tensor) -> dict[str, Tensor]:
        """The inverse of `vector`: the sites in their own shapes."""
        return {
            name: transform(vector[self.slices[name]].reshape(self.shapes[name]))
            for name, transform in self.transforms.items()
        }


def unwrapped(transform: Transform) -> Transform:
    """Without the dims that are only declared to belong to the event."""
    while isinstance(transform, td.transforms.IndependentTransform):
        transform = transform.base_transform
    return transform


def elementwise(transform: Transform) -> bool:
    return unwrapped(transform).domain.event_dim == 0


@dataclass(frozen=True, eq=False)
class Affine:
    """A parameter that is ``constant + columns @ coordinates[which]``, flattened; ``shape`` is its own.

    ``constant``: positions; ``which``: numbers of coordinates in the whole vector; ``columns``: positions x these.
    """

    shape: torch.Size
    constant: Tensor
    which: Tensor
    columns: Tensor

    def at(self, vector: Tensor) -> Tensor:
        """The parameter in its own shape, at a vector of all coordinates."""
        if not len(self.which):
            return self.constant.reshape(self.shape)
        return (self.constant + self.columns @ vector[self.which]).reshape(self.shape)

    def column(self, units: slice) -> tuple[Tensor, Tensor]:
        """Positions x coordinates: the columns of those in ``units``; and the numbers of these within it."""
        inside = (self.which >= units.start) & (self.which < units.stop)
        return self.columns[:, inside], self.which[inside] - units.start
