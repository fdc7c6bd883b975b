"""The mean of weights that come chunk after chunk as logarithms, and how much they differ: nothing else is kept."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["LogMean"]


class LogMean:
    r"""log of the mean weight of every row, its relative variance and the number of effective draws.

    .. math:: \ell_i = \log \frac 1n \sum_k w_{ki}, \quad
              \mathrm{ess}_i = \frac{(\sum_k w_{ki})^2}{\sum_k w_{ki}^2}

    Weights are held relative to the largest so far; chunks are joined as by Chan, Golub and LeVeque (Updating formulae
    and a pairwise algorithm for computing sample variances, 1982), so equal weights have a variance of zero.

    Example:
        >>> mean = LogMean()
        >>> mean.add(torch.tensor([[0.0], [2.0]]).log())
        >>> mean.add(torch.tensor([[4.0]]).log())
        >>> mean.value.exp(), mean.effective
        (tensor([2.]), tensor([1.8000], dtype=torch.float64))
    """

    def __init__(self) -> None:
        self.count = 0
        self._dtype: torch.dtype | None = None
        self._top = self._mean = self._apart = torch.empty(0)

    def add(self, log_weights: Tensor) -> None:
        """Further draws x rows, in nats."""
        logs = log_weights.detach()
        top = logs.amax(0)
        # A row that no draw can explain has weights of zero throughout.
        relative = (logs - _finite(top)).exp_()
        mean = relative.mean(0)
        apart = relative.sub_(mean).square_().sum(0)
        self._join(len(logs), top.double(), mean.double(), apart.double())
        self._dtype = logs.dtype

    def join(self, others: Iterable[LogMean]) -> LogMean:
        """With the draws of others among these."""
        for other in others:
            self._join(other.count, other._top, other._mean, other._apart)
            self._dtype = other._dtype
        return self

    def _join(self, count: int, top: Tensor, mean: Tensor, apart: Tensor) -> None:
        if not self.count:
            self.count, self._top, self._mean, self._apart = count, top, mean, apart
            return
        highest = torch.maximum(self._top, top)
        one, other = (self._top - _finite(highest)).exp(), (top - _finite(highest)).exp()
        ours, theirs, total = self._mean * one, mean * other, self.count + count
        self._apart = self._apart * one**2 + apart * other**2 + (theirs - ours) ** 2 * (self.count * count / total)
        self._mean = ours + (theirs - ours) * (count / total)
        self._top, self.count = highest, total

    @property
    def value(self) -> Tensor:
        """log of the mean weight, of each row, in nats."""
        return (self._mean.log() + _finite(self._top)).to(self._dtype or torch.float64)

    @property
    def variance(self) -> Tensor:
        """Of `value`, to first order, by row; zero of a single draw."""
        if self.count == 1:
            return torch.zeros_like(self._mean)
        return self._apart / ((self.count - 1) * self.count * self._mean**2)

    @property
    def effective(self) -> Tensor:
        """(sum w)^2 / sum w^2 of each row, 0 where all are zero; float64 on the CPU."""
        squares = (self._apart / self.count + self._mean**2).clamp_min(torch.finfo(torch.float64).tiny)
        return (self.count * self._mean**2 / squares).cpu()


def _finite(top: Tensor) -> Tensor:
    return torch.where(top > -math.inf, top, 0.0)
