"""Weighted moments of rows: all that conjugate Gaussian updates need to know of the data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Moments", "moments", "pooled"]


@dataclass(frozen=True)
class Moments:
    """Of K weighted groups of rows in d dimensions: counts (K), means (K x d), scatter about them (K x d or K x d x d).

    The scatter is not divided by the count. A group without weight has mean and scatter zero.
    """

    counts: Tensor
    means: Tensor
    scatter: Tensor


def moments(rows: Tensor, weights: Tensor, *, full: bool) -> Moments:
    """The moments of ``rows`` (N x d) under ``weights`` (N x K), with whole scatter matrices if ``full``.

    Example:
        >>> rows, weights = torch.tensor([[0.0], [2.0], [5.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> result = moments(rows, weights, full=False)
        >>> result.counts, result.means.squeeze(-1), result.scatter.squeeze(-1)
        (tensor([2., 1.]), tensor([1., 5.]), tensor([2., 0.]))
    """
    counts = weights.sum(0)
    means = (weights.T @ rows) / counts.clamp_min(torch.finfo(rows.dtype).tiny).unsqueeze(-1)
    scatter = []
    for weight, mean in zip(weights.T, means, strict=True):  # one group at a time: N x K x d need not fit in memory
        centred = rows - mean
        scatter.append((weight.unsqueeze(-1) * centred).T @ centred if full else weight @ centred.square())
    return Moments(counts, means, torch.stack(scatter))


def pooled(old: Moments, new: Moments, shares: tuple[float, float]) -> Moments:
    r"""The moments of two sets of groups together, whose rows count as often as ``shares`` (a and b) say.

    .. math:: N = a N_1 + b N_2, \qquad S = a S_1 + b S_2 + \frac{a N_1 \, b N_2}{N} (m_1 - m_2)(m_1 - m_2)^\top

    Nothing cancels, where differences of sums of squares would (Chan, Golub and LeVeque 1983).

    Example:
        >>> rows = torch.tensor([[[0.0], [2.0]], [[4.0], [6.0]]])
        >>> one, two = (moments(x, torch.ones(2, 1), full=False) for x in rows)
        >>> both = pooled(one, two, (1.0, 1.0))
        >>> both.counts, both.means.squeeze(-1), both.scatter.squeeze(-1)
        (tensor([4.]), tensor([3.]), tensor([20.]))
    """
    mine, theirs = shares[0] * old.counts, shares[1] * new.counts
    counts = mine + theirs
    share = theirs / counts.clamp_min(torch.finfo(counts.dtype).tiny)
    apart = new.means - old.means
    full = old.scatter.dim() == 3
    between = apart.unsqueeze(-1) * apart.unsqueeze(-2) if full else apart.square()
    weight = (mine * share).reshape(-1, *[1] * (old.scatter.dim() - 1))
    scatter = shares[0] * old.scatter + shares[1] * new.scatter + weight * between
    return Moments(counts, old.means + share.unsqueeze(-1) * apart, scatter)
