r"""The maximum mean discrepancy between two sets of rows."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ppl_gen.arguments import require_choice
from ppl_gen.distances.rows import two_sets
from ppl_gen.errors import require_positive

__all__ = ["KERNELS", "SCALES", "mean_squared_distance", "mmd", "squared_distance", "unbiased"]

KERNELS = ("rbf", "imq")
#: Squared lengths of the kernels, in units of the mean squared distance of two rows.
SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_BLOCK = 4_000_000  # kernel values at a time


def mmd(x: Tensor, y: Tensor, *, kernel: str = "rbf", scales: Sequence[float] | None = None) -> Tensor:
    r"""The unbiased estimate of the squared maximum mean discrepancy between the distributions of two sets of rows.

    .. math:: \frac{1}{n(n-1)} \sum_{i \ne j} k(x_i, x_j) + \frac{1}{m(m-1)} \sum_{i \ne j} k(y_i, y_j)
              - \frac{2}{nm} \sum_{i, j} k(x_i, y_j)

    with k the mean over several lengths l of exp(-d^2 / 2 l^2) ("rbf") or l^2 / (l^2 + d^2) ("imq"), d the distance of
    two rows. It is the squared largest difference of means over the unit ball of the kernel's Hilbert space; its mean
    is zero where both sets come from one distribution, so single values may be negative. Differentiable in both.
    Time goes as the square of the rows, memory as their number.

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
    other = other.to(one)
    if squares is None:
        mean = mean_squared_distance(torch.cat([one, other]).detach())
        base = torch.where(mean > 0, mean, torch.ones_like(mean))
        return unbiased(one, other, kernel, base * torch.tensor(SCALES, dtype=one.dtype, device=one.device))
    return unbiased(one, other, kernel, torch.tensor(squares, dtype=one.dtype, device=one.device))


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
    # k(x, x) = 1 for both kernels: the diagonal is left out by its known value.
    same = [(_total(rows, rows, kernel, squares) - len(rows)) / max(1, len(rows) * (len(rows) - 1)) for rows in (x, y)]
    return same[0] + same[1] - 2.0 * _total(x, y, kernel, squares) / (len(x) * len(y))


def _total(x: Tensor, y: Tensor, kernel: str, squares: Tensor) -> Tensor:
    """The sum of the kernels over all pairs, some rows of x at a time; blocks are computed again for their gradient."""
    step = max(1, _BLOCK // (len(y) * len(squares)))
    if step >= len(x):
        return _values(squared_distance(x, y), kernel, squares).sum()

    def block(some: Tensor, others: Tensor, at: int | None) -> Tensor:
        return _values(_squared(some, others, at), kernel, squares).sum()

    starts = range(0, len(x), step)
    centre = y.detach().mean(0)
    rows, others = x - centre, y - centre
    parts = [
        checkpoint(
            block,
            rows[begin : begin + step],
            others,
            begin if x is y else None,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for begin in starts
    ]
    return torch.stack(parts).sum()


def mean_squared_distance(rows: Tensor) -> Tensor:
    """Over all pairs of different rows (rows x numbers): twice their variance, summed over columns.

    Example:
        >>> mean_squared_distance(torch.tensor([[0.0], [1.0], [3.0]]))  # (1 + 9 + 4) / 3
        tensor(4.6667)
    """
    near = rows - rows[0]  # rows that all are equal have exactly no spread, and far from zero little is lost
    return 2.0 * (near - near.mean(0)).square().sum() / max(1, len(rows) - 1)


def squared_distance(x: Tensor, y: Tensor) -> Tensor:
    """Of all pairs, rows of x x rows of y; exactly zero between a row and itself."""
    # Around a common centre: far from zero the three terms are large, and what is left of their sum is rounding.
    centre = y.detach().mean(0)
    return _squared(x - centre, y - centre, 0 if x is y else None)


def _squared(x: Tensor, y: Tensor, at: int | None) -> Tensor:
    """Of rows near zero; ``at``: where in y the rows of x begin, None where they are others."""
    squared = x.square().sum(1, keepdim=True) + y.square().sum(1) - 2.0 * (x @ y.mT)
    if at is not None:
        own = torch.zeros_like(squared).diagonal_scatter(squared.diagonal(at), at)
        squared = squared - own
    return squared.clamp_min(0.0)


def _values(squared: Tensor, kernel: str, squares: Tensor) -> Tensor:
    """The mean of the kernels at these squared distances."""
    lengths = squares.reshape(-1, *[1] * squared.dim())
    values = (-0.5 * squared / lengths).exp() if kernel == "rbf" else lengths / (lengths + squared)
    return values.mean(0)
