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

from ppl_gen.models.linear.expectation import Patterns, blended, complete, masked, sorted_patterns
from ppl_gen.nn.row_moments import RowMoments, row_moments
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
    """The moments of the rows that a program was built for, until a run takes them; they stay behind in a pickle."""

    def __init__(self) -> None:
        self.rows: Tensor | None = None
        self.found: RowMoments | None = None
        self.version, self.probe = 0, torch.empty(0)

    def keep(self, x: Tensor, found: RowMoments) -> None:
        self.rows, self.found = x.detach(), found
        self.version, self.probe = x._version, self._probe(x)

    def take(self, x: Tensor) -> RowMoments | None:
        """The moments, once, if ``x`` are the rows that they are of, and nobody has written to them."""
        rows, found = self.rows, self.found
        self.rows = self.found = None
        if rows is None or (rows.data_ptr(), rows.shape, rows.stride(), rows.dtype) != (
            x.data_ptr(),
            x.shape,
            x.stride(),
            x.dtype,
        ):
            return None
        return found if rows._version == self.version and torch.equal(self.probe, self._probe(x)) else None

    @staticmethod
    def _probe(x: Tensor) -> Tensor:
        """Sums of the columns: what is written through numpy has no version."""
        return x.sum(0)

    def __getstate__(self) -> dict[str, Any]:
        return _Memory().__dict__

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
        single: whether moments of rows in float32 may be computed in it.
    """

    loc: Tensor
    scale: Tensor
    latent: int
    isotropic: bool
    prior: Prior | None
    floor: float
    single: bool = False
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
        return EMSteps(self.m_step, self.e_step, self.prepare, blended)

    def prepare(self, x: Tensor, mask: Tensor | None = None) -> tuple[RowMoments | Patterns]:
        """All that EM reads of the rows: the moments of complete ones, else rows sorted by what is missing."""
        if mask is not None:
            return (sorted_patterns(self.standardised(x.double(), mask), mask),)
        found = self.memory.take(x)
        return (self.scaled(row_moments(x, single=self.single) if found is None else found),)

    def scaled(self, found: RowMoments) -> RowMoments:
        """Moments in standardised units."""
        return found.scaled(*self.on(found.mean))

    def e_step(self, values: Values, rows: RowMoments | Patterns) -> tuple[Tensor, dict[str, Tensor]]:
        """The log-likelihood (total nats), and the expected moments of (z, 1) and y that the M-step needs, per row.

        ``rows`` is what `prepare` makes of the data.
        With k latents, d features: ``zz`` d x (k + 1) x (k + 1) and ``count`` d (both of length 1 where no mask tells
        columns apart); ``yz`` d x (k + 1); ``yy`` d; of z itself ``z_mean`` k and ``z_second`` k x k; ``rows``:
        how many.
        """
        w, mu, weight = self._wide(values, values["loadings_standard"])
        _, scale = self.on(mu)
        constant = -math.log(2 * math.pi) - 2 * scale.log()
        if isinstance(rows, RowMoments):
            return complete(rows, w, mu, weight, constant)
        return masked(rows, w, mu, weight, constant)

    def m_step(
        self, weights: Values, values: Values, prior: bool, rows: RowMoments | Patterns | None = None
    ) -> dict[str, Tensor]:
        r"""Regress y on (z, 1) column by column; what is left over is the noise.

        Under maximum likelihood the latents' own mean and covariance are fitted too and then absorbed into W and mu,
        which leaves the model as it was and takes several times fewer steps (Liu, Rubin and Wu 1998).
        """
        count, zz, yz, yy = (weights[name].to(values["precision"]) for name in ("count", "zz", "yz", "yy"))
        old = values["precision"].to(yy).expand(self.features)
        ridge = zz
        penalised = prior and self.prior is not None
        if penalised:
            assert self.prior is not None
            same = self.isotropic and len(count) == 1
            shrink = 1 / ((old[:1] if same else old) * count * self.prior.spread**2)
            ridge = zz + shrink[:, None, None] * torch.eye(zz.shape[-1], dtype=zz.dtype, device=zz.device)
        if len(ridge) == 1:  # one system for all columns
            line = torch.linalg.solve(ridge[0], yz.mT).mT
        else:
            line = torch.linalg.solve(ridge, yz[..., None]).squeeze(-1)
        again = line @ zz[0] if len(zz) == 1 else (line[:, None, :] @ zz).squeeze(1)
        left = yy - 2 * (line * yz).sum(-1) + (again * line).sum(-1)
        seen = count.expand(self.features)
        if self.isotropic:
            left, seen = (seen * left).sum() / seen.sum(), seen.sum()
        w, mu = line[:, :-1], line[:, -1]
        if penalised:
            assert self.prior is not None
            precision = 1 / (left + 2 * self.prior.rate / seen)
        else:
            precision = 1 / left.clamp(min=self.floor)
            mean = weights["z_mean"].to(w)
            spread = weights["z_second"].to(w) - torch.outer(mean, mean)
            w, mu = w @ torch.linalg.cholesky(spread), mu + w @ mean
        return {"loadings_standard": w, "loc_standard": mu, "precision": precision}

    def _wide(self, values: Values, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """W (features x latent), mu and Lambda (one number for each feature)."""
        w, mu = values["loadings_standard"].to(like), values["loc_standard"].to(like)
        return w, mu, values["precision"].to(like).expand(self.features)
