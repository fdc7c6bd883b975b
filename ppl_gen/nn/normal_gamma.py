r"""Gaussian components with independent dimensions under the Normal-Gamma prior, in closed form.

.. math:: \lambda_k \sim \mathrm{Gamma}(\nu/2, \varsigma^2/2), \qquad
          \mu_k \mid \lambda_k \sim \mathrm{Normal}(0, (\kappa\lambda_k)^{-1/2})

in standardised units: the data have mean 0 and variance 1 there.
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

__all__ = ["NormalGamma"]


@dataclass(frozen=True)
class NormalGamma:
    """Components with one precision per dimension, or one for all dimensions.

    Args:
        components: K.
        event: () for data that are numbers, (d,) for data that are vectors.
        shared: one precision for all dimensions (spherical).
        strength: kappa, how many rows the prior of a mean is worth.
        degrees: nu, how many rows the prior of a variance is worth.
        spread: the prior scale of a variance, in units of the variance of the data.
        floor: the least variance that maximum likelihood may reach, in the same units.
    """

    components: int
    event: tuple[int, ...]
    shared: bool
    strength: float
    degrees: float
    spread: float
    floor: float

    full = False

    @property
    def size(self) -> int:
        """d, 1 for numbers."""
        return math.prod(self.event)

    @property
    def axes(self) -> dict[str, int]:
        """Where each site has its components."""
        vector = -1 - len(self.event)
        scalar = -1 if self.shared else vector
        return {"loc_standard": vector, "loc": vector, "precision": scalar, "scale": scalar}

    @property
    def constraints(self) -> dict[str, constraints.Constraint]:
        positive = dict.fromkeys(("loc_strength", "precision_shape", "precision_rate"), constraints.positive)
        return {"loc_mean": constraints.real, **positive}

    def sample(self, like: Tensor) -> dict[str, Tensor]:
        """The prior statements; ``like`` gives dtype and device.

        ``precision`` is K x event, K where it is shared; ``loc_standard`` K x event.
        """
        shape = (self.components,) if self.shared else (self.components, *self.event)
        rate = like.new_full(shape, self.spread / 2)
        gamma = dist.Gamma(torch.full_like(rate, self.degrees / 2), rate)
        precision = pyro.sample("precision", gamma.to_event(len(shape)))
        scale = self._scale(precision) / math.sqrt(self.strength)
        return self._located(precision, torch.zeros_like(rate[..., None] if self._column else rate), scale)

    def guide(self) -> None:
        """The Normal-Gamma posterior at the parameters that the store holds."""
        shape, rate = pyro.param("precision_shape"), pyro.param("precision_rate")
        precision = pyro.sample("precision", dist.Gamma(shape, rate).to_event(rate.dim()))
        strength = pyro.param("loc_strength")
        strength = strength.reshape(-1, *[1] * len(self.event))
        self._located(precision, pyro.param("loc_mean"), self._scale(precision) * strength.rsqrt())

    @property
    def _column(self) -> bool:
        return self.shared and bool(self.event)

    def _scale(self, precision: Tensor) -> Tensor:
        """Standard deviations that broadcast to K x event."""
        scale = precision.rsqrt()
        return scale.unsqueeze(-1) if self._column else scale

    def _located(self, precision: Tensor, mean: Tensor, scale: Tensor) -> dict[str, Tensor]:
        """Both sites; ``mean`` and ``scale`` broadcast to K x event."""
        scale = scale.expand(*scale.shape[: -1 - len(self.event)], self.components, *self.event)
        normal = dist.Normal(mean, scale).to_event(1 + len(self.event))
        return {"precision": precision, "loc_standard": pyro.sample("loc_standard", normal)}

    def expose(self, values: Mapping[str, Tensor], loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Location (K x event) and scale (as the precision) at loc + scale times standardised values, as sites."""
        dims = 1 + len(self.event)
        mean = pyro.deterministic("loc", loc + scale * values["loc_standard"], event_dim=dims)
        width = scale * values["precision"].rsqrt()
        return mean, pyro.deterministic("scale", width, event_dim=1 if self.shared else dims)

    def observation(self, located: tuple[Tensor, Tensor], assignment: Tensor) -> dist.TorchDistribution:
        """The distribution of a row, given its component."""
        loc, scale = located
        if not self.event:
            return dist.Normal(Vindex(loc)[..., assignment], Vindex(scale)[..., assignment])
        scale = scale.unsqueeze(-1) if self.shared else scale
        return dist.Normal(Vindex(loc)[..., assignment, :], Vindex(scale)[..., assignment, :]).to_event(1)

    def start(self, means: Tensor) -> dict[str, Tensor]:
        """Values with these means (K x d) and the variance of the data."""
        shape = (self.components,) if self.shared else (self.components, *self.event)
        return {"loc_standard": means.reshape(-1, *self.event), "precision": means.new_ones(shape)}

    def maximise(self, groups: Moments, prior: bool) -> dict[str, Tensor]:
        """Values of largest likelihood, or of largest posterior density, for rows so grouped; shapes as in `sample`."""
        counts = groups.counts.unsqueeze(-1)
        if prior:
            shape, rate = self._posterior(groups)
            # The mode of (mu, lambda) jointly: the normal density at its own mode adds half a count per dimension.
            precision = (shape - 1 + (self.size if self.shared else 1) / 2) / rate
            means = counts * groups.means / (counts + self.strength)
        else:
            scatter = groups.scatter.mean(-1, keepdim=True) if self.shared else groups.scatter
            precision = 1 / (scatter / counts).clamp_min(self.floor)
            means = groups.means
        return {"loc_standard": means.reshape(-1, *self.event), "precision": self._shaped(precision)}

    def _shaped(self, precision: Tensor) -> Tensor:
        """A precision, or a parameter of its posterior, K x d or K x 1, in the shape of the site."""
        return precision.squeeze(-1) if self.shared or not self.event else precision

    def _posterior(self, groups: Moments) -> tuple[Tensor, Tensor]:
        """Shape and rate of the Gamma posterior, K x d or K x 1."""
        counts = groups.counts.unsqueeze(-1)
        shrunk = self.strength * counts / (self.strength + counts) * groups.means.square()
        squares = groups.scatter + shrunk
        rows = counts * self.size if self.shared else counts.expand_as(squares)
        squares = squares.sum(-1, keepdim=True) if self.shared else squares
        return (self.degrees + rows) / 2, (self.spread + squares) / 2

    def update(self, groups: Moments) -> dict[str, Tensor]:
        """Parameters of the Normal-Gamma posterior for rows so grouped.

        ``loc_mean``: K x event; ``loc_strength``: K; shape and rate as the precision in `sample`.
        """
        shape, rate = self._posterior(groups)
        strength = self.strength + groups.counts
        means = (groups.counts / strength).unsqueeze(-1) * groups.means
        return {
            "loc_mean": means.reshape(-1, *self.event),
            "loc_strength": strength,
            "precision_shape": self._shaped(shape),
            "precision_rate": self._shaped(rate),
        }

    def _parameters(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean (K x d), strength (K), shape and rate (K x d, or K x 1 where the precision is shared)."""
        mean, shape, rate = (parameters[name] for name in ("loc_mean", "precision_shape", "precision_rate"))
        columns = (self.components, -1)
        return mean.reshape(columns), parameters["loc_strength"], shape.reshape(columns), rate.reshape(columns)

    def located(self, values: Mapping[str, Tensor]) -> Quadratic:
        """The components at values of their sites."""
        mean, precision = (values[name].reshape(self.components, -1) for name in ("loc_standard", "precision"))
        return Quadratic.normal(mean, precision.rsqrt().expand_as(mean))

    def expected(self, parameters: Mapping[str, Tensor]) -> Quadratic:
        """E[log Normal(row | mu_k, lambda_k)] under the posterior, a quadratic form of the row."""
        mean, strength, shape, rate = self._parameters(parameters)
        log_precision = (shape.digamma() - rate.log()).expand_as(mean).sum(-1)
        constant = (log_precision - self.size * math.log(2 * math.pi) - self.size / strength) / 2
        return Quadratic(constant, mean, (rate / shape).sqrt().expand_as(mean))

    def kl(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """KL(posterior || prior), summed over components: a scalar in nats."""
        mean, strength, shape, rate = self._parameters(parameters)
        own = torch.distributions.Gamma(shape, rate)
        half = torch.full_like(rate, 0.5)
        prior = torch.distributions.Gamma(self.degrees * half, self.spread * half)
        ratio = self.strength / strength
        means = self.strength * (mean.square() * own.mean).sum() + self.size * (ratio - 1 - ratio.log()).sum()
        return kl_divergence(own, prior).sum() + means / 2
