"""Flat priors: what makes a posterior mode a maximum of the likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import transform_to

__all__ = ["Flat"]


class Flat(dist.ImproperUniform):
    """The improper density 1 over all values of a support: what has this prior has no draws and no normaliser.

    A dry run needs some value, so ``sample`` gives the image of zero, always. What would pass such values off as draws
    (`Fit.sample`, `pg.prior_predictive`) refuses them.

    Args:
        support: the constraint that values satisfy.
        event_shape: shape of one value.
        batch_shape: how many of them.

    Example:
        >>> flat = Flat(constraints.positive, (2,))
        >>> flat.sample(), flat.log_prob(torch.tensor([3.0, 4.0]))
        (tensor([1., 1.]), tensor(0.))
    """

    def __init__(
        self,
        support: constraints.Constraint = constraints.real,
        event_shape: Sequence[int] = (),
        batch_shape: Sequence[int] = (),
    ) -> None:
        super().__init__(support, torch.Size(batch_shape), torch.Size(event_shape))

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Flat:
        return Flat(self._support, self.event_shape, batch_shape)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        value: Tensor = transform_to(self._support)(torch.zeros(self.shape(torch.Size(sample_shape))))
        return value
