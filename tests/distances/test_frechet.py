"""The Frechet distance against the closed form between normals."""

import pytest
import scipy.linalg
import torch

from ppl_gen.distances import frechet_distance

CHANCE = torch.Generator().manual_seed(0)


def _with_moments(mean, covariance, rows=200):
    """Rows whose sample mean and covariance are exactly these."""
    raw = torch.randn(rows, len(mean), generator=CHANCE, dtype=torch.float64)
    centred = raw - raw.mean(0)
    own = torch.linalg.cholesky(centred.mT @ centred / (rows - 1))
    white = torch.linalg.solve_triangular(own, centred.mT, upper=False).mT
    return mean + white @ torch.linalg.cholesky(covariance).mT


def _covariance(width):
    root = torch.randn(width, width, generator=CHANCE, dtype=torch.float64)
    return root @ root.mT + 0.1 * torch.eye(width, dtype=torch.float64)


def test_one_dimension_and_independent_columns():
    one = _with_moments(torch.tensor([1.0, -2.0]), torch.diag(torch.tensor([4.0, 0.25], dtype=torch.float64)))
    other = _with_moments(torch.tensor([3.0, 1.0]), torch.diag(torch.tensor([1.0, 9.0], dtype=torch.float64)))
    # |difference of means|^2 + sum of squared differences of standard deviations.
    assert abs(frechet_distance(one, other) - (4 + 9 + 1 + 6.25)) < 1e-6
    assert frechet_distance(one, one) < 1e-6


def test_any_two_normals_against_the_matrix_square_root():
    first, second = _covariance(6), _covariance(6)
    means = torch.randn(2, 6, generator=CHANCE, dtype=torch.float64)
    root = torch.from_numpy(scipy.linalg.sqrtm((first @ second).numpy()).real)
    expected = float((means[0] - means[1]).square().sum() + (first + second - 2 * root).trace())
    found = frechet_distance(_with_moments(means[0], first), _with_moments(means[1], second))
    assert abs(found - expected) < 1e-6 * (1 + expected) and expected > 0.1
    assert abs(found - frechet_distance(_with_moments(means[1], second), _with_moments(means[0], first))) < 1e-6


def test_fewer_rows_than_features_are_no_obstacle_and_make_it_larger():
    few = [torch.randn(20, 50, generator=CHANCE) for _ in range(2)]
    many = [torch.randn(2000, 50, generator=CHANCE) for _ in range(2)]
    assert frechet_distance(*few) > 10 * frechet_distance(*many) > 0


def test_bad_features_are_refused():
    with pytest.raises(ValueError, match="features_b: expected finite numbers"):
        frechet_distance(torch.rand(5, 2), torch.full((5, 2), torch.nan))
    with pytest.raises(TypeError, match="features_a: expected a tensor or an array of real numbers"):
        frechet_distance([1.0, 2.0], torch.rand(5, 2))
