"""One comparison with a known answer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Check", "largest", "rng"]


@dataclass(frozen=True)
class Check:
    """Passed where ``error`` is at most ``tolerance``; of a bound, the error is what it exceeds its limit by."""

    oracle: str
    compared: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # False for NaN

    def row(self) -> list[str]:
        verdict = "yes" if self.passed else "**no**"
        return [self.oracle, self.compared, f"{self.error:.2g}", f"{self.tolerance:.2g}", verdict]


def largest(ours, theirs) -> float:
    return float((torch.as_tensor(ours) - torch.as_tensor(theirs)).abs().max())


def rng(seed=0):
    return torch.Generator().manual_seed(seed)
