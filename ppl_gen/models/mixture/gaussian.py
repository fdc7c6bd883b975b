r"""Gaussian mixtures: one program for EM, CAVI, SVI and NUTS.

.. math:: w \sim \mathrm{Dirichlet}(\alpha), \quad (\mu_k, \Sigma_k) \sim \text{conjugate prior}, \quad
          z_i \sim \mathrm{Categorical}(w), \quad x_i \sim \mathrm{Normal}(\mu_{z_i}, \Sigma_{z_i})

Means and variances are sampled in standardised units (data of mean 0 and variance 1) and appear in the user's as
``loc`` and ``scale`` (or ``covariance``). The density of ``x`` is in the user's units throughout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ppl_gen.arguments import require_choice
from ppl_gen.data.atoms import atoms, spoken
from ppl_gen.data.inputs import entries
from ppl_gen.errors import require_positive, require_whole
from ppl_gen.models.mixture.steps import Components, Mixture, Standard
from ppl_gen.models.relabelling import matched_order, permuted
from ppl_gen.nn.normal_gamma import NormalGamma
from ppl_gen.nn.normal_wishart import NormalWishart
from ppl_gen.nn.row_moments import column_moments
from ppl_gen.program.program import Program, Recipe

__all__ = ["gaussian_mixture", "spread_means"]

_SEEDS = 2**16  # rows among which starting means are chosen

Covariance = Literal["spherical", "diagonal", "full"]
Weights = Literal["free", "equal"]


def gaussian_mixture(
    components: int,
    *,
    covariance: Covariance = "full",
    weights: Weights = "free",
    concentration: float = 2.0,
    strength: float = 0.01,
    degrees: float | None = None,
    spread: float | None = None,
    floor: float = 1e-6,
) -> Recipe:
    r"""A mixture of Gaussians, for numbers (N) or vectors (N x d).

    .. math:: p(x_i) = \sum_k w_k \, \mathrm{Normal}(x_i \mid \mu_k, \Sigma_k)

    One program serves EM (maximum likelihood, or a posteriori), CAVI, SVI and NUTS. The priors are conjugate and, with
    their defaults, weak: a mean is worth a hundredth of a row, a variance d + 2 rows (Fraley and Raftery 2007). Prior
    settings are in standardised units: each column is shifted by its mean and divided by its standard deviation, a
    spherical mixture's columns all by the root of their mean variance.

    Sites: ``weights`` (K; absent if equal or K = 1), ``loc_standard``, and ``precision`` (K, or K x d if diagonal) or
    ``scale_tril_standard`` (K x d x d, full covariances of vectors); ``assignment`` and ``x`` for each row; in the
    user's units ``loc``, and ``scale`` or ``covariance``.

    The likelihood of a mixture is unbounded: a component may shrink onto one row. Under maximum likelihood no variance
    (or eigenvalue of a full covariance) falls below ``floor`` times the variance of the data; the priors do the same
    for all other algorithms.

    Args:
        components: K.
        covariance: what the covariances of vectors look like; for numbers all three are the same.
        weights: "equal" fixes them at 1 / K.
        concentration: alpha of the Dirichlet prior of the weights; 1 is uniform, 2 keeps each of
            them above zero.
        strength: kappa, how many rows the prior of a mean is worth.
        degrees: nu, how many rows the prior of a variance is worth; d + 2 unless given.
        spread: the prior scale of a variance in units of the variance of the data; K^(-2/d) unless given.
        floor: the least variance under maximum likelihood, in the same units.

    Returns:
        A recipe; it raises ValueError for data with fewer rows than components, or with a constant column.

    Raises:
        ValueError: for an argument out of its range.

    References:
        Bayesian regularization for normal mixture estimation and model-based clustering (Fraley and Raftery, 2007).
        Pattern Recognition and Machine Learning, chapters 9 and 10 (Bishop, 2006).

    Example:
        >>> import torch, ppl_gen as pg
        >>> x = torch.tensor([1.0, 1.2, 0.9, 1.1, 5.0, 5.3, 4.8], dtype=torch.float64)
        >>> print(pg.check(gaussian_mixture(components=2), x))  # doctest: +ELLIPSIS
        gaussian_mixture: data plate 'data' over 7 rows
        site          kind                 distribution  batch  event  plates  guide
        weights       latent               Dirichlet     []     [2]    -       -
        precision     latent               Gamma         []     [2]    -       -
        loc_standard  latent               Normal        []     [2]    -       -
        ...
    """
    _check_arguments(components, covariance, weights)
    numbers = {
        "concentration": concentration,
        "strength": strength,
        "degrees": degrees,
        "spread": spread,
        "floor": floor,
    }
    for name, value in numbers.items():
        if value is not None or name not in ("degrees", "spread"):
            require_positive(name, value)

    def build(data: Any) -> Program:
        rows = _rows(data, components)
        standard = _standard(rows, common=covariance == "spherical")
        size = rows.shape[1] if rows.dim() == 2 else 1
        nu = size + 2.0 if degrees is None else float(degrees)
        wide = components ** (-2 / size) if spread is None else float(spread)
        event = tuple(rows.shape[1:])
        matrices = covariance == "full" and bool(event)
        least = max(size - 1, 1) if matrices else 1
        if not nu > least:
            raise ValueError(f"degrees: expected more than {least} for {size}-dimensional rows, got {degrees}")
        gaussian: Components
        if matrices:
            gaussian = NormalWishart(components, event, strength, nu, wide, floor)
        else:
            shared = covariance == "spherical" and bool(event)
            gaussian = NormalGamma(components, event, shared, strength, nu, wide, floor)
        free = weights == "free" and components > 1
        some = _some(rows)
        made = _program(Mixture(gaussian, standard, free, concentration), standard.scaled(some))
        return replace(made, notes=_repeated(some))

    arguments = {"components": components, "covariance": covariance, "weights": weights}
    return Recipe(build, name="gaussian_mixture", arguments=arguments, as_given=True)


def _repeated(rows: Tensor) -> dict[str, str]:
    """A note on values that many rows share."""
    if not (found := atoms(rows)):
        return {}
    held = "a component shrinks onto it as far as floor or priors let it, and the evidence goes with it"
    return {"repeated values": f"{spoken(found)}: {held}"}


def _check_arguments(components: int, covariance: str, weights: str) -> None:
    require_whole("components", components)
    require_choice("covariance", covariance, ("spherical", "diagonal", "full"))
    require_choice("weights", weights, ("free", "equal"))


def _rows(data: Any, components: int) -> Tensor:
    """The entry x, N or N x d."""
    (rows,) = entries(data, "gaussian_mixture", "x")
    assert rows is not None  # the first entry
    if rows.dim() not in (1, 2):
        raise ValueError(f"data: gaussian_mixture takes numbers (N) or vectors (N x d), got shape {tuple(rows.shape)}")
    if len(rows) < components:
        raise ValueError(f"components: {components} of them need at least as many rows, and the data has {len(rows)}")
    return rows


def _some(rows: Tensor) -> Tensor:
    """Rows for starting means to be chosen from, in float64: all, or as many from all over large data."""
    every = torch.arange(_SEEDS, device=rows.device) * len(rows) // _SEEDS
    return (rows if len(rows) <= _SEEDS else rows[every]).double()


def _standard(rows: Tensor, common: bool) -> Standard:
    """The units, in float64, in which ``rows`` (N or N x d) are standardised."""
    loc, variance, equal = column_moments(rows)
    constant = equal | (variance == 0)
    if bool(constant.all() if common else constant.any()):
        columns = ", ".join(map(str, constant.reshape(-1).nonzero().squeeze(-1).tolist()))
        where = f"column(s) {columns} of the data are" if rows.dim() == 2 else "all values of the data are"
        raise ValueError(f"data: {where} constant: a density in that direction does not exist; leave them out")
    return Standard(loc, (variance.mean() if common else variance).sqrt(), rows.shape[1] if rows.dim() == 2 else 1)


def _program(mixture: Mixture, rows: Tensor) -> Program:
    """``rows``: standardised, N x d."""
    gaussian = mixture.gaussian

    def gaussian_mixture(x: Tensor) -> None:
        like = x if x.is_floating_point() else x.to(torch.get_default_dtype())
        equal = like.new_full((gaussian.components,), 1 / gaussian.components)
        prior = dist.Dirichlet(torch.full_like(equal, mixture.concentration))
        weights = pyro.sample("weights", prior) if mixture.free else equal
        located = gaussian.expose(gaussian.sample(like), *mixture.standard.on(like))
        with pyro.plate("data", len(x)):
            assignment = pyro.sample("assignment", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("x", gaussian.observation(located, assignment), obs=like)

    def start() -> dict[str, Tensor]:
        """Means spread over the data, and the variance of the data for all: a smooth start for EM."""
        values = gaussian.start(spread_means(rows, gaussian.components))
        return values | ({"weights": mixture.equal(rows)} if mixture.free else {})

    def relabel(draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Components by their mean for numbers; for vectors, matched to their average over the draws."""
        loc = draws["loc_standard"]
        order = matched_order(loc) if gaussian.event else loc.argsort(-1)
        return permuted(draws, order, {"weights": -1, **gaussian.axes}, labels=["assignment"])

    return Program(
        gaussian_mixture,
        start=start,
        relabel=relabel if gaussian.components > 1 else None,
        em=mixture.em(),
        cavi=mixture.cavi(start),
    )


def spread_means(rows: Tensor, components: int) -> Tensor:
    """Starting means, K x d, of rows N x d: jittered quantiles of numbers; rows far from each other of vectors.

    References:
        k-means++: the advantages of careful seeding (Arthur and Vassilvitskii, 2007).
    """
    if rows.shape[1] == 1:
        edge = 1 / (2 * components + 2)
        places = torch.linspace(edge, 1 - edge, components) if components > 1 else torch.tensor([0.5])
        places = places + (torch.rand(components, device=places.device) - 0.5) / (2 * components)
        return rows.quantile(places.to(rows), dim=0)
    chosen = [int(torch.randint(len(rows), ()))]
    distance = rows.new_full((len(rows),), torch.inf)
    while len(chosen) < components:
        distance = torch.minimum(distance, (rows - rows[chosen[-1]]).square_().sum(-1))
        # Where all rows coincide with one that is chosen, any row will do.
        chosen.append(int(torch.multinomial(distance + torch.finfo(rows.dtype).tiny, 1)))
    return rows[chosen]
