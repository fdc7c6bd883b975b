"""Weldon's crabs: the first mixture ever fitted."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["COUNTS", "crab_edges", "crab_ratios"]

#: Crabs in each of the 29 classes of the ratio of forehead breadth to body length, k = 1..29.
COUNTS = (1, 3, 5, 2, 7, 10, 13, 19, 20, 25, 40, 31, 60, 62, 54, 74, 84, 86, 96, 85, 75, 47, 43, 24, 19, 9, 5, 0, 1)


def crab_edges() -> Tensor:
    """The 30 edges of the 29 classes, in float64: class k = 1..29 covers (0.5795 + 0.004 (k-1), 0.5795 + 0.004 k].

    Example:
        >>> edges = crab_edges()
        >>> len(edges), round(float(edges[0]), 4), round(float(edges[-1]), 4)
        (30, 0.5795, 0.6955)
    """
    return torch.arange(5795, 5795 + 40 * 29 + 1, 40, dtype=torch.float64) / 10_000


def crab_ratios() -> Tensor:
    """The ratios of 1000 crabs from Naples, each at the midpoint 0.5775 + 0.004 k of its class, in float64.

    The ratio is forehead breadth over body length of female *Carcinus moenas*, measured by Weldon; its skewed
    distribution made Pearson ask whether there were two species, and fit the first mixture of two normals.

    Returns:
        1000 ratios (no unit), in ascending order.

    References:
        Certain correlated variations in Carcinus moenas (Weldon, 1893).
        Contributions to the mathematical theory of evolution (Pearson, 1894).

    Example:
        >>> ratios = crab_ratios()
        >>> ratios.shape, round(float(ratios.mean()), 6)
        (torch.Size([1000]), 0.644696)
    """
    # Division of whole numbers is correctly rounded: each value is the double nearest to the printed decimal.
    midpoints = torch.arange(5815, 5815 + 40 * 29, 40, dtype=torch.float64) / 10_000
    return midpoints.repeat_interleave(torch.tensor(COUNTS))
