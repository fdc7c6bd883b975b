r"""Linear latent variables: probabilistic principal components and factor analysis, and their limit without noise.

.. math:: z_i \sim \mathrm{Normal}(0, I), \quad x_i \sim \mathrm{Normal}(b + W z_i, \Psi)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ppl_gen.arguments import require_choice
from ppl_gen.data.arrays import as_array, largest
from ppl_gen.data.inputs import check_width, entries, row_width
from ppl_gen.errors import require_positive, require_whole
from ppl_gen.models.linear.program import LinearProgram
from ppl_gen.models.linear.steps import LinearGaussian, Prior
from ppl_gen.nn.row_moments import RowMoments, row_moments
from ppl_gen.program.program import Program, Recipe

__all__ = ["PrincipalComponents", "factor_analysis", "ppca", "principal_components"]

Guide = Literal["exact", "full", "diagonal"]
_LARGEST = 1e150  # squares of it are finite in float64
_LARGE = 2**20  # numbers: of fewer, products in float64 cost nothing
_CLEAR = 1e-4  # noise variance over the largest eigenvalue; products in float32 err by some 1e-8 of the latter
_GUIDES = ("exact", "full", "diagonal")


def ppca(
    features: int | None = None,
    latent: int = 2,
    *,
    prior: Literal["weak", "flat"] = "weak",
    guide: Guide = "exact",
    start: Literal["random", "principal"] = "principal",
    floor: float = 1e-6,
) -> Recipe:
    r"""Probabilistic principal component analysis of rows of numbers (N x features), entries missing or not.

    .. math:: p(x_i) = \mathrm{Normal}(x_i \mid b, W W^\top + \sigma^2 I), \quad
              p(z_i \mid x_i) = \mathrm{Normal}(M^{-1} W^\top (x_i - b), \sigma^2 M^{-1}), \quad
              M = W^\top W + \sigma^2 I

    One program for EM (maximum likelihood, or a posteriori), SVI and NUTS. Evidence and posterior of ``z`` are exact
    for all of them. Data ``{"x": x, "mask": seen}`` leave out the entries where ``seen`` (booleans, N x features) is
    False, whatever finite numbers stand there; ``fit.predict(data)`` draws them.

    Sites: ``loadings_standard``, ``loc_standard`` and ``precision`` in standardised units (columns shifted by their
    means, and all divided by the root of their mean variance); ``z`` and ``x`` for each row; in the user's units
    ``loadings`` (W), ``loc`` (b) and ``noise`` (sigma).

    W is known up to a rotation of the latents: compare W W', or subspaces. Draws of NUTS are rotated onto each other.

    A million numbers or more that are given in float32 are multiplied in float32, in chunks that are summed in float64:
    entries of the covariance err by some 1e-7 of the standard deviations of their columns, the log-likelihood in the
    history of EM by as much of itself. Where the noise variance found is below 1e-4 of the largest eigenvalue, or data
    are in float64, all is in float64.

    Args:
        features: columns of the data; None: as many as they have.
        latent: dimensions of z, fewer than features.
        prior: "weak": W and b Normal(0, 1), the precision exponential with mean 100, all in standardised units.
            "flat": none, and SVI gives a point estimate, the one of greatest likelihood; with a guide that is not
            "exact" this is the linear variational autoencoder.
        guide: q(z | x) of SVI: "exact", computed from the global sites, with missing entries too; or learned and linear
            in x, with a "full" covariance or a "diagonal" one (which turns the columns of W orthogonal).
        start: where algorithms begin: "principal", the closed form (see `principal_components`; a missing entry is
            its column's mean there), or "random". On complete rows the closed form is what EM looks for: it stays there
            and says so after two steps. It takes one pass over the rows and one eigendecomposition, none randomised.
        floor: the least noise variance under maximum likelihood, relative to the mean variance of the data.

    Returns:
        A recipe; it raises ValueError for data of another shape, or without any variance.

    Raises:
        ValueError: for an argument out of its range.

    References:
        Probabilistic principal component analysis (Tipping and Bishop, 1999).
        Don't blame the ELBO! A linear VAE perspective on posterior collapse (Lucas et al., 2019).

    Example:
        >>> import torch, ppl_gen as pg
        >>> from ppl_gen.inference import EM
        >>> x = torch.randn(200, 1, dtype=torch.float64) * torch.tensor([3.0, 2.0, 1.0]) + torch.randn(200, 3)
        >>> fit = pg.fit(ppca(latent=1), x, EM(), seed=0)
        >>> found, closed = fit.posterior(draws=1), principal_components(x, 1)
        >>> torch.allclose(found["noise"][0], closed.noise, atol=1e-5), fit.evidence().exact
        (True, True)
    """
    _check(features, latent, prior, guide, start, floor)
    chosen = _Choice("ppca", features, int(latent), prior, guide, start, floor, isotropic=True)
    arguments = {"features": features, "latent": latent}
    return Recipe(chosen.build, name="ppca", arguments=arguments, as_given=True)


def factor_analysis(
    features: int | None = None,
    latent: int = 2,
    *,
    prior: Literal["weak", "flat"] = "weak",
    guide: Guide = "exact",
    start: Literal["random", "principal"] = "random",
    floor: float = 1e-6,
) -> Recipe:
    r"""Factor analysis of rows of numbers (N x features): every column has a noise variance of its own.

    .. math:: p(x_i) = \mathrm{Normal}(x_i \mid b, W W^\top + \mathrm{diag}(\psi)), \quad
              p(z_i \mid x_i) = \mathrm{Normal}(G W^\top \Psi^{-1} (x_i - b), G), \quad
              G = (I + W^\top \Psi^{-1} W)^{-1}

    As `ppca` in everything else, except that each column is divided by its own standard deviation: factors do not
    depend on the units of the columns. EM reads complete rows once, for their covariance.

    Sites: as `ppca`; ``noise`` (the root of psi) has one number for each column.

    Args:
        features: columns of the data; None: as many as they have.
        latent: factors, fewer than features.
        prior: as for `ppca`.
        guide: as for `ppca`; a "diagonal" one is exact only where the columns of Psi^(-1/2) W are orthogonal.
        start: "random", or "principal" as for `ppca`, which is no maximum here.
        floor: the least noise variance of a column under maximum likelihood, relative to its variance (Heywood cases).

    Returns:
        A recipe; it raises ValueError for data of another shape, or with a constant column.

    Raises:
        ValueError: for an argument out of its range.

    References:
        EM algorithms for ML factor analysis (Rubin and Thayer, 1982).
        Parameter expansion to accelerate EM: the PX-EM algorithm (Liu, Rubin and Wu, 1998).

    Example:
        >>> import torch, ppl_gen as pg
        >>> from ppl_gen.inference import EM
        >>> x = torch.randn(100, 1) * torch.ones(4) + torch.tensor([0.1, 0.3, 0.6, 1.0]) * torch.randn(100, 4)
        >>> fit = pg.fit(factor_analysis(latent=1), x, EM(), seed=0)
        >>> bool((fit.posterior(draws=1)["noise"][0].diff() > 0).all())
        True
    """
    _check(features, latent, prior, guide, start, floor)
    chosen = _Choice("factor_analysis", features, int(latent), prior, guide, start, floor, isotropic=False)
    return Recipe(
        chosen.build, name="factor_analysis", arguments={"features": features, "latent": latent}, as_given=True
    )


def _check(features: int | None, latent: int, prior: str, guide: str, start: str, floor: float) -> None:
    check_width("features", features)
    require_whole("latent", latent)
    if features is not None:
        _check_latent(features, latent)
    for name, given, known in (
        ("prior", prior, ("weak", "flat")),
        ("guide", guide, _GUIDES),
        ("start", start, ("random", "principal")),
    ):
        require_choice(name, given, known)
    require_positive("floor", floor)


def _check_latent(features: int, latent: int) -> None:
    if latent >= features:
        raise ValueError(f"latent: expected fewer than the {features} features, got {latent}")


@dataclass(frozen=True)
class _Choice:
    """The arguments of a recipe, and what makes of them and of the data a program."""

    name: str
    features: int | None
    latent: int
    prior: str
    guide: Guide
    start: str
    floor: float
    isotropic: bool

    def build(self, data: Any) -> Program:
        x, mask = _rows(data, self.name, self.features)
        features = x.shape[1]
        _check_latent(features, self.latent)
        found, closed = self._moments(x) if mask is None else (None, None)
        if found is None:
            loc, variance = _column_moments(x, mask)
        else:
            loc, variance = found.mean, found.variances
        constant = variance <= 1e-24 * (1 + loc.square())
        if bool(constant.all() if self.isotropic else constant.any()):
            columns = ", ".join(map(str, constant.nonzero().squeeze(-1).tolist()))
            raise ValueError(
                f"data: column(s) {columns} are constant: they have no variance to explain; leave them out"
            )
        scale = (variance.mean() if self.isotropic else variance).sqrt()
        prior = Prior(1.0, 0.01) if self.prior == "weak" else None
        single = found is not None and found.single
        steps = LinearGaussian(loc, scale, self.latent, self.isotropic, prior, self.floor, single)
        if found is not None:
            steps.memory.keep(x, found)
        first = self._principal(steps, x, mask, found, closed) if self.start == "principal" else None
        return LinearProgram(steps, self.guide, first).program(self.name)

    def _moments(self, x: Tensor) -> tuple[RowMoments, PrincipalComponents | None]:
        """Of complete rows, and the closed form where it was found on the way.

        Products are in float32 where rows are, and no noise that matters drowns in their rounding.
        """
        if self.isotropic and x.numel() >= _LARGE:
            found = row_moments(x, single=True)
            closed = _closed_form(found, self.latent)
            if not found.single or closed.noise.square() > _CLEAR * closed.variances[0]:
                return found, closed
        return row_moments(x), None

    def _principal(
        self,
        steps: LinearGaussian,
        x: Tensor,
        mask: Tensor | None,
        found: RowMoments | None,
        closed: PrincipalComponents | None,
    ) -> dict[str, Tensor]:
        """Where algorithms begin: the closed form of standardised ``x`` (N x features)."""
        moments = row_moments(steps.standardised(x.double(), mask)) if found is None else steps.scaled(found)
        if closed is not None:  # in the units of x, and one scale for all columns
            unit = steps.scale
            closed = PrincipalComponents(moments.mean, closed.axes, closed.variances / unit**2, closed.noise / unit)
        else:
            closed = _closed_form(moments, self.latent)
        noise = closed.noise.square()
        if not self.isotropic:
            noise = (moments.variances - closed.loadings.square().sum(1)).clamp(min=0.01)
        values = {"loadings_standard": closed.loadings, "loc_standard": closed.loc}
        return values | {"precision": 1 / noise.clamp(min=self.floor)}


def _rows(data: Any, name: str, features: int | None) -> tuple[Tensor, Tensor | None]:
    """The entries x and mask, N x features each."""
    rows, mask = entries(data, name, "x", "mask")
    assert rows is not None  # the first entry
    if rows.dim() != 2:
        features = row_width(features, data, name)
    if rows.dim() != 2 or rows.shape[1] != (features or rows.shape[1]):
        raise ValueError(f"data: {name}(features={features}) takes rows of {features} columns, got {tuple(rows.shape)}")
    if mask is not None and (mask.dtype is not torch.bool or mask.shape != rows.shape):
        raise ValueError(
            f"data 'mask': expected booleans of shape {tuple(rows.shape)}, True where x is observed, got {mask.dtype} "
            f"of shape {tuple(mask.shape)}"
        )
    if mask is not None and bool((mask.sum(0) < 2).any()):
        column = int((mask.sum(0) < 2).nonzero()[0])
        raise ValueError(f"data 'mask': column {column} has fewer than two observed entries; leave it out")
    return rows, mask


def _column_moments(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and variance of each column over its observed entries, in float64; both are N x features."""
    assert mask is not None
    count, x = mask.sum(0), x.double()
    mean = torch.where(mask, x, 0.0).sum(0) / count
    return mean, torch.where(mask, x - mean, 0.0).square().sum(0) / count


@dataclass(frozen=True, eq=False)
class PrincipalComponents:
    r"""The closed form of `ppca`, and principal component analysis, its limit as sigma goes to 0.

    Args:
        loc: b, the mean of the rows (features).
        axes: the leading eigenvectors of the covariance, features x latent.
        variances: their eigenvalues, falling (latent).
        noise: sigma, the root of the mean of the other eigenvalues; one number.
    """

    loc: Tensor
    axes: Tensor
    variances: Tensor
    noise: Tensor

    @property
    def loadings(self) -> Tensor:
        """W = U (L - sigma^2 I)^(1/2), features x latent."""
        return self.axes * (self.variances - self.noise.square()).clamp(min=0.0).sqrt()

    def codes(self, x: Tensor) -> Tensor:
        r"""What p(z | x) becomes without noise: all of it at (W'W)^-1 W'(x - b), rows x latent, with covariance 0."""
        w = self.loadings
        rows = torch.as_tensor(as_array(x, "x")).double()
        if rows.dim() != 2 or rows.shape[1] != len(w) or not len(rows) or not bool((rows.abs() <= _LARGEST).all()):
            raise ValueError(
                f"x: expected a matrix of finite numbers, rows x {len(w)} features, got shape {tuple(rows.shape)}"
            )
        return torch.linalg.lstsq(w, (rows.to(w) - self.loc).mT).solution.mT


def principal_components(x: Tensor, latent: int) -> PrincipalComponents:
    r"""The maximum of the likelihood of `ppca` on complete rows.

    .. math:: \sigma^2 = \frac{1}{d - q} \sum_{j > q} \lambda_j, \quad W = U_q (\Lambda_q - \sigma^2 I)^{1/2}

    with eigenvalues and eigenvectors of the covariance of the rows, divided by N; in float64.

    Args:
        x: N x features.
        latent: q, fewer than features.

    Raises:
        ValueError: for rows that are no matrix of finite numbers, or ``latent`` out of range.

    References:
        Probabilistic principal component analysis, appendix A (Tipping and Bishop, 1999).

    Example:
        >>> x = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> found = principal_components(x, 1)
        >>> found.loadings.abs().squeeze(), found.noise
        (tensor([1.2247, 0.0000], dtype=torch.float64), tensor(0.7071, dtype=torch.float64))
    """
    require_whole("latent", latent)
    rows = torch.as_tensor(as_array(x, "x"))
    if rows.dim() != 2 or not rows.numel() or not largest(rows) <= _LARGEST:
        raise ValueError(f"x: expected a matrix of finite numbers, rows x features, got shape {tuple(rows.shape)}")
    _check_latent(rows.shape[1], latent)
    return _closed_form(row_moments(rows), int(latent))


def _closed_form(moments: RowMoments, latent: int) -> PrincipalComponents:
    values, vectors, rest = moments.leading(latent)
    return PrincipalComponents(moments.mean, vectors, values, rest.sqrt())
