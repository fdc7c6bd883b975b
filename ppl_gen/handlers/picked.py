"""A distribution over all values of the finite sites before it, read at the values that were drawn."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

__all__ = ["Pick", "Picked"]


@dataclass(frozen=True, eq=False)
class Pick:
    """Takes, of a tensor with a dim for each finite site, the slot that was drawn; plates and events stay.

    Args:
        slots: by dim (counted from the right, events apart), which slot: an index in the shape of the plates.
        nesting: how many dims on the right are those of plates; all dims left of them are of finite sites.
        depth: how many dims the site's own plates take.
        others: whether further finite sites are enumerated, whose dims stay.
    """

    slots: Mapping[int, Tensor]
    nesting: int
    depth: int
    others: bool = False

    def reaches(self, dims: int) -> bool:
        """Whether so many dims, events apart, go beyond those of the plates."""
        return dims > self.nesting

    def __call__(self, table: Tensor, event_dim: int = 0, lead: int = 0) -> Tensor:
        """The slots of ``table``; ``lead`` dims on the left are those of several draws.

        Raises:
            ValueError: for a dim that belongs to no finite site, and for a result wider than the plates.
        """
        dims = table.dim() - event_dim - lead
        index: list[Any] = [slice(None)] * lead
        for dim in range(-dims, 0):
            size = table.shape[dim - event_dim]
            if dim >= -self.nesting or (self.others and dim not in self.slots):
                index.append(torch.arange(size, device=table.device).reshape(-1, *[1] * (-dim - 1)))
            elif size == 1:
                index.append(torch.zeros((), dtype=torch.long, device=table.device))
            elif dim in self.slots:
                index.append(self.slots[dim])
            else:
                raise ValueError(f"the dim {dim}, of size {size}, belongs neither to a plate nor to a finite site")
        picked = table[tuple(index)] if dims else table
        while not self.others and picked.dim() - event_dim - lead > self.depth:
            if picked.shape[lead] != 1:
                raise ValueError("a finite site is read outside of the plates that it stands in")
            picked = picked.squeeze(lead)
        return picked


class Picked(dist.TorchDistribution):
    """``base_dist`` at the slots that ``pick`` takes: one distribution where it is one for each value of finite sites.

    >>> both = dist.Normal(torch.tensor([[-5.0], [5.0]]).expand(2, 3), 1.0)
    >>> Picked(both, Pick({-2: torch.tensor([0, 1, 1])}, nesting=1, depth=1)).mean
    tensor([-5.,  5.,  5.])
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 - as torch declares it

    def __init__(self, base_dist: Any, pick: Pick) -> None:
        self.base_dist, self.pick = base_dist, pick
        shape = pick(torch.empty(()).expand(base_dist.batch_shape)).shape
        super().__init__(shape, base_dist.event_shape, validate_args=False)
        self._validate_args = base_dist._validate_args

    @property
    def has_rsample(self) -> bool:
        return bool(self.base_dist.has_rsample)

    @property
    def has_enumerate_support(self) -> bool:
        return bool(self.base_dist.has_enumerate_support)

    @property
    def support(self) -> Any:
        return _picked_support(self.base_dist.support, self.pick, self.event_dim)

    @property
    def mean(self) -> Tensor:
        return self.pick(self.base_dist.mean, self.event_dim)

    @property
    def variance(self) -> Tensor:
        return self.pick(self.base_dist.variance, self.event_dim)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - torch's signature
        with torch.no_grad():
            return self.pick(self.base_dist.sample(sample_shape), self.event_dim, len(sample_shape))

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        return self.pick(self.base_dist.rsample(sample_shape), self.event_dim, len(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        own = len(self.batch_shape) + self.event_dim
        lead = max(0, value.dim() - own)
        ones = [1] * (len(self.base_dist.batch_shape) - len(self.batch_shape))
        spread = value.reshape(*value.shape[:lead], *ones, *value.shape[lead:]) if lead else value
        with _unchecked(self.base_dist):  # a value that another slot cannot take is none of its business
            table: Tensor = self.base_dist.log_prob(spread)
        return self.pick(table, 0, lead)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        values: Tensor = self.base_dist.enumerate_support(expand=False)
        flat = values.reshape(len(values), *[1] * len(self.batch_shape), *self.event_shape)
        return flat.expand(-1, *self.batch_shape, *self.event_shape) if expand else flat


def _picked_support(support: Any, pick: Pick, event_dim: int) -> Any:
    if isinstance(support, constraints.independent):
        inner = _picked_support(support.base_constraint, pick, event_dim)
        return constraints.independent(inner, support.reinterpreted_batch_ndims)
    bounds = {
        name: pick(bound, event_dim)
        for name, bound in vars(support).items()
        if isinstance(bound, Tensor) and pick.reaches(bound.dim() - event_dim)
    }
    if not bounds:
        return support
    made = copy.copy(support)
    vars(made).update(bounds)
    return made


@contextlib.contextmanager
def _unchecked(fn: Any) -> Iterator[None]:
    layers: list[Any] = []
    while fn is not None:
        layers.append(fn)
        fn = getattr(fn, "base_dist", None)
    checked = [layer._validate_args for layer in layers]
    try:
        for layer in layers:
            layer._validate_args = False
        yield
    finally:
        for layer, flag in zip(layers, checked, strict=True):
            layer._validate_args = flag
