"""Normalising flows against autograd, closed forms and quadrature.

Tolerances: in float64 a few dozen operations round to 1e-14 relative; layers amplify that by at most the slopes of the
flow, which stay below 1e4 here, hence 1e-8 (and 1e-4 in float32, where values of order 10 round to 1e-6). A frequency is
held to |z| < 5.5, a false alarm of 4e-8.
"""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from fixtures import float64_under
from flow_cases import PLAIN, RECIPES, STILL, Z, bent, fitted, flow_of, mean_log_normal

import ppl_gen as pg
from ppl_gen.inference import SVI
from ppl_gen.models import affine_flow

float64_and_seed = float64_under(11)


def gap(flow, rows):
    """Errors over rows: log-determinants of both directions against autograd, and the round trip; and condition numbers."""
    jacobians = torch.stack([torch.autograd.functional.jacobian(flow.encode, row) for row in rows]).double()
    exact = torch.linalg.slogdet(jacobians).logabsdet
    with torch.no_grad():
        codes = flow.encode(rows)
        back, log_det = flow.to_data(codes)
        errors = torch.stack([flow.log_det(rows) - exact, log_det + exact, (back - rows).abs().amax(1)])
    return errors.abs().amax(0), torch.linalg.cond(jacobians)


STATES = ("untrained", "random", "trained")

# ------------------------------------------------------------------------------------------------------------ jacobians


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", RECIPES)
def test_log_determinants_are_autograds_and_the_inverse_inverts(name, state):
    rows = torch.cat([20 * torch.rand(30, 3) - 10, torch.eye(3) * 10, bent(10, 3)])
    flow = flow_of(name, state)
    errors, condition = gap(flow, rows)
    # A flow may stretch far rows so much that the determinant of autograd's matrix loses digits, not the flow's sum.
    plain = condition < 1e6
    assert float(plain.double().mean()) > 0.7 and float(errors[plain].max()) < 1e-8, (errors, condition)
    # Where condition numbers reach the inverse of double precision, they are themselves no longer known.
    known = condition < 1e13
    assert bool((errors < 1e-8 + 1e-14 * condition)[known].all())
    if state != "untrained" and name not in ("affine_flow", "nice"):  # which stretch all of space alike
        assert float(flow.log_det(rows).detach().std()) > 0.05, "the determinant differs between rows"


@pytest.mark.parametrize("name", RECIPES)
def test_float32_keeps_four_digits(name):
    flow = flow_of(name, "trained").float()
    errors, _ = gap(flow, bent(60, 3).clamp(-10, 10).float())
    assert flow.loc.dtype == torch.float32 and 1e-8 < float(errors.max()) < 1e-4, errors


@pytest.mark.parametrize("name", ("maf", "iaf"))
def test_autoregressive_jacobians_are_exactly_triangular_in_the_order_of_each_layer(name):
    flow = flow_of(name, "random", features=5)
    x = torch.randn(5)
    for number, layer in enumerate(flow.layers):
        function = layer.to_code if name == "maf" else layer.to_data
        jacobian = torch.autograd.functional.jacobian(lambda v, function=function: function(v)[0], x)
        order = torch.arange(5) if number % 2 == 0 else torch.arange(5).flip(0)
        jacobian = jacobian[order][:, order]
        assert torch.equal(jacobian, jacobian.tril()) and bool((jacobian.diagonal() > 0).all())
        assert float(jacobian.tril(-1).abs().max()) > 0.01, "what comes later does depend on what comes before"


def test_every_column_of_a_coupling_flow_depends_on_others():
    flow = flow_of("real_nvp", "random", features=5)
    jacobian = torch.autograd.functional.jacobian(flow.encode, torch.randn(5))
    assert bool(((jacobian - jacobian.diag().diag()).abs().max(1).values > 1e-3).all())


# ------------------------------------------------------------------------------------------------------------ densities


@pytest.mark.parametrize("state", ("random", "trained"))
@pytest.mark.parametrize("name", RECIPES)
def test_the_density_integrates_to_one(name, state):
    """A trapezoid rule on 600 x 600 points, over the box that holds the rows of all codes within 6.5 of zero."""
    flow = flow_of(name, state, features=2, steps=150)
    with torch.no_grad():
        angle = torch.arange(400) * (math.pi / 200)
        far = flow.decode(6.5 * torch.stack([angle.cos(), angle.sin()], 1))
        sides = [torch.linspace(float(a), float(b), 600) for a, b in zip(far.amin(0), far.amax(0), strict=True)]
        values = torch.cat([flow.log_prob(part) for part in torch.cartesian_prod(*sides).split(100_000)]).exp()
    cell = math.prod(float(side[1] - side[0]) for side in sides)
    assert float(values.sum()) * cell == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("name", PLAIN)
def test_a_flow_starts_at_independent_normals_in_the_units_of_the_data(name):
    x = 1000.0 + 50.0 * bent(200, 3)
    evidence = pg.fit(RECIPES[name](3), x, STILL, seed=0).evidence()
    assert evidence.mean == pytest.approx(mean_log_normal(x), abs=1e-9)


def test_the_affine_flow_reaches_the_maximum_of_the_closed_form():
    x = bent(300, 4)
    covariance = torch.cov(x.T, correction=0)
    best = float(dist.MultivariateNormal(x.mean(0), covariance).log_prob(x).mean())
    before = pg.fit(affine_flow(4), x, STILL).evidence().mean
    falling = SVI(steps=600, lr=0.03, schedule=lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, 600))
    fit = pg.fit(affine_flow(4), x, falling, seed=0)
    assert before < best - 0.02, "it has something to learn"
    # The loss is quadratic at its minimum: parameters within 1e-4 of it, as Adam leaves them, cost 1e-8.
    assert best - 1e-6 < fit.evidence().mean < best + 1e-10
    torch.testing.assert_close(fit.module("flow").decode(torch.zeros(4)).detach(), x.mean(0), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ("real_nvp", "maf", "iaf", "spline_flow", "nice", "naf", "glow"))
def test_training_beats_the_best_normal(name):
    new = bent(2800, 3)[800:]
    x = bent(800, 3)
    normal = dist.MultivariateNormal(x.mean(0), torch.cov(x.T)).log_prob(new)

    def gain(fit):
        evidence = fit.evidence(new)
        assert evidence.exact and evidence.kind == "exact" and evidence.mc_stderr == 0.0
        difference = evidence.values - normal
        return float(difference.mean() / difference.std()) * len(new) ** 0.5

    assert gain(fitted(name, steps=0)) < Z < gain(fitted(name))


@pytest.mark.parametrize("name", ("real_nvp", "maf", "iaf", "spline_flow", "naf"))
def test_samples_follow_the_density(name):
    """Shares of samples in 16 boxes against quadrature of the density: a chi-squared test with 15 degrees of freedom."""
    fit = fitted(name, features=2, steps=150)
    flow, count, steps = fit.module("flow"), 4000, 150
    drawn = fit.sample(count, seed=5)["x"]
    cuts = [torch.quantile(bent(5000, 2)[:, i], torch.tensor([0.25, 0.5, 0.75])) for i in (0, 1)]
    ends = [(float(drawn[:, i].min()) - 5.0, float(drawn[:, i].max()) + 5.0) for i in (0, 1)]
    shares = torch.zeros(4, 4)
    edges = [[ends[i][0], *cuts[i].tolist(), ends[i][1]] for i in (0, 1)]
    with torch.no_grad():
        for i in range(4):
            for j in range(4):
                # Midpoints: the density may be curved, and boxes share no points.
                a = torch.linspace(edges[0][i], edges[0][i + 1], 2 * steps + 1)[1::2]
                b = torch.linspace(edges[1][j], edges[1][j + 1], 2 * steps + 1)[1::2]
                cell = float((a[1] - a[0]) * (b[1] - b[0]))
                shares[i, j] = flow.log_prob(torch.cartesian_prod(a, b)).exp().sum() * cell
    assert float(shares.sum()) == pytest.approx(1.0, abs=2e-3)
    cells = 4 * torch.bucketize(drawn[:, 0].contiguous(), cuts[0]) + torch.bucketize(drawn[:, 1].contiguous(), cuts[1])
    seen, expected = torch.bincount(cells, minlength=16), count * shares.flatten()
    chi2 = float(((seen - expected) ** 2 / expected).sum())
    assert chi2 < 60.0, chi2  # a false alarm of 2e-7
    shuffled = expected.roll(1)
    assert float(((seen - shuffled) ** 2 / shuffled).sum()) > 60.0, "the test sees shares in wrong places"
