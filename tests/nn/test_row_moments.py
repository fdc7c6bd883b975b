"""Moments of rows in chunks against the same by one product in float64.

Float64 sums of 3000 products of order one round to 1e-13 of the standard deviations of their columns.
"""

from __future__ import annotations

import pytest
import torch

from ppl_gen.nn import row_moments as module
from ppl_gen.nn.row_moments import column_moments, row_moments

FLOAT = torch.float64


def rows(n=3000, d=7, dtype=FLOAT):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(d, d, generator=generator, dtype=FLOAT)
    return (1000 + torch.randn(n, d, generator=generator, dtype=FLOAT) @ mixing).to(dtype)


def dense(x):
    centred = x.double() - x.double().mean(0)
    return x.double().mean(0), centred.mT @ centred / len(x)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "_ELEMENTS", 7 * 256)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int32])
def test_moments_far_from_zero_lose_no_digits(small_chunks, dtype):
    x = rows(dtype=dtype)
    found, (mean, covariance) = row_moments(x), dense(x)
    torch.testing.assert_close(found.mean, mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(found.matrix, covariance, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.variances, covariance.diagonal(), rtol=0, atol=1e-10)
    assert not found.single


def test_products_in_float32_err_by_the_bound(small_chunks):
    x = rows(dtype=torch.float32)
    found, (_, covariance) = row_moments(x, single=True), dense(x)
    scale = covariance.diagonal().sqrt()
    error = ((found.matrix - covariance) / torch.outer(scale, scale)).abs().max()
    # The bound of a chunk of 256 rows, and what errors of either sign leave of it.
    assert found.single and 0 < float(error) < 256 * 6e-8
    assert not row_moments(x.double(), single=True).single


def test_rows_that_lie_elsewhere_than_the_first_are_summed_about_their_mean(small_chunks):
    x = rows() - 1000
    x[256:] += 1e6  # the first chunk is about zero, and 2.7 sds of all are its distance from their mean
    x = x[-2600:]
    x[:256] -= 1e6
    x = x.float()
    found, (mean, covariance) = row_moments(x, single=True), dense(x)
    scale = covariance.diagonal().sqrt()
    assert float((mean.abs() / scale).min()) > 2
    # Squares of three standard deviations are summed where those of one would do.
    assert float(((found.matrix - covariance) / torch.outer(scale, scale)).abs().max()) < 10 * 256 * 6e-8


def test_rows_near_zero_are_not_copied(small_chunks, monkeypatch):
    x = rows() - 1000
    copied = row_moments(x + 1000)
    monkeypatch.setattr(module, "_shifted", None)
    found, (_, covariance) = row_moments(x), dense(x)
    torch.testing.assert_close(found.matrix, covariance, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.matrix, copied.matrix, rtol=0, atol=1e-9)


@pytest.mark.parametrize("n", [4, 20, 300])
def test_leading_eigenvalues_of_few_and_of_many_rows(n):
    x = rows(n, 20)
    found, (_, covariance) = row_moments(x), dense(x)
    assert (found.matrix is None) == (n < 20)
    values, vectors, rest = found.leading(6)
    expected = torch.linalg.eigvalsh(covariance).flip(0)
    torch.testing.assert_close(values, expected[:6].clamp(min=0), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(6, dtype=FLOAT), rtol=0, atol=1e-10)
    torch.testing.assert_close(vectors.mT @ covariance @ vectors, values.diag(), rtol=0, atol=1e-9)
    assert abs(float(rest - expected[6:].clamp(min=0).mean())) < 1e-9
    torch.testing.assert_close(found.times(vectors), covariance @ vectors, rtol=0, atol=1e-9)
    scale = torch.arange(1.0, 21.0, dtype=FLOAT)
    moved = found.scaled(found.mean, scale)
    torch.testing.assert_close(moved.variances, found.variances / scale.square())
    assert float(moved.mean.abs().max()) == 0.0


@pytest.mark.parametrize("shape", [(3000,), (3000, 7)])
def test_moments_of_columns(small_chunks, shape):
    x = rows()[:, : shape[1]] if len(shape) == 2 else rows()[:, 0].contiguous()
    if len(shape) == 2:
        x[:, 2] = 0.1
    mean, variance, constant = column_moments(x)
    torch.testing.assert_close(mean, x.mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(variance, x.var(0, correction=0), rtol=1e-9, atol=1e-25)
    assert constant.reshape(-1).tolist() == [len(shape) == 2 and i == 2 for i in range(constant.numel())]
