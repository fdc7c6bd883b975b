r"""The inverse Wishart distribution over covariances, written for their Cholesky factors.

A covariance S = L L' with an inverse Wishart distribution is sampled as its lower Cholesky factor L. The factor is what
a normal distribution takes, and it maps one-to-one to an unconstrained vector, which the matrix itself does not in
torch: so NUTS and autoguides reach it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import Chi2, Normal, TorchDistribution
from torch import Tensor
from torch.distributions import biject_to, constraints, register_kl, transform_to
from torch.distributions.transforms import Transform

__all__ = ["InverseWishartCholesky", "multidigamma"]


class _LowerFactor(constraints.Constraint):
    """Lower triangular with a positive diagonal: a class of its own, so that torch's constraint keeps its transform."""

    is_discrete = False
    event_dim = 2

    def check(self, value: Tensor) -> Tensor:
        lower = (value.tril() == value).flatten(-2).all(-1)
        return lower & (value.diagonal(dim1=-2, dim2=-1) > 0).all(-1)


class _Packed(Transform):
    """A vector of d (d + 1) / 2 numbers to a lower factor: logarithms of the diagonal, then what is below by rows."""

    domain = constraints.real_vector
    codomain = _LowerFactor()
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Packed)

    __hash__ = Transform.__hash__

    def _call(self, x: Tensor) -> Tensor:
        size = _size(x.shape[-1])
        rows, columns = torch.tril_indices(size, size, -1, device=x.device)
        below = x.new_zeros(*x.shape[:-1], size, size)
        below[..., rows, columns] = x[..., size:]
        return below + x[..., :size].exp().diag_embed()

    def _inverse(self, y: Tensor) -> Tensor:
        rows, columns = torch.tril_indices(y.shape[-1], y.shape[-1], -1, device=y.device)
        return torch.cat([y.diagonal(dim1=-2, dim2=-1).log(), y[..., rows, columns]], -1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return y.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def forward_shape(self, shape: Any) -> torch.Size:
        return torch.Size((*shape[:-1], _size(shape[-1]), _size(shape[-1])))

    def inverse_shape(self, shape: Any) -> torch.Size:
        return torch.Size((*shape[:-2], shape[-1] * (shape[-1] + 1) // 2))


def _size(packed: int) -> int:
    return (math.isqrt(8 * packed + 1) - 1) // 2


@biject_to.register(_LowerFactor)
@transform_to.register(_LowerFactor)
def _packed(constraint: _LowerFactor) -> _Packed:
    return _Packed()


class InverseWishartCholesky(TorchDistribution):
    r"""The lower Cholesky factor L of a covariance S = L L' that has an inverse Wishart distribution.

    .. math:: p(L) = \frac{|\Psi|^{\nu/2}}{2^{\nu d/2} \Gamma_d(\nu/2)}
              |S|^{-(\nu+d+1)/2} e^{-\mathrm{tr}(\Psi S^{-1})/2} \; 2^d \prod_{i=1}^d L_{ii}^{d-i+1}

    The last factors are the Jacobian of S in L. Samples are made by Bartlett's decomposition: no matrix is factorised.

    Args:
        df: degrees of freedom nu > d - 1, of the batch shape.
        scale_tril: the lower Cholesky factor of the scale matrix Psi; the mean of S is Psi / (nu - d - 1).

    Raises:
        ValueError: if df <= d - 1, or scale_tril is not a lower triangular matrix with a positive diagonal.

    References:
        On the theory of statistical regression (Bartlett, 1933).
        Pattern Recognition and Machine Learning, appendix B (Bishop, 2006).

    Example:
        >>> prior = InverseWishartCholesky(torch.tensor(5.0), torch.eye(2))
        >>> factor = prior.sample()
        >>> factor.shape, bool(factor[0, 1] == 0)
        (torch.Size([2, 2]), True)
    """

    arg_constraints = {"df": constraints.positive, "scale_tril": constraints.lower_cholesky}
    support = _LowerFactor()
    has_rsample = True

    def __init__(self, df: Tensor | float, scale_tril: Tensor, validate_args: bool | None = None) -> None:
        df = torch.as_tensor(df, dtype=scale_tril.dtype, device=scale_tril.device)
        batch = torch.broadcast_shapes(df.shape, scale_tril.shape[:-2])
        self.df, self.scale_tril = df.expand(batch), scale_tril.expand(*batch, *scale_tril.shape[-2:])
        super().__init__(batch, scale_tril.shape[-2:], validate_args=validate_args)
        size = scale_tril.shape[-1]
        if self._validate_args and not bool((self.df > size - 1).all()):
            raise ValueError(f"df: expected more than {size - 1} degrees of freedom for {size} dimensions, got {df}")

    def expand(self, batch_shape: Any, _instance: Any = None) -> InverseWishartCholesky:
        shape = torch.Size(batch_shape)
        scale_tril = self.scale_tril.expand(*shape, *self.event_shape)
        return InverseWishartCholesky(self.df.expand(shape), scale_tril, validate_args=False)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws of L = P A^{-T} (sample x batch x d x d), A A' Wishart with unit scale, A upper triangular."""
        size = self.event_shape[-1]
        below = torch.arange(size, device=self.df.device)
        diagonal = Chi2(self.df.unsqueeze(-1) - below.flip(0), validate_args=False).rsample(sample_shape).sqrt()
        noise = Normal(torch.zeros_like(self.scale_tril), 1.0, validate_args=False).rsample(sample_shape)
        transposed = noise.tril(-1) + diagonal.diag_embed()
        unit = torch.eye(size, dtype=self.df.dtype, device=self.df.device).expand(transposed.shape)
        return self.scale_tril @ torch.linalg.solve_triangular(transposed, unit, upper=False)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        size = self.event_shape[-1]
        ratio = torch.linalg.solve_triangular(value, self.scale_tril.expand(value.shape), upper=False)
        exponents = self.df.unsqueeze(-1) + torch.arange(1, size + 1, device=value.device)
        diagonal = value.diagonal(dim1=-2, dim2=-1)
        return (
            self.df * _half_log_det(self.scale_tril)
            - (self.df / 2 - 1) * size * math.log(2)
            - torch.mvlgamma(self.df / 2, size)
            - (exponents * diagonal.log()).sum(-1)
            - ratio.square().sum((-1, -2)) / 2
        )


def _half_log_det(factor: Tensor) -> Tensor:
    """Half the log determinant of F F', of factors F ... x d x d."""
    return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def multidigamma(value: Tensor, size: int) -> Tensor:
    """The derivative of the logarithm of the multivariate gamma function in ``size`` dimensions, entry by entry.

    >>> bool(multidigamma(torch.tensor(3.0), 1) == torch.tensor(3.0).digamma())
    True
    """
    return (value.unsqueeze(-1) - torch.arange(size, device=value.device) / 2).digamma().sum(-1)


@register_kl(InverseWishartCholesky, InverseWishartCholesky)
def _divergence(q: InverseWishartCholesky, p: InverseWishartCholesky) -> Tensor:
    """The divergence of two Wishart distributions over the precision: it does not depend on how S is written."""
    size = q.event_shape[-1]
    ratio = torch.linalg.solve_triangular(q.scale_tril, p.scale_tril, upper=False)
    return (
        p.df * (_half_log_det(q.scale_tril) - _half_log_det(p.scale_tril))
        + q.df * (ratio.square().sum((-1, -2)) - size) / 2
        + torch.mvlgamma(p.df / 2, size)
        - torch.mvlgamma(q.df / 2, size)
        + (q.df - p.df) * multidigamma(q.df / 2, size) / 2
    )
