r"""Components whose log density is a quadratic form, all rows at once: responsibilities, their total, their moments.

.. math:: \log f_k(y) = c_k - \tfrac12 \| R_k^{-1} (y - m_k) \|^2

Rows pass by in chunks that stay in the cache. In a chunk, whitening all components is one matrix product, and so are
the sums that an M-step needs: they are taken in whitened units, where they are of order one however narrow a component
is, so that nothing cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import threshold

from ppl_gen.nn.moments import Moments

__all__ = ["Quadratic", "swept"]

_ELEMENTS = 2**18  # of rows x components x dimensions at a time: what a second-level cache holds
_LEAST_ROWS = 256
# In nats above the smallest normal number, below which a responsibility is zero: arithmetic on subnormal numbers is ten
# times slower, and products of a responsibility and two whitened numbers have to stay above it too.
_MARGIN = 40.0


@dataclass(frozen=True)
class Quadratic:
    """K forms in d dimensions.

    Args:
        constant: c, K numbers in nats.
        centre: m, K x d.
        root: R, a lower triangular factor of each covariance (K x d x d), or its standard deviations (K x d).
    """

    constant: Tensor
    centre: Tensor
    root: Tensor

    @staticmethod
    def normal(centre: Tensor, root: Tensor) -> Quadratic:
        """The log densities of normal components."""
        sizes = root if root.dim() == 2 else root.diagonal(dim1=-2, dim2=-1)
        constant = -sizes.log().sum(-1) - 0.5 * centre.shape[1] * math.log(2 * math.pi)
        return Quadratic(constant, centre, root)

    def plus(self, constant: Tensor) -> Quadratic:
        """The same with K numbers added, such as the logarithms of weights."""
        return Quadratic(self.constant + constant, self.centre, self.root)

    @property
    def full(self) -> bool:
        return self.root.dim() == 3

    def whitening(self) -> Callable[[Tensor], Tensor]:
        """A function of rows (B x d) that gives R^-1 (y - m), K x d x B."""
        count, size = self.centre.shape
        if not self.full:
            inverse = 1 / self.root
            return lambda rows: (rows.mT - self.centre.unsqueeze(-1)).mul_(inverse.unsqueeze(-1))
        eye = torch.eye(size, dtype=self.root.dtype, device=self.root.device)
        whiten = torch.linalg.solve_triangular(self.root, eye.expand_as(self.root), upper=False)
        shift = -(whiten @ self.centre.unsqueeze(-1)).reshape(-1, 1)
        stacked = whiten.reshape(-1, size)
        return lambda rows: torch.addmm(shift, stacked, rows.mT).view(count, size, -1)

    def moments(self, counts: Tensor, first: Tensor, second: Tensor) -> Moments:
        """From sums of whitened rows (K x d, and K x d x d or K x d) to counts, means and scatter of rows."""
        middle = first / counts.clamp_min(torch.finfo(counts.dtype).tiny).unsqueeze(-1)
        root, centre = self.root.to(counts), self.centre.to(counts)
        if not self.full:
            spread = (second - counts.unsqueeze(-1) * middle.square()).clamp_min(0.0)
            return Moments(counts, centre + root * middle, root.square() * spread)
        spread = second - counts[:, None, None] * middle.unsqueeze(-1) * middle.unsqueeze(-2)
        scatter = root @ spread @ root.mT
        means = centre + (root @ middle.unsqueeze(-1)).squeeze(-1)
        return Moments(counts, means, 0.5 * (scatter + scatter.mT))


@torch.no_grad()
def swept(
    rows: Tensor, scaled: Callable[[Tensor], Tensor], forms: Quadratic, *, statistics: bool = True
) -> tuple[Tensor, Moments | None]:
    r"""One pass over the rows: the total of their log densities, and the moments under their responsibilities.

    .. math:: \sum_i \log \sum_k f_k(y_i), \qquad r_{ik} = f_k(y_i) / \sum_j f_j(y_i)

    Chunks are computed in the dtype of ``forms``, sums of chunks in float64. A responsibility below 1e-20 in
    float32, or 1e-290 in float64, counts as zero.

    Args:
        rows: N, or N x d.
        scaled: of a chunk of rows, the B x d numbers y in the dtype of ``forms``.
        forms: the components, with the logarithms of their weights in their constants.
        statistics: whether moments are wanted; None in their place where not.

    Example:
        >>> forms = Quadratic.normal(torch.tensor([[0.0], [9.0]]), torch.ones(2, 1)).plus(torch.zeros(2))
        >>> total, groups = swept(torch.tensor([[0.0], [1.0], [9.0]]), lambda y: y, forms)
        >>> groups.counts.round(), groups.means.squeeze(-1).round(decimals=2)
        (tensor([2., 1.], dtype=torch.float64), tensor([0.5000, 9.0000], dtype=torch.float64))
    """
    count, size = forms.centre.shape
    sums = ((), (count,), (count, size), forms.root.shape)
    total, counts, first, second = (forms.centre.new_zeros(shape, dtype=torch.float64) for shape in sums)
    whiten, constant = forms.whitening(), forms.constant.unsqueeze(-1)
    least = math.log(torch.finfo(forms.centre.dtype).tiny) + _MARGIN
    for chunk in rows.split(max(_LEAST_ROWS, _ELEMENTS // (count * size))):
        y = whiten(scaled(chunk))
        squares = y.square()
        log_joint = squares.sum(1).mul_(-0.5).add_(constant)
        top = log_joint.amax(0)
        weights = threshold(log_joint.sub_(top), least, -math.inf, inplace=True).exp_()
        mass = weights.sum(0)
        total += (top + mass.log()).sum(dtype=torch.float64)
        if not statistics:
            continue
        weights.div_(mass)
        counts += weights.sum(-1, dtype=torch.float64)
        if forms.full:
            weighted = torch.mul(y, weights.unsqueeze(1), out=squares)
            first += weighted.sum(-1)
            second += _products(weighted, y.mT)
        else:
            first += _products(y, weights.unsqueeze(-1)).squeeze(-1)
            second += _products(squares, weights.unsqueeze(-1)).squeeze(-1)
    return total, forms.moments(counts, first, second) if statistics else None


def _products(left: Tensor, right: Tensor) -> Tensor:
    """K products of long and narrow matrices, on one thread by numpy's library, which takes less time than torch's.

    On several, its threads and those of torch would wait for each other.
    """
    if left.device.type != "cpu" or torch.get_num_threads() > 1:
        return left @ right
    return torch.from_numpy(left.numpy() @ right.numpy())
