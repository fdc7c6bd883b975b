r"""The affine flow: one learned triangular map, whose maximum likelihood is known in closed form."""

from __future__ import annotations

import torch
from pyro.distributions.transforms import LowerCholeskyAffine
from torch import Tensor, nn

from ppl_gen.data.inputs import check_width
from ppl_gen.models.flows.base import Layer, through
from ppl_gen.models.flows.recipe import flow_recipe
from ppl_gen.program.program import Recipe

__all__ = ["affine_flow"]


class _Affine(Layer):
    """z = A u + b, with A lower triangular and a positive diagonal."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(features))
        self.log_diagonal = nn.Parameter(torch.zeros(features))
        self.below = nn.Parameter(torch.zeros(features, features))

    def _transform(self) -> LowerCholeskyAffine:
        return LowerCholeskyAffine(self.shift, self.below.tril(-1) + self.log_diagonal.exp().diag())

    def to_code(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return through(self._transform(), x)

    def to_data(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return through(self._transform(), z, inverse=True)


def affine_flow(features: int | None = None) -> Recipe:
    r"""One affine map between rows (N x features) and normal codes: a normal distribution with a full covariance.

    .. math:: z = A x + b, \quad \log p(x) = \log \mathrm{Normal}(z; 0, I) + \sum_i \log A_{ii}

    A is lower triangular with a positive diagonal: the inverse of the Cholesky factor of the covariance. The negative
    log-likelihood is convex in (A, b), and ``SVI()`` reaches the maximum of the closed form, sample mean and
    covariance. It starts at independent normals. Units, program and network are those of `real_nvp`.

    Args:
        features: columns of the data; None: as many as they have.

    Returns:
        A recipe; it raises ValueError for data of another shape, or with a constant column.

    Raises:
        ValueError: unless ``features`` is a whole number of at least 1.

    References:
        Normalizing flows for probabilistic modeling and inference (Papamakarios et al., 2021), section 3.

    Example:
        >>> import torch, ppl_gen as pg
        >>> from ppl_gen.inference import SVI
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 2.0], [4.0, 6.0], [1.0, 3.0]])
        >>> fit = pg.fit(affine_flow(), x, SVI(steps=500, lr=0.02), seed=0)
        >>> normal = torch.distributions.MultivariateNormal(x.mean(0), torch.cov(x.T, correction=0))
        >>> round(fit.evidence().mean - float(normal.log_prob(x).mean()), 3), fit.evidence().exact
        (-0.0, True)
    """
    check_width("features", features)
    return flow_recipe(
        "affine_flow", features, lambda columns: [_Affine(columns)], {"features": features}, bounded=True
    )
