"""Exponential averages of parameters along a run: what a fit keeps of players that circle around an equilibrium."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Average"]


class Average:
    r"""The exponential average of some tensors over the updates that were made of them.

    .. math:: a_t = a_{t-1} + (1 - d_t)(\theta_t - a_{t-1}), \qquad d_t = \min(d, t / (t + 9))

    Early on it forgets faster than by ``decay``, so that the values before the first update do not linger.

    Example:
        >>> value = torch.zeros(1)
        >>> average = Average([value], decay=0.9)
        >>> for _ in range(200):
        ...     value.fill_(1.0) and average.update([value])
        >>> average.values[0].round(decimals=3)
        tensor([1.])
    """

    def __init__(self, params: Sequence[Tensor], decay: float) -> None:
        self.decay, self.count = decay, 0
        self.values = [p.detach().clone() for p in params]

    def update(self, params: Sequence[Tensor]) -> None:
        """Take in the parameters after one more update."""
        self.count += 1
        share = 1 - min(self.decay, self.count / (self.count + 9))
        torch._foreach_lerp_(self.values, [p.detach() for p in params], share)

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, copied."""
        return {"count": self.count, "values": [value.clone() for value in self.values]}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on where the average stood that gave ``saved``."""
        self.count, self.values = int(saved["count"]), [value.clone() for value in saved["values"]]
