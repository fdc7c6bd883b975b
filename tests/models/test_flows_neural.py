"""Neural autoregressive and continuous-time flows: monotony, bisection, linear equations, traces.

An equation solved to a relative tolerance of 1e-7 is right to 1e-5; a mean is held to |z| < 5.5, a false alarm of 4e-8.
"""

from __future__ import annotations

import math
import sys

import pytest
import torch
from fixtures import float64_under
from flow_cases import Z, bent, mean_log_normal
from torch import nn

import ppl_gen as pg
from ppl_gen.inference import SVI
from ppl_gen.models import ffjord, naf
from ppl_gen.models.flows.continuous import Continuous, Field
from ppl_gen.models.flows.neural import _unsigmoidal, sigmoidal

STILL = SVI(steps=1, lr=1e-30)

float64_and_seed = float64_under(3)

# ------------------------------------------------------------------------------------------------------------------ naf


def raw_network(rows=200, units=5, scale=2.0):
    return [scale * torch.randn(rows, units, 1) for _ in range(3)]


def test_the_monotone_network_rises_and_its_slope_is_autograds():
    raw = raw_network(20)
    x = torch.linspace(-30, 30, 201).expand(20, 201).unsqueeze(-2).requires_grad_()
    made, log_slope = sigmoidal(x.mT, [part.unsqueeze(1) for part in raw])
    assert bool((made.squeeze(-1).diff(dim=1) > 0).all())
    (slope,) = torch.autograd.grad(made.sum(), x)
    torch.testing.assert_close(log_slope.mT, slope.log(), rtol=0, atol=1e-8)
    assert bool(sigmoidal(torch.tensor([[1e4], [-1e4]]), raw_network(2))[0].isfinite().all())


def test_bisection_inverts_and_has_the_derivatives_of_the_inverse():
    raw = [part.requires_grad_() for part in raw_network()]
    y = (20 * torch.rand(200, 1) - 10).requires_grad_()
    x, log_slope = _unsigmoidal(y, raw)
    torch.testing.assert_close(sigmoidal(x, raw)[0], y, rtol=0, atol=1e-6)
    torch.testing.assert_close(log_slope, sigmoidal(x, raw)[1])
    (slope,) = torch.autograd.grad(x.sum(), y, retain_graph=True)
    torch.testing.assert_close(slope, (-log_slope).exp(), rtol=1e-6, atol=0)
    # By the parameters: what the inverse moves by is minus what the network moves by, over its slope.
    moved = torch.autograd.grad(x.sum(), raw)
    at = x.detach()
    made, log_slope = sigmoidal(at, raw)
    expected = torch.autograd.grad(-(made * (-log_slope).exp().detach()).sum(), raw)
    torch.testing.assert_close(moved, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_naf_bends_a_column_that_maf_only_stretches():
    """One layer, first column two hills: autoregressive scales and shifts leave the first column normal."""
    from ppl_gen.models import maf

    def hills(rows, seed):
        noise = torch.Generator().manual_seed(seed)
        side = 2.0 * (torch.rand(rows, 1, generator=noise) < 0.5) - 1.0
        return torch.cat([side, side.roll(1, 0)], 1) + 0.25 * torch.randn(rows, 2, generator=noise)

    x, new = hills(500, 0), hills(2000, 1)
    algorithm = SVI(steps=250, lr=0.02)
    bent_, stretched = (pg.fit(r(layers=1, hidden=(8,)), x, algorithm, seed=0).evidence(new) for r in (naf, maf))
    gain = bent_.values - stretched.values
    assert float(gain.mean() / gain.std()) * len(new) ** 0.5 > Z
    truth = torch.logaddexp(*((-((new - m) ** 2) / (2 * 0.0625)) for m in (-1.0, 1.0))).sum(1)
    truth = truth - 2 * math.log(2 * 0.25 * math.sqrt(2 * math.pi))
    assert float((truth - bent_.values).mean()) < 0.1 < float((truth - stretched.values).mean())


# --------------------------------------------------------------------------------------------------------------- ffjord


class Linear(nn.Module):
    """dx/dt = A x."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix = nn.Parameter(matrix)

    def forward(self, t, x, direction):
        return x @ self.matrix.T, direction @ self.matrix.T


def test_a_linear_field_is_its_exponential():
    matrix = 0.7 * torch.randn(4, 4)
    layer = Continuous(Linear(matrix), "dopri5", 1e-7, 1).eval()
    x = torch.randn(10, 4)
    z, log_det = layer.to_code(x)
    torch.testing.assert_close(z, x @ torch.matrix_exp(matrix).T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_det, matrix.trace().expand(10), rtol=0, atol=1e-5)
    back, inverse = layer.to_data(z)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-5)
    torch.testing.assert_close(inverse, -log_det, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["dopri5", pytest.param("rk4", marks=pytest.mark.slow)])
def test_log_determinants_are_autograds_and_the_way_back_is_the_way_there(method):
    field = Field(3, (16, 16))
    nn.init.normal_(field.layers[-1].weight, 0.0, 0.5)
    layer = Continuous(field, method, 1e-8, 40).eval()
    x = 2 * torch.randn(6, 3)
    with torch.no_grad():
        z, log_det = layer.to_code(x)
        back, inverse = layer.to_data(z)
    slopes = torch.stack([torch.autograd.functional.jacobian(lambda v: layer.to_code(v)[0], row) for row in x])
    torch.testing.assert_close(log_det, torch.linalg.slogdet(slopes).logabsdet, rtol=0, atol=1e-5)
    assert float(log_det.std()) > 0.05
    torch.testing.assert_close(back, x, rtol=0, atol=1e-5)
    torch.testing.assert_close(inverse, -log_det, rtol=0, atol=1e-5)


def test_a_field_carries_directions_as_autograd_does():
    field = Field(3, (8, 5))
    nn.init.normal_(field.layers[-1].weight)
    x, e, t = torch.randn(7, 3), torch.randn(7, 3), torch.tensor(0.3)
    h, moved = field(t, x, e)
    expected = torch.autograd.functional.jvp(lambda v: field(t, v, e)[0], x, e)
    torch.testing.assert_close((h, moved), expected, rtol=0, atol=1e-12)


def test_an_equation_that_cannot_be_solved_says_so():
    field = Field(2, (16,))
    nn.init.constant_(field.layers[-1].weight, math.inf)
    with pytest.raises(ValueError, match="ffjord: torchdiffeq gave up"):
        Continuous(field, "dopri5", 1e-5, 1).eval().to_code(torch.randn(5, 2))


def test_hutchinsons_trace_has_the_exact_one_for_its_mean():
    field = Field(4, (16,))
    nn.init.normal_(field.layers[-1].weight, 0.0, 0.5)
    layer = Continuous(field, "rk4", 1e-5, 8)
    row = torch.randn(4)
    exact = float(layer.eval().to_code(row)[1].detach())
    draws = layer.train().to_code(row.expand(4000, 4))[1].detach()
    z = (float(draws.mean()) - exact) / float(draws.std()) * 4000**0.5
    assert float(draws.std()) > 0.01 and abs(z) < Z, z
    assert abs(float(draws.mean()) + 0.2 - exact) > 5 * float(draws.std()) / 4000**0.5, "the test sees a wrong trace"


@pytest.mark.parametrize("method", [pytest.param("dopri5", marks=pytest.mark.slow), "rk4"])
def test_ffjord_learns_and_its_evidence_is_exact(method):
    x, new = bent(300, 2), bent(1000, 2)[300:]
    recipe = ffjord(hidden=(24,), method=method, steps=6)
    still = pg.fit(recipe, x, STILL, seed=0)
    assert still.evidence().mean == pytest.approx(mean_log_normal(x), abs=1e-9), "it starts at independent normals"
    fit = pg.fit(recipe, x, SVI(steps=60, lr=0.02), seed=0, compile="graph")
    normal = torch.distributions.MultivariateNormal(x.mean(0), torch.cov(x.T)).log_prob(new)

    def gain(of):
        difference = of.evidence(new).values - normal
        return float(difference.mean() / difference.std()) * len(new) ** 0.5

    assert gain(still) < Z < gain(fit)
    found = fit.evidence(new)
    assert found.exact and torch.equal(found.values, fit.evidence(new).values), "no noise in it"
    assert len(set(fit.records["program_loss"])) == 60
    assert fit.sample(3)["x"].shape == (3, 2)
    if method == "dopri5":
        assert fit.cost["path"] == "eager" and "read into Python" in fit.cost["path_reason"]
    else:
        assert fit.cost["path"] != "eager", fit.cost


@pytest.mark.slow
def test_the_density_of_ffjord_integrates_to_one():
    flow = pg.fit(ffjord(hidden=(16,), method="rk4"), bent(300, 2), SVI(steps=30, lr=0.02), seed=0).module("flow")
    with torch.no_grad():
        angle = torch.arange(400) * (math.pi / 200)
        far = flow.decode(6.5 * torch.stack([angle.cos(), angle.sin()], 1))
        sides = [torch.linspace(float(a), float(b), 300) for a, b in zip(far.amin(0), far.amax(0), strict=True)]
        values = torch.cat([flow.log_prob(part) for part in torch.cartesian_prod(*sides).split(30_000)]).exp()
    assert float(values.sum()) * math.prod(float(s[1] - s[0]) for s in sides) == pytest.approx(1.0, abs=1e-3)


def test_without_torchdiffeq_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(pg.MissingExtraError, match=r"ppl_gen\[flows\]"):
        ffjord()


def test_arguments_out_of_range_are_refused():
    for bad in ({"method": "euler"}, {"tolerance": 0.0}, {"steps": 0}, {"layers": 0}, {"hidden": ()}, {"features": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ffjord(**bad)
    for bad in ({"units": 0}, {"layers": 0}, {"features": 1}, {"hidden": (0,)}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            naf(**{"features": 2, **bad})
