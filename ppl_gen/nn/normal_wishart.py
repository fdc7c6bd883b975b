r"""Gaussian components with full covariances under the normal-inverse-Wishart prior, in closed form.

.. math:: \Sigma_k \sim \mathrm{InverseWishart}(\nu, \varsigma^2 I), \qquad
          \mu_k \mid \Sigma_k \sim \mathrm{Normal}(0, \Sigma_k / \kappa)

in standardised units: each column of the data has mean 0 and variance 1 there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from pyro.ops.indexing import Vindex
from torch import Tensor
from torch.distributions import constraints, kl_divergence

from ppl_gen.nn.moments import Moments
from ppl_gen.nn.quadratic import Quadratic
from ppl_gen.nn.wishart import InverseWishartCholesky, multidigamma

__all__ = ["NormalWishart"]


@dataclass(frozen=True)
class NormalWishart:
    """Components with full covariances; the arguments mean what they mean in `NormalGamma`.

    The program samples the lower Cholesky factor of each covariance. ``floor`` bounds the eigenvalues from below.
    """

    components: int
    event: tuple[int, ...]
    strength: float
    degrees: float
    spread: float
    floor: float

    full = True
    axes = {"loc_standard": -2, "loc": -2, "scale_tril_standard": -3, "covariance": -3}
    constraints = {
        "loc_mean": constraints.real,
        "loc_strength": constraints.positive,
        "covariance_degrees": constraints.positive,
        "covariance_scatter_tril": constraints.lower_cholesky,
    }

    @property
    def size(self) -> int:
        """d."""
        return self.event[0]

    def _prior(self, like: Tensor) -> InverseWishartCholesky:
        factor = torch.eye(self.size, dtype=like.dtype, device=like.device) * math.sqrt(self.spread)
        return InverseWishartCholesky(self.degrees, factor).expand((self.components,))

    def sample(self, like: Tensor) -> dict[str, Tensor]:
        """The prior statements, factors K x d x d and means K x d; ``like`` gives dtype and device."""
        factor = pyro.sample("scale_tril_standard", self._prior(like).to_event(1))
        return self._located(factor, like.new_zeros(self.components, *self.event), factor / math.sqrt(self.strength))

    def guide(self) -> None:
        """The normal-inverse-Wishart posterior at the parameters that the store holds."""
        degrees, scatter = pyro.param("covariance_degrees"), pyro.param("covariance_scatter_tril")
        factor = pyro.sample("scale_tril_standard", InverseWishartCholesky(degrees, scatter).to_event(1))
        scale = factor * pyro.param("loc_strength").rsqrt()[:, None, None]
        self._located(factor, pyro.param("loc_mean"), scale)

    def _located(self, factor: Tensor, mean: Tensor, scale_tril: Tensor) -> dict[str, Tensor]:
        """Both sites: factors K x d x d, and means around ``mean`` (K x d) with ``scale_tril`` (K x d x d)."""
        normal = dist.MultivariateNormal(mean, scale_tril=scale_tril).to_event(1)
        return {"scale_tril_standard": factor, "loc_standard": pyro.sample("loc_standard", normal)}

    def expose(self, values: Mapping[str, Tensor], loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Location (K x d) and Cholesky factor (K x d x d) in the user's units; sites: location and covariance."""
        mean = pyro.deterministic("loc", loc + scale * values["loc_standard"], event_dim=2)
        factor = scale.unsqueeze(-1) * values["scale_tril_standard"]
        pyro.deterministic("covariance", factor @ factor.mT, event_dim=3)
        return mean, factor

    def observation(self, located: tuple[Tensor, Tensor], assignment: Tensor) -> dist.TorchDistribution:
        """The distribution of a row, given its component."""
        loc, factor = located
        scale_tril = Vindex(factor)[..., assignment, :, :]
        return dist.MultivariateNormal(Vindex(loc)[..., assignment, :], scale_tril=scale_tril)

    def start(self, means: Tensor) -> dict[str, Tensor]:
        """Values with these means (K x d) and the variances of the data."""
        eye = torch.eye(self.size, dtype=means.dtype, device=means.device)
        return {"loc_standard": means, "scale_tril_standard": eye.repeat(self.components, 1, 1)}

    def maximise(self, groups: Moments, prior: bool) -> dict[str, Tensor]:
        """Values of largest likelihood, or of largest posterior density, for rows so grouped; shapes as in `sample`."""
        counts = groups.counts
        if not prior:
            covariance = self._floored(groups.scatter / counts[:, None, None])
            return {"loc_standard": groups.means, "scale_tril_standard": torch.linalg.cholesky(covariance)}
        # In the factor's own coordinates the density is a product over the diagonal of (scatter factor) / (factor).
        order = torch.arange(1, self.size + 1, device=counts.device)
        exponents = self.degrees + 1 + counts.unsqueeze(-1) + order
        factor = torch.linalg.cholesky(self._scatter(groups)) * exponents.rsqrt().unsqueeze(-2)
        means = (counts / (counts + self.strength)).unsqueeze(-1) * groups.means
        return {"loc_standard": means, "scale_tril_standard": factor}

    def _floored(self, covariance: Tensor) -> Tensor:
        """The nearest covariances in likelihood (K x d x d) whose eigenvalues respect the floor."""
        eye = torch.eye(self.size, dtype=covariance.dtype, device=covariance.device)
        _, below = torch.linalg.cholesky_ex(covariance - self.floor * eye)
        if not bool(below.any()):  # most of the time, and it costs a tenth of the eigenvalues
            return covariance
        values, vectors = torch.linalg.eigh(covariance)
        return (vectors * values.clamp_min(self.floor).unsqueeze(-2)) @ vectors.mT

    def _scatter(self, groups: Moments) -> Tensor:
        """The scale matrix of each component's posterior: K x d x d."""
        means, weight = groups.means, self.strength * groups.counts / (self.strength + groups.counts)
        eye = torch.eye(self.size, dtype=means.dtype, device=means.device)
        outer = means.unsqueeze(-1) * means.unsqueeze(-2)
        return self.spread * eye + groups.scatter + weight[:, None, None] * outer

    def update(self, groups: Moments) -> dict[str, Tensor]:
        """Parameters of the normal-inverse-Wishart posterior for rows so grouped.

        ``loc_mean``: K x d; ``loc_strength`` and ``covariance_degrees``: K; ``covariance_scatter_tril``: K x d x d.
        """
        strength = self.strength + groups.counts
        return {
            "loc_mean": (groups.counts / strength).unsqueeze(-1) * groups.means,
            "loc_strength": strength,
            "covariance_degrees": self.degrees + groups.counts,
            "covariance_scatter_tril": torch.linalg.cholesky(self._scatter(groups)),
        }

    def located(self, values: Mapping[str, Tensor]) -> Quadratic:
        """The components at values of their sites."""
        return Quadratic.normal(values["loc_standard"], values["scale_tril_standard"])

    def expected(self, parameters: Mapping[str, Tensor]) -> Quadratic:
        """E[log Normal(row | mu_k, Sigma_k)] under the posterior, a quadratic form of the row."""
        degrees, factor = parameters["covariance_degrees"], parameters["covariance_scatter_tril"]
        log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_precision = multidigamma(degrees / 2, self.size) + self.size * math.log(2) - 2 * log_det
        constant = self.size * (math.log(2 * math.pi) + 1 / parameters["loc_strength"])
        root = factor * degrees.rsqrt()[:, None, None]
        return Quadratic((log_precision - constant) / 2, parameters["loc_mean"], root)

    def kl(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """KL(posterior || prior), summed over components: a scalar in nats."""
        degrees, factor = parameters["covariance_degrees"], parameters["covariance_scatter_tril"]
        own = InverseWishartCholesky(degrees, factor, validate_args=False)
        solved = torch.linalg.solve_triangular(factor, parameters["loc_mean"].unsqueeze(-1), upper=False)
        ratio = self.strength / parameters["loc_strength"]
        pulled = self.strength * degrees * solved.square().sum((-1, -2))
        means = (pulled + self.size * (ratio - 1 - ratio.log())).sum() / 2
        return kl_divergence(own, self._prior(factor)).sum() + means
