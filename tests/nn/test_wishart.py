"""The inverse Wishart distribution of Cholesky factors against torch's Wishart and Gamma, and against its own draws.

Float64; closed forms in three dimensions take a few dozen roundings on values of order 10, so 1e-10 is generous.
Averages of draws are held to |z| < 6: false alarms below 20 * 2e-9.
"""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Gamma, Wishart, biject_to, kl_divergence

from ppl_gen.nn.wishart import InverseWishartCholesky

FLOAT = torch.float64


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        yield


def scale_tril():
    return torch.tensor([[1.5, 0.0, 0.0], [0.4, 0.8, 0.0], [-0.3, 0.5, 1.1]], dtype=FLOAT)


def lower(matrix):
    return matrix[tuple(torch.tril_indices(*matrix.shape))]


def unlower(vector, size):
    matrix = vector.new_zeros(size, size)
    return matrix.index_put(tuple(torch.tril_indices(size, size)), vector)


def test_log_density_is_that_of_a_wishart_precision_times_the_jacobian():
    psi = scale_tril() @ scale_tril().T
    df = torch.tensor(5.3, dtype=FLOAT)
    ours = InverseWishartCholesky(df, scale_tril())
    wishart = Wishart(df, covariance_matrix=torch.linalg.inv(psi))
    for factor in ours.sample((4,)):
        jacobian = torch.autograd.functional.jacobian(
            lambda v: lower(torch.linalg.inv(unlower(v, 3) @ unlower(v, 3).T)), lower(factor)
        )
        expected = wishart.log_prob(torch.linalg.inv(factor @ factor.T)) + torch.linalg.slogdet(jacobian)[1]
        torch.testing.assert_close(ours.log_prob(factor), expected, rtol=0, atol=1e-10)


def test_draws_have_the_mean_of_the_inverse_wishart():
    count, df = 40_000, 9.0
    factors = InverseWishartCholesky(df, scale_tril()).sample((count,))
    draws = factors @ factors.mT
    mean = scale_tril() @ scale_tril().T / (df - 3 - 1)
    z = (draws.mean(0) - mean) / (draws.std(0) / count**0.5)
    assert z.abs().max() < 6
    wrong = (draws.mean(0) - 1.1 * mean) / (draws.std(0) / count**0.5)
    assert wrong.abs().max() > 6  # the sample is large enough to see a tenth


def test_divergence_is_the_mean_log_ratio_of_draws():
    q = InverseWishartCholesky(6.0, scale_tril())
    p = InverseWishartCholesky(4.5, 0.7 * torch.eye(3, dtype=FLOAT))
    draws = q.sample((40_000,))
    ratio = q.log_prob(draws) - p.log_prob(draws)
    assert abs(float((ratio.mean() - kl_divergence(q, p)) / (ratio.std() / 200))) < 6
    assert kl_divergence(q, p) > 0.1
    assert abs(float(kl_divergence(p, p))) < 1e-12


def test_in_one_dimension_the_precision_is_gamma():
    df, psi = torch.tensor(3.7, dtype=FLOAT), torch.tensor(0.6, dtype=FLOAT)
    q, p = (InverseWishartCholesky(d, s.sqrt().reshape(1, 1)) for d, s in ((df, psi), (df + 1, 2 * psi)))
    gamma, other = Gamma(df / 2, psi / 2), Gamma((df + 1) / 2, psi)
    torch.testing.assert_close(kl_divergence(q, p), kl_divergence(gamma, other), rtol=0, atol=1e-10)
    factor = torch.tensor([[0.8]], dtype=FLOAT)
    jacobian = (2 / factor**3).log().squeeze()  # of 1 / factor^2
    expected = gamma.log_prob(factor.squeeze() ** -2) + jacobian
    torch.testing.assert_close(q.log_prob(factor), expected, rtol=0, atol=1e-10)


def test_unconstrained_vectors_and_factors_correspond():
    transform = biject_to(InverseWishartCholesky.support)
    vector = torch.randn(2, 6, dtype=FLOAT)
    factors = transform(vector)
    assert bool(InverseWishartCholesky.support.check(factors).all())
    assert transform.forward_shape(vector.shape) == factors.shape
    assert transform.inverse_shape(factors.shape) == vector.shape
    torch.testing.assert_close(transform.inv(factors), vector, rtol=0, atol=1e-12)
    for row, factor in zip(vector, factors, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda v: lower(transform(v)), row)
        expected = torch.linalg.slogdet(jacobian)[1]
        torch.testing.assert_close(transform.log_abs_det_jacobian(row, factor), expected, rtol=0, atol=1e-12)


def test_gradients_reach_the_parameters_through_draws():
    df = torch.tensor(6.0, dtype=FLOAT, requires_grad=True)
    scale = scale_tril().requires_grad_()
    InverseWishartCholesky(df, scale, validate_args=False).rsample().square().sum().backward()
    assert df.grad is not None and df.grad != 0
    assert scale.grad is not None and bool((lower(scale.grad) != 0).all())


def test_too_few_degrees_of_freedom_are_refused():
    with pytest.raises(ValueError, match="more than 2 degrees of freedom for 3 dimensions"):
        InverseWishartCholesky(2.0, torch.eye(3), validate_args=True)


def test_values_that_are_no_factors_are_refused():
    prior = InverseWishartCholesky(5.0, torch.eye(2), validate_args=True)
    with pytest.raises(ValueError, match="within the support"):
        prior.log_prob(torch.ones(2, 2))
