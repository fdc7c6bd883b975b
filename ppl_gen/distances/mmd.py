r"""The maximum mean discrepancy between two sets of rows."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ppl_gen.arguments import require_choice
from ppl_gen.distances.rows import two_sets
from ppl_gen.errors import require_positive

__all__ = ["KERNELS", "SCALES", "mmd", "squared_distance", "unbiased"]

KERNELS = ("rbf", "imq")
#: Squared lengths of the kernels, in units of the mean squared distance of two rows.
SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


def mmd(x: Tensor, y: Tensor, *, kernel: str = "rbf", scales: Sequence[float] | None = None) -> Tensor:
    r"""The unbiased estimate of the squared maximum mean discrepancy between the distributions of two sets of rows.

    .. math:: \frac{1}{n(n-1)} \sum_{i \ne j} k(x_i, x_j) + \frac{1}{m(m-1)} \sum_{i \ne j} k(y_i, y_j)
              - \frac{2}{nm} \sum_{i, j} k(x_i, y_j)

    with k the mean over several lengths l of exp(-d^2 / 2 l^2) ("rbf") or l^2 / (l^2 + d^2) ("imq"), d the distance of
    two rows. It is the squared largest difference of means over the unit ball of the kernel's Hilbert space; its mean
    is zero where both sets come from one distribution, so single values may be negative. Differentiable in both.

    Args:
        x: rows x numbers; further dimensions are flattened.
        y: as x, perhaps another number of rows.
        kernel: "rbf", or "imq" (inverse multiquadratic), whose tails are heavier.
        scales: lengths l of the kernels, in the units of the rows; None: l^2 is 0.1, 0.2, 0.5, 1, 2, 5 and 10 times the
            mean squared distance of two rows of both sets together.

    Returns:
        A scalar between -2 and 2.

    Raises:
        ValueError: for fewer than two rows, rows of different width, values that are not finite, or a setting out of
            its range.
        TypeError: for what is no tensor or array of real numbers.

    References:
        A kernel two-sample test (Gretton, Borgwardt, Rasch, Schoelkopf and Smola, 2012), lemma 6.

    Example:
        >>> x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
        >>> abs(float(mmd(x[:250], x[250:]))) < 0.01 < float(mmd(x[:250], x[250:] + 1.0))
        True
    """
    require_choice("kernel", kernel, KERNELS)
    one, other = two_sets(("x", "y"), x, y)
    squares = _checked(scales)
    if squares is None:
        both = torch.cat([one, other.to(one)]).detach()
        squared = squared_distance(both, both)
        mean = squared.sum() / (len(both) * (len(both) - 1))
        base = torch.where(mean > 0, mean, torch.ones_like(mean))
        return unbiased(one, other.to(one), kernel, base * torch.tensor(SCALES, dtype=one.dtype, device=one.device))
    return unbiased(one, other.to(one), kernel, torch.tensor(squares, dtype=one.dtype, device=one.device))


def _checked(scales: Any) -> list[float] | None:
    """Their squares."""
    if scales is None:
        return None
    if not isinstance(scales, Sequence) or isinstance(scales, str) or not scales:
        raise ValueError(f"scales: expected lengths of kernels, such as (0.5, 1.0), or None, got {scales!r}")
    for scale in scales:
        if not isinstance(scale, numbers.Real):
            raise ValueError(f"scales: expected positive numbers, got {scale!r}")
        require_positive("scales", scale)
    return [float(scale) ** 2 for scale in scales]


def unbiased(x: Tensor, y: Tensor, kernel: str, squares: Tensor) -> Tensor:
    """`mmd` of rows x numbers without checks; ``squares`` are the kernels' squared lengths."""
    within = [_values(squared_distance(rows, rows), kernel, squares) for rows in (x, y)]
    between = _values(squared_distance(x, y), kernel, squares)
    # k(x, x) = 1 for both kernels: the diagonal is left out by its known value.
    same = [(value.sum() - len(value)) / max(1, len(value) * (len(value) - 1)) for value in within]
    return same[0] + same[1] - 2.0 * between.mean()


def squared_distance(x: Tensor, y: Tensor) -> Tensor:
    """Of all pairs, rows of x x rows of y; exactly zero between a row and itself."""
    same = x is y
    # Around a common centre: far from zero the three terms are large, and what is left of their sum is rounding.
    centre = y.detach().mean(0)
    x, y = x - centre, y - centre
    inner = x @ y.mT
    squared = x.square().sum(1, keepdim=True) + y.square().sum(1) - 2.0 * inner
    if same:
        squared = squared - torch.diag(squared.diagonal())
    return squared.clamp_min(0.0)


def _values(squared: Tensor, kernel: str, squares: Tensor) -> Tensor:
    """The mean of the kernels at these squared distances."""
    lengths = squares.reshape(-1, *[1] * squared.dim())
    values = (-0.5 * squared / lengths).exp() if kernel == "rbf" else lengths / (lengths + squared)
    return values.mean(0)
