"""Latent sites of rows placed at points without constraints, row by row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import ImproperUniform
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.transforms import identity_transform

__all__ = ["Place", "RowsInverted", "RowsPlaced", "Somewhere", "Values"]


Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class Place:
    """Where a site's numbers stand: ``shape`` without constraints, ``axis`` of the rows in it, its transform."""

    shape: torch.Size
    axis: int
    plate_dim: int
    batch_shape: torch.Size
    transform: Any
    fixed: bool
    discrete: bool

    @property
    def width(self) -> int:
        """How many numbers each row has."""
        return self.shape.numel() // self.shape[self.axis]

    def flat(self, part: Tensor) -> Tensor:
        """Rows x numbers, of a part in the ``shape`` without constraints."""
        return part.movedim(self.axis, 0).reshape(self.shape[self.axis], -1)

    def whole(self, flat: Tensor) -> Tensor:
        """The inverse of `flat`: of rows x numbers, a part in the ``shape`` without constraints."""
        rest = [size for axis, size in enumerate(self.shape) if axis != self.axis]
        return flat.reshape(self.shape[self.axis], *rest).movedim(0, self.axis)

    def rows(self, log_det: Tensor) -> Tensor:
        """A site's log determinant (of its batch shape) summed over everything but the rows: shape (rows,)."""
        return log_det.expand(self.batch_shape).movedim(self.plate_dim, 0).reshape(self.shape[self.axis], -1).sum(-1)

    def at(self, part: Tensor, transform: Any = None) -> tuple[Tensor, Tensor]:
        """The value at a part in the ``shape`` without constraints, and log |det| of the way there, shape (rows,)."""
        if self.discrete:
            return part, torch.zeros(self.shape[self.axis])
        transform = transform or self.transform
        value = transform(part)
        return value, self.rows(transform.log_abs_det_jacobian(part, value))


class RowsPlaced(Messenger):
    """Sites at T(u) with T read as the program runs, since a bound may depend on another latent site.

    ``parts``: of each site u in the shape of its place; ``log_det``, found on the way, has shape (rows,).
    """

    def __init__(self, parts: Values, places: Mapping[str, Place], known: Values) -> None:
        super().__init__()
        self.parts, self.places, self.known = parts, places, known
        self.values: dict[str, Tensor] = {}
        self.log_det: Tensor | float = 0.0

    def _pyro_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if msg["is_observed"] or type(fn).__name__ == "_Subsample":
            return
        if name in self.parts:
            transform = None if self.places[name].discrete else biject_to(fn.support)
            value, log_det = self.places[name].at(self.parts[name], transform)
            self.values[name], self.log_det = value, self.log_det + log_det
        elif name in self.known:
            value = self.known[name]
        elif getattr(fn.support, "is_discrete", False) and fn.has_enumerate_support:
            value = fn.enumerate_support(expand=True)[0]
        else:
            return
        msg["value"], msg["done"] = value, True


class Somewhere(Messenger):
    """A flat prior has no draws: values around the middle of its support."""

    def _pyro_sample(self, msg: Any) -> None:
        base = msg["fn"]
        while hasattr(base, "base_dist"):
            base = base.base_dist
        if isinstance(base, ImproperUniform) and not msg["is_observed"] and msg["value"] is None:
            transform = biject_to(msg["fn"].support)
            msg["value"] = transform(torch.randn(transform.inverse_shape(msg["fn"].shape())))
            msg["done"] = True


class RowsInverted(Messenger):
    """Sites at given values z, keeping T^-1(z) as ``parts``, each in the shape of its place."""

    def __init__(self, values: Values, places: Mapping[str, Place]) -> None:
        super().__init__()
        self.values, self.places = values, places
        self.parts: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.places and not msg["is_observed"]:
            discrete = self.places[msg["name"]].discrete
            transform = identity_transform if discrete else biject_to(msg["fn"].support)
            self.parts[msg["name"]] = transform.inv(self.values[msg["name"]])
