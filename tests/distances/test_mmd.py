"""The maximum mean discrepancy against closed forms, and as a test of two samples."""

import math
import sys

import pytest
import torch
from memory import Largest
from scipy.spatial.distance import cdist

from ppl_gen.distances import mmd
from ppl_gen.distances.mmd import SCALES


def _normals(rows, shift, scale, width=2, seed=0):
    return shift + scale * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _expected(shift, one, other, width, length):
    """Squared discrepancy of N(0, one^2) and N(shift, other^2) under exp(-d^2 / 2 l^2), coordinates independent."""

    def mean(variance, distance):
        total = length**2 + variance
        return ((length**2 / total) ** 0.5 * math.exp(-(distance**2) / (2 * total))) ** width

    return mean(2 * one**2, 0.0) + mean(2 * other**2, 0.0) - 2 * mean(one**2 + other**2, shift)


def test_it_is_the_double_sum_of_its_definition():
    x, y = _normals(7, 0.0, 1.0), _normals(5, 0.5, 2.0, seed=1)
    for kernel, lengths in (("rbf", (0.7,)), ("rbf", (0.5, 2.0)), ("imq", (0.5, 2.0))):
        total = 0.0
        for length in lengths:

            def k(a, b, length=length, kernel=kernel):
                squared = torch.from_numpy(cdist(a.numpy(), b.numpy(), "sqeuclidean"))
                if kernel == "rbf":
                    return (-squared / (2 * length**2)).exp()
                return length**2 / (length**2 + squared)

            within = sum((k(r, r).sum() - len(r)) / (len(r) * (len(r) - 1)) for r in (x, y))
            total += (within - 2 * k(x, y).mean()) / len(lengths)
        assert abs(float(mmd(x, y, kernel=kernel, scales=lengths) - total)) < 1e-12


@pytest.mark.parametrize(("shift", "scale", "width"), [(0.0, 1.0, 2), (1.0, 1.0, 1), (0.5, 2.0, 3)])
def test_its_mean_is_the_closed_form_of_two_normals(shift, scale, width):
    values = torch.stack(
        [
            mmd(_normals(60, 0.0, 1.0, width, 2 * s), _normals(80, shift, scale, width, 2 * s + 1), scales=[1.5])
            for s in range(400)
        ]
    )
    expected = _expected(shift, 1.0, scale, width, 1.5)
    # An unbiased estimate: the mean of 400 independent values within four of its standard errors.
    assert abs(float(values.mean()) - expected) < 4 * float(values.std()) / 20
    assert (expected == 0) == (shift == 0)
    if shift:
        assert float(values.mean()) > 10 * float(values.std()) / 20, "it would show a difference"
    else:
        assert float(values.min()) < 0, "unbiased at zero, so it falls below"


@pytest.mark.parametrize("kernel", ["rbf", "imq"])
def test_scales_taken_from_both_samples_leave_the_mean_at_zero(kernel):
    """Under exchange of the two samples the scales stay, so its mean over all ways to part them is zero."""
    values = torch.stack(
        [mmd(_normals(20, 0.0, 1.0, 2, 2 * s), _normals(30, 0.0, 1.0, 2, 2 * s + 1), kernel=kernel) for s in range(400)]
    )
    assert abs(float(values.mean())) < 4 * float(values.std()) / 20
    far = mmd(_normals(20, 0.0, 1.0), _normals(30, 1.0, 1.0, seed=1), kernel=kernel)
    assert float(far) > 5 * float(values.std())


def test_it_is_differentiable_and_its_slope_is_that_of_differences():
    x, y = _normals(6, 0.0, 1.0).requires_grad_(), _normals(8, 0.3, 1.0, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: mmd(a, b, scales=[0.5, 1.0], kernel="imq"), (x, y))
    same = torch.ones(4, 2, dtype=torch.float64, requires_grad=True)
    mmd(same, same.detach()).backward()
    assert bool(same.grad.isfinite().all()), "rows that coincide have no direction, and no NaN"


def test_arrays_and_images_are_taken_and_other_rows_refused():
    images = torch.rand(5, 1, 4, 4)
    torch.testing.assert_close(mmd(images, images.flip(0)), mmd(images.flatten(1).numpy(), images.flip(0).flatten(1)))
    with pytest.raises(ValueError, match=r"y: expected rows of shape \(2,\) as x has, got \(3,\)"):
        mmd(torch.rand(5, 2), torch.rand(5, 3))
    with pytest.raises(ValueError, match="x: expected at least two rows"):
        mmd(torch.rand(1, 2), torch.rand(5, 2))
    with pytest.raises(ValueError, match="scales: expected a positive number"):
        mmd(torch.rand(5, 2), torch.rand(5, 2), scales=[0.0])


@pytest.mark.parametrize("kernel", ("rbf", "imq"))
def test_rows_far_from_zero_are_as_far_apart_as_the_same_rows_near_it(kernel):
    generator = torch.Generator().manual_seed(0)
    # Steps of 1/64 up to 4: float32 holds them exactly beside 2^14, too.
    x, y = (
        ((torch.randn(200, 3, generator=generator) + shift) * 64).round().clamp(-256, 256) / 64 for shift in (0.0, 0.5)
    )
    near, far = mmd(x, y, kernel=kernel), mmd(x + 2.0**14, y + 2.0**14, kernel=kernel)
    # The largest value is about 0.1; distances are rounded to 1e-6 of themselves, and means of them less.
    assert float(near) > 0.02 and float(far) == pytest.approx(float(near), abs=1e-5)


def test_half_precision_is_computed_in_single():
    generator = torch.Generator().manual_seed(0)
    x, y = (((torch.randn(100, 3, generator=generator) + shift) * 64).round() * 4 for shift in (0.0, 0.5))
    for kind in (torch.float16, torch.bfloat16):
        one, other = x.to(kind), y.to(kind)
        wanted = mmd(one.double(), other.double())
        # Float32 leaves 1e-6 of distances; the squares of these rows, up to 1e6, are infinite in float16.
        assert float(mmd(one, other)) == pytest.approx(float(wanted), abs=1e-5) and float(wanted) > 0.02


@pytest.mark.parametrize("kernel", ("rbf", "imq"))
@pytest.mark.parametrize("scales", (None, [0.5, 2.0]))
def test_sums_in_blocks_are_those_of_all_pairs_at_once_and_so_are_their_slopes(kernel, scales, monkeypatch):
    found = []
    for block in (10**9, 2000):  # of 10 ** 9 all pairs are one block, of 2000 some rows are one
        monkeypatch.setattr(sys.modules["ppl_gen.distances.mmd"], "_BLOCK", block)  # the function has the same name
        x, y = _normals(211, 0.0, 1.0).requires_grad_(), _normals(150, 0.5, 1.5, seed=1).requires_grad_()
        with Largest() as largest:
            value = mmd(x, y, kernel=kernel, scales=scales)
            value.backward()
        found.append((value.detach(), x.grad, y.grad, largest.numbers))
    # 45,000 pairs of numbers of order one: rounding leaves 1e-16 of each.
    for one, other in zip(*(values[:3] for values in found), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)
    kernels = len(scales or SCALES)
    assert found[0][3] == 211 * 211 * kernels > 20 * found[1][3]
    assert found[1][3] <= 2000


def test_many_rows_take_the_memory_of_a_block():
    x, y = (_normals(3000, shift, 1.0, seed=seed).float() for seed, shift in enumerate((0.0, 0.2)))
    with Largest() as largest:
        found = float(mmd(x, y))
    assert largest.numbers <= 4_000_000 < 3000 * 3000
    assert 0.001 < found < 0.1
