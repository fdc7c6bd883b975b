r"""Linear-Gaussian latent variables in closed form: evidence, posterior, and the steps of EM, with entries missing.

.. math:: z_i \sim \mathrm{Normal}(0, I), \quad y_i \mid z_i \sim \mathrm{Normal}(\mu + W z_i, \Lambda^{-1}), \quad
          x_i = \text{loc} + \text{scale} \cdot y_i

Values are those of the sites ``loadings_standard`` (W, features x latent), ``loc_standard`` (mu) and ``precision``
(the diagonal of Lambda, or one number for all features).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from ppl_gen.program.extensions import EMSteps

__all__ = ["Conditional", "LinearGaussian", "Prior"]

Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class Prior:
    """W and mu are normal around 0 with standard deviation ``spread``, a precision is exponential with ``rate``."""

    spread: float
    rate: float


@dataclass(frozen=True)
class Conditional:
    """p(z | observed entries of x) of each row: Normal(mean, precision^-1), with what the evidence needs beside it.

    ``mean`` is rows x latent; ``precision`` and its ``cholesky`` factor are latent x latent, or, under a mask, rows x
    latent x latent; ``residual`` (y - mu), rows x features, and ``weight`` (Lambda), features or rows x features, are
    zero where an entry is missing; ``fitted`` (rows) is the part of the quadratic form that the latents explain.
    """

    mean: Tensor
    precision: Tensor
    cholesky: Tensor
    residual: Tensor
    weight: Tensor
    fitted: Tensor

    def distribution(self) -> Any:
        """As a distribution over the rows."""
        return dist.MultivariateNormal(self.mean, precision_matrix=self.precision)


class _Memory:
    """The last result of a function of tensors that were the same objects; it stays behind when it is pickled."""

    def __init__(self) -> None:
        self.key: tuple[Tensor, ...] = ()
        self.value: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"key": (), "value": None}

    def __deepcopy__(self, memo: object) -> _Memory:
        return _Memory()


@dataclass(frozen=True, eq=False)
class LinearGaussian:
    """The numbers that fix one program of this family, and its closed forms.

    Args:
        loc: shift of each column.
        scale: what each column is divided by (one number for all columns, or one each).
        latent: dimensions of z.
        isotropic: one noise variance for all columns (probabilistic PCA), or one for each (factor analysis).
        prior: of the global sites; None: flat.
        floor: the least noise variance under maximum likelihood, in standardised units.
    """

    loc: Tensor
    scale: Tensor
    latent: int
    isotropic: bool
    prior: Prior | None
    floor: float
    memory: _Memory = field(default_factory=_Memory, repr=False)

    @property
    def features(self) -> int:
        return len(self.loc)

    def on(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Both, the scale one for each column."""
        return self.loc.to(like), self.scale.to(like).expand(self.features)

    def standardised(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Rows in standardised units, N x features; what is missing is zero."""
        like = x if x.is_floating_point() else x.to(torch.get_default_dtype())
        loc, scale = self.on(like)
        y = (like - loc) / scale
        return y if mask is None else torch.where(mask, y, y.new_zeros(()))

    def conditional(self, values: Values, x: Tensor, mask: Tensor | None = None) -> Conditional:
        r"""p(z | x) = Normal(M^-1 W'Lambda (y - mu), M^-1) with M = I + W'Lambda W, over the entries observed."""
        y = self.standardised(x, mask)
        w, mu = values["loadings_standard"].to(y), values["loc_standard"].to(y)
        weight = values["precision"].to(y).expand(self.features)
        residual, eye = y - mu, torch.eye(self.latent, dtype=y.dtype, device=y.device)
        if mask is None:
            precision = eye + w.mT @ (weight[:, None] * w)
        else:
            residual, weight = torch.where(mask, residual, residual.new_zeros(())), weight * mask
            pairs = (w[:, :, None] * w[:, None, :]).flatten(1)
            precision = eye + (weight @ pairs).unflatten(1, (self.latent, self.latent))
        precision = 0.5 * (precision + precision.mT)  # rounding would show where the noise is small
        cholesky = torch.linalg.cholesky(precision)
        pull = (weight * residual) @ w
        half = torch.linalg.solve_triangular(cholesky, pull[..., None], upper=False)
        mean = torch.linalg.solve_triangular(cholesky.mT, half, upper=True).squeeze(-1)
        return Conditional(mean, precision, cholesky, residual, weight, half.square().sum((-1, -2)))

    def evidence(self, values: Values, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """log Normal(x | mean, WW' + noise) in nats, shape (rows,), over observed entries; forms no covariance."""
        found = self.conditional(values, x, mask)
        _, scale = self.on(found.residual)
        seen = torch.ones_like(scale) if mask is None else mask.to(scale)
        noise = values["precision"].to(scale).expand(self.features).log() - math.log(2 * math.pi) - 2 * scale.log()
        log_det = 2 * found.cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        squares = (found.weight * found.residual.square()).sum(-1)
        return 0.5 * ((seen * noise).sum(-1) - log_det - squares + found.fitted)

    # ------------------------------------------------------------------------------------------------------------- EM

    def em(self) -> EMSteps:
        return EMSteps(self.m_step, self.e_step)

    def e_step(self, values: Values, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The log-likelihood (total nats), and the expected moments of (z, 1) and y that the M-step needs, per row.

        With k latents, d features: ``zz`` d x (k + 1) x (k + 1) and ``count`` d (both of length 1 where no mask tells
        columns apart); ``yz`` d x (k + 1); ``yy`` d; of z itself ``z_mean`` k and ``z_second`` k x k.
        """
        return self._complete(values, x) if mask is None else self._masked(values, x, mask)

    def _complete(self, values: Values, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """All from the mean and the covariance of the rows, which are computed once."""
        mean, covariance = self._moments(x)
        w, mu, weight = self._wide(values, mean)
        offset = mean - mu
        second = covariance + torch.outer(offset, offset)
        precision = torch.eye(self.latent, dtype=w.dtype, device=w.device) + w.mT @ (weight[:, None] * w)
        gain = torch.linalg.solve(precision, (weight[:, None] * w).mT)  # E[z | y] = gain (y - mu)
        crossed = second @ gain.mT
        z, zz = gain @ offset, torch.linalg.inv(precision) + gain @ crossed
        yz = torch.cat([torch.outer(mu, z) + crossed, mean[:, None]], 1)
        squares = (weight * second.diagonal()).sum() - (gain * (second @ (weight[:, None] * w)).mT).sum()
        _, scale = self.on(mean)
        noise = (weight.log() - math.log(2 * math.pi) - 2 * scale.log()).sum()
        log_likelihood = 0.5 * len(x) * (noise - torch.linalg.slogdet(precision)[1] - squares)
        return log_likelihood, {
            "count": x.new_full((1,), len(x), dtype=w.dtype),
            "zz": _augmented(zz, z)[None],
            "yz": yz,
            "yy": covariance.diagonal() + mean.square(),
            "z_mean": z,
            "z_second": zz,
        }

    def _masked(self, values: Values, x: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        found = self.conditional(values, x, mask)
        y, seen = self.standardised(x, mask), mask.to(found.mean)
        zz = torch.cholesky_inverse(found.cholesky) + found.mean[:, :, None] * found.mean[:, None, :]
        moments, count = _augmented(zz, found.mean), seen.sum(0)
        ones = torch.ones_like(found.mean[:, :1])
        return self.evidence(values, x, mask).sum(), {
            "count": count,
            "zz": (seen.mT @ moments.flatten(1) / count[:, None]).unflatten(1, moments.shape[1:]),
            "yz": y.mT @ torch.cat([found.mean, ones], 1) / count[:, None],
            "yy": y.square().sum(0) / count,
            "z_mean": found.mean.mean(0),
            "z_second": zz.mean(0),
        }

    def m_step(
        self, weights: Values, values: Values, prior: bool, x: Tensor, mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        r"""Regress y on (z, 1) column by column; what is left over is the noise.

        Under maximum likelihood the latents' own mean and covariance are fitted too and then absorbed into W and mu,
        which leaves the model as it was and takes several times fewer steps (Liu, Rubin and Wu 1998).
        """
        count, zz, yz, yy = (weights[name] for name in ("count", "zz", "yz", "yy"))
        old = values["precision"].to(yy).expand(self.features)
        ridge = zz
        penalised = prior and self.prior is not None
        if penalised:
            assert self.prior is not None
            shrink = 1 / (old * count * self.prior.spread**2)
            ridge = zz + shrink[:, None, None] * torch.eye(zz.shape[-1], dtype=zz.dtype, device=zz.device)
        line = torch.linalg.solve(ridge.expand(self.features, -1, -1), yz[..., None]).squeeze(-1)
        left = yy - 2 * (line * yz).sum(-1) + (line[:, None, :] @ zz @ line[:, :, None]).flatten()
        rows = count.expand(self.features)
        if self.isotropic:
            left, rows = (rows * left).sum() / rows.sum(), rows.sum()
        w, mu = line[:, :-1], line[:, -1]
        if penalised:
            assert self.prior is not None
            precision = 1 / (left + 2 * self.prior.rate / rows)
        else:
            precision = 1 / left.clamp(min=self.floor)
            mean = weights["z_mean"]
            spread = weights["z_second"] - torch.outer(mean, mean)
            w, mu = w @ torch.linalg.cholesky(spread), mu + w @ mean
        return {"loadings_standard": w, "loc_standard": mu, "precision": precision}

    def _wide(self, values: Values, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """W (features x latent), mu and Lambda (one number for each feature)."""
        w, mu = values["loadings_standard"].to(like), values["loc_standard"].to(like)
        return w, mu, values["precision"].to(like).expand(self.features)

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (features) and covariance (features x features) of complete rows in standardised units."""
        if not (self.memory.key and self.memory.key[0] is x):
            y = self.standardised(x, None)
            mean = y.mean(0)
            self.memory.value = mean, (y - mean).mT @ (y - mean) / len(y)
            self.memory.key = (x,)
        moments: tuple[Tensor, Tensor] = self.memory.value
        return moments


def _augmented(zz: Tensor, z: Tensor) -> Tensor:
    """E[(z, 1)(z, 1)'], ... x (k + 1) x (k + 1), from E[zz'], ... x k x k, and E[z], ... x k."""
    top = torch.cat([zz, z[..., None]], -1)
    bottom = torch.cat([z, torch.ones_like(z[..., :1])], -1)
    return torch.cat([top, bottom[..., None, :]], -2)
