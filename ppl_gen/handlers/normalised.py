"""An energy read as a density, where its normaliser is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

__all__ = ["Normalised", "normalised"]


class Normalised(dist.TorchDistribution):
    """log p(x) = -F(x) - log Z; draws are those of ``drawn``. With log Z = 0 it is no density, and trains as one."""

    arg_constraints: dict[str, Any] = {}
    has_rsample = False

    def __init__(self, drawn: Any, free_energy: Callable[[Tensor], Tensor], log_partition: float) -> None:
        self.drawn, self.free_energy, self.log_partition = drawn, free_energy, log_partition
        super().__init__(drawn.batch_shape, drawn.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self.drawn.support

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Normalised:
        return Normalised(self.drawn.expand(batch_shape), self.free_energy, self.log_partition)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        found: Tensor = self.drawn.sample(torch.Size(sample_shape))
        return found

    def log_prob(self, value: Tensor) -> Tensor:
        return -self.free_energy(value) - self.log_partition


class _Normalised(Messenger):
    def __init__(self, site: str, free_energy: Callable[[Tensor], Tensor], log_partition: float) -> None:
        super().__init__()
        self.site, self.free_energy, self.log_partition = site, free_energy, log_partition

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.site:
            msg["fn"] = Normalised(msg["fn"], self.free_energy, self.log_partition)


def normalised(
    model: Callable[..., Any], site: str, free_energy: Callable[[Tensor], Tensor], log_partition: float
) -> Callable[..., Any]:
    """The model with a density at the site whose energy is given."""
    return _Normalised(site, free_energy, log_partition)(model)
