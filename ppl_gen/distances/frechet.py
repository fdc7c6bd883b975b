r"""The Frechet distance between two sets of features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ppl_gen.distances.rows import two_sets

__all__ = ["frechet_distance"]


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    r"""The squared Wasserstein-2 distance between the normals that have the means and covariances of two sets.

    .. math:: |\mu_a - \mu_b|^2 + \mathrm{tr}\bigl(\Sigma_a + \Sigma_b
              - 2 (\Sigma_a^{1/2} \Sigma_b \Sigma_a^{1/2})^{1/2}\bigr)

    Of images it is taken between the features of one classifier, and says something only together with that: name it
    beside every figure. In the features of the Inception network of Szegedy et al. it is the "FID" of the literature;
    in those of any other it is another number on another scale.

    Covariances are those of a sample (divided by rows - 1), computed in double precision. The estimate from finite sets
    is too large, the more so the fewer the rows and the more the features: compare values from equal numbers of rows
    alone, and beside the value between two sets of real rows.

    Args:
        features_a: rows x numbers; further dimensions are flattened.
        features_b: as ``features_a``, perhaps another number of rows.

    Returns:
        A number of at least 0, in squared units of the features.

    Raises:
        ValueError: for fewer than two rows, rows of different width, or values that are not finite.
        TypeError: for what is no tensor or array of real numbers.

    References:
        GANs trained by a two time-scale update rule converge to a local Nash equilibrium (Heusel et al., 2017);
        the Frechet distance between multivariate normal distributions (Dowson and Landau, 1982).

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 5.0], [4.0, 3.0]])
        >>> round(frechet_distance(x, x + torch.tensor([3.0, 4.0])), 6)
        25.0
    """
    (mean_a, cov_a), (mean_b, cov_b) = (
        _moments(rows) for rows in two_sets(("features_a", "features_b"), features_a, features_b)
    )
    root = _root(cov_a)
    shared = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0.0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2.0 * shared
    return float(distance.clamp_min(0.0))


def _moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    wide: Any = rows.detach().to("cpu", torch.float64)
    centred = wide - wide.mean(0)
    return wide.mean(0), centred.mT @ centred / (len(wide) - 1)


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp_min(0.0).sqrt()) @ vectors.mT
