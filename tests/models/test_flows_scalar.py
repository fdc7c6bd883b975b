"""Flows of single numbers: distribution functions, quadrature, Kolmogorov and Smirnov, and the spline itself.

The distance of Kolmogorov and Smirnov exceeds sqrt(-log(a / 2) / 2n) with probability at most a: BAND is that of a = 1e-6.
"""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import pyro.distributions as dist
import pytest
import torch
from fixtures import float64_under
from pyro.distributions.transforms.spline import ConditionedSpline
from scipy.stats import kstest

import ppl_gen as pg
from ppl_gen.inference import SVI
from ppl_gen.models import scalar_flow
from ppl_gen.models.flows.splines import IDENTITY, rational_quadratic

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")  # chains and guides are short on purpose

BASES = ("uniform", "beta", "normal")
STILL = SVI(steps=1, lr=1e-30)
TRAIN = SVI(steps=500, lr=0.03)


def band(n):
    return math.sqrt(math.log(2e6) / (2 * n))


float64_and_seed = float64_under(5)


def two_hills(rows, seed=2):
    """Two narrow normals around 3, unequal."""
    noise = torch.Generator().manual_seed(seed)
    first = torch.rand(rows, generator=noise) < 0.35
    return torch.where(first, -1.0, 5.0) + torch.where(first, 1.0, 1.4) * torch.randn(rows, generator=noise)


def code_distribution(base):
    return {"uniform": dist.Uniform(0.0, 1.0), "beta": dist.Beta(5.0, 5.0), "normal": dist.Normal(0.0, 1.0)}[base]


def distance(codes, base):
    """From the distribution that the codes should have, by Kolmogorov and Smirnov."""
    names = {"uniform": "uniform", "beta": ("beta", (5.0, 5.0)), "normal": "norm"}
    name, arguments = names[base] if base == "beta" else (names[base], ())
    return kstest(codes.numpy(), name, args=arguments).statistic


@pytest.mark.parametrize("base", BASES)
def test_training_brings_the_codes_to_their_base_and_beats_a_normal(base):
    x, new = two_hills(3000), two_hills(2000, seed=3)
    normal = dist.Normal(x.mean(), x.std()).log_prob(new)
    before, after = (pg.fit(scalar_flow(base), x, algorithm, seed=0) for algorithm in (STILL, TRAIN))
    gains = [(fit.evidence(new).values - normal) for fit in (before, after)]
    z_before, z_after = (float(gain.mean() / gain.std()) * len(new) ** 0.5 for gain in gains)
    assert z_before < 5.5 < z_after, (z_before, z_after)
    truth = (0.35 * dist.Normal(-1.0, 1.0).log_prob(new).exp() + 0.65 * dist.Normal(5.0, 1.4).log_prob(new).exp()).log()
    assert 0.0 < float((truth - after.evidence(new).values).mean()) < 0.03, "little is missing to the truth"
    codes = [fit.module("flow").encode(new).detach() for fit in (before, after)]
    # 3000 training rows misplace the distribution function by up to band(3000) themselves.
    assert distance(codes[0], base) > band(2000) + band(3000) > distance(codes[1], base)
    assert after.evidence().exact and after.evidence().kind == "exact"


@pytest.mark.parametrize("base", BASES)
def test_samples_follow_the_density_and_codes_follow_samples(base):
    fit = pg.fit(scalar_flow(base), two_hills(1000), SVI(steps=150, lr=0.05), seed=0)
    flow, drawn = fit.module("flow"), fit.sample(4000, seed=1)["x"]
    assert drawn.shape == (4000,)
    grid = torch.linspace(-40.0, 50.0, 90_001)
    with torch.no_grad():
        density = flow.log_prob(grid).exp()
    cdf = torch.cumulative_trapezoid(density, grid)
    assert float(cdf[-1]) == pytest.approx(1.0, abs=1e-5)
    at = torch.searchsorted(grid, drawn.contiguous()).clamp(1, len(cdf)) - 1
    gap = distance(cdf[at], "uniform")
    assert gap < band(4000)
    untrained = pg.fit(scalar_flow(base), two_hills(1000), STILL).sample(4000, seed=1)["x"]
    at = torch.searchsorted(grid, untrained.contiguous()).clamp(1, len(cdf)) - 1
    assert distance(cdf[at], "uniform") > band(4000), "the test sees another distribution"
    # Uniform codes are the distribution function; those of other bases lead to it through their own.
    codes = flow.encode(grid[1::1000]).detach()
    if base != "beta":  # torch has no distribution function of it
        torch.testing.assert_close(code_distribution(base).cdf(codes), cdf[::1000], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("base", "shape"), [*((base, (800,)) for base in BASES), ("uniform", (800, 1))])
def test_log_derivatives_are_autograds_and_the_inverse_inverts(base, shape):
    x = two_hills(800).reshape(shape)
    for algorithm in (STILL, SVI(steps=500, lr=0.03)):
        flow = pg.fit(scalar_flow(base, bins=6), x, algorithm, seed=0).module("flow")
        value = torch.linspace(-10.0, 10.0, 41).reshape(-1, *shape[1:]).requires_grad_()
        codes = flow.encode(value)
        assert codes.shape == value.shape and bool((codes.flatten().diff() > 0).all())
        if base != "normal":
            assert 0 < float(codes.detach().min()) and float(codes.detach().max()) < 1, "all reals go into (0, 1)"
        (slope,) = torch.autograd.grad(codes.sum(), value)
        torch.testing.assert_close(flow.log_det(value), slope.log().reshape(41), rtol=0, atol=1e-8)
        torch.testing.assert_close(flow.decode(codes), value, rtol=0, atol=1e-8)
        torch.testing.assert_close(flow.to_data(codes)[1], -flow.log_det(value), rtol=0, atol=1e-8)
        with torch.no_grad():
            extreme = flow.log_prob(torch.tensor([-1e4, 1e4]).reshape(-1, *shape[1:]))
        assert bool(extreme.isfinite().all()) and extreme.shape == (2,)


@pytest.mark.parametrize("concentrations", [(1.0, 1.0), (0.5, 3.0), (20.0, 2.0)])
def test_a_beta_flow_starts_near_a_normal_whatever_its_shape(concentrations):
    x = 7.0 + 0.2 * torch.randn(2000)
    fit = pg.fit(scalar_flow("beta", concentrations=concentrations), x, STILL)
    assert fit.evidence().mean > float(dist.Normal(7.0, 0.2).log_prob(x).mean()) - 0.2
    codes = fit.module("flow").encode(x).detach()
    logits, expected = codes.logit(), dist.Beta(*map(torch.tensor, concentrations)).sample([40_000]).logit()
    # Moments agree by design; those of 40000 draws to a few hundredths.
    assert float(logits.mean()) == pytest.approx(float(expected.mean()), abs=0.1)
    assert float(logits.std()) == pytest.approx(float(expected.std()), abs=0.1)


# ----------------------------------------------------------------------------------------------------------- the spline


def raw_spline(rows, bins, scale=1.5):
    return scale * torch.randn(rows, bins), scale * torch.randn(rows, bins), scale * torch.randn(rows, bins - 1)


def by_row(raw):
    """One column, a spline for each row: 1 x bins x rows."""
    return [part.T.unsqueeze(0) for part in raw]


def edges(raw, bound):
    """Where the bins of each row begin and end, by the definition of Durkan et al.: cumulated softmax widths."""
    lengths = 1e-3 + (1 - 1e-3 * raw[0].shape[-1]) * raw[0].softmax(-1)
    return bound * (2 * torch.cat([torch.zeros(len(lengths), 1), lengths.cumsum(-1)], -1) - 1)


@pytest.mark.parametrize("nudge", [0.0, 1e-12, -1e-12, 3e-7, -3e-7, 1e-3])
def test_splines_are_right_at_their_box_and_at_the_edges_of_their_bins(nudge):
    bound, raw = 3.0, raw_spline(20, 6)
    for value in [*(edges(raw, bound) + nudge).T, torch.full((20,), bound + nudge), torch.full((20,), -bound - nudge)]:
        value = value.unsqueeze(0).requires_grad_()
        shaped = by_row(raw)
        made, log_slope = rational_quadratic(value, shaped, bound)
        (slope,) = torch.autograd.grad(made.sum(), value)
        torch.testing.assert_close(log_slope, slope.log(), rtol=0, atol=1e-8)
        back, inverse_slope = rational_quadratic(made, shaped, bound, inverse=True)
        torch.testing.assert_close(back, value, rtol=0, atol=1e-8)
        torch.testing.assert_close(inverse_slope, -log_slope, rtol=0, atol=1e-8)


def test_splines_are_the_identity_beyond_their_box_and_at_the_start():
    shaped = by_row(raw_spline(50, 5))
    far = torch.cat([4.0 + torch.rand(1, 25), -4.0 - 100 * torch.rand(1, 25)], 1).requires_grad_()
    for inverse in (False, True):
        made, log_slope = rational_quadratic(far, shaped, 4.0, inverse=inverse)
        torch.testing.assert_close(made, far, rtol=0, atol=1e-12)
        assert not bool(log_slope.any())
        (gradient,) = torch.autograd.grad(made.sum() + log_slope.sum(), far)
        assert torch.equal(gradient, torch.ones_like(far))
    start = torch.zeros(1, 5, 50), torch.zeros(1, 5, 50), torch.full((1, 4, 50), IDENTITY)
    inside = 8 * torch.rand(1, 50) - 4
    torch.testing.assert_close(rational_quadratic(inside, start, 4.0)[0], inside, rtol=0, atol=1e-14)


@pytest.mark.parametrize("inverse", [False, True])
def test_inner_bins_are_pyros(inverse):
    """Pyro's outermost derivatives are 0.999, which touches only the bins at both ends."""
    raw_rows, bound = raw_spline(2000, 7), 4.0
    raw = [part.unsqueeze(1) for part in raw_rows]
    side = edges(raw_rows[1:] if inverse else raw_rows, bound)
    value = (side[:, 1] + (side[:, -2] - side[:, 1]) * torch.rand(2000)).unsqueeze(1)
    shape = raw[0].softmax(-1), raw[1].softmax(-1), torch.nn.functional.softplus(raw[2]), None
    theirs = ConditionedSpline(shape, bound=bound, order="quadratic").spline_op(value, inverse=inverse)
    for ours, other in zip(rational_quadratic(value.T, by_row(raw_rows), bound, inverse=inverse), theirs, strict=True):
        torch.testing.assert_close(ours.T, other, rtol=0, atol=1e-8)


def test_steep_bins_are_inverted_in_float32():
    raw = [part.float() for part in by_row(raw_spline(20_000, 8, scale=6.0))]
    value = 8 * torch.rand(1, 20_000, dtype=torch.float32) - 4
    made, _ = rational_quadratic(value, raw, 4.0)
    back, log_slope = rational_quadratic(made, raw, 4.0, inverse=True)
    assert bool(back.isfinite().all()) and bool(log_slope.isfinite().all()) and back.dtype == torch.float32
    # Where the slope is 1e-3, numbers of order 4 that are rounded to 2e-7 move by 1e-3.
    assert float((back - value).abs().median()) < 1e-3


# ------------------------------------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    "data, message",
    [
        (torch.randn(5, 2), r"takes single numbers \(N, or N x 1\), got shape \(5, 2\)"),
        (torch.tensor(3.0), "data"),
        (torch.ones(5), r"column\(s\) 0 are constant"),
        (torch.tensor([1.0, math.nan, 2.0]), "'x'.*at index"),
    ],
)
def test_data_that_do_not_suit_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        pg.fit(scalar_flow(), data, SVI(steps=1))


def test_arguments_out_of_range_are_refused():
    for bad in ({"base": "cauchy"}, {"bins": 1}, {"bins": 2.5}, {"bound": -1.0}, {"concentrations": (1.0,)}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            scalar_flow(**bad)
    with pytest.raises(ValueError, match="concentrations"):
        scalar_flow("beta", concentrations=(1.0, 0.0))


def test_a_scalar_flow_is_found_again_on_disk(tmp_path):
    recipe = scalar_flow("beta", bins=4, concentrations=(2.0, 3.0))
    assert repr(recipe) == "Recipe(scalar_flow, base='beta', bins=4, bound=4.0, concentrations=(2.0, 3.0))"
    fit = pg.fit(recipe, two_hills(100), SVI(steps=20, batch_size=32), seed=1)
    loaded = pg.load(fit.save(tmp_path / "fit"), recipe)
    assert torch.equal(loaded.evidence().values, fit.evidence().values)
    assert fit.diagnose().attrs["verdict"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("zuko") is None, reason="zuko is for the benchmark only")
def test_the_benchmark_leaves_validation_on_although_zuko_switches_it_off():
    code = "import sys; sys.path.insert(0, 'benchmarks'); import torch, {}; torch.distributions.Normal(0.0, -1.0)"
    top = Path(__file__).parents[2]
    for module, complaint in (("flows_patches", "ValueError"), ("zuko", "")):
        done = subprocess.run([sys.executable, "-c", code.format(module)], cwd=top, capture_output=True, text=True)
        assert bool(done.returncode) == bool(complaint) and complaint in done.stderr, done.stderr
