"""Normalising flows against autograd, closed forms and quadrature.

Tolerances: in float64 a few dozen operations round to 1e-14 relative; layers amplify that by at most the slopes of the
flow, which stay below 1e4 here, hence 1e-8 (and 1e-4 in float32, where values of order 10 round to 1e-6). A frequency is
held to |z| < 5.5, a false alarm of 4e-8.
"""

from __future__ import annotations

import copy
import functools
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch

import ppl_gen as pg
from ppl_gen.inference import CAVI, EM, NUTS, SVI
from ppl_gen.models import affine_flow, iaf, maf, real_nvp, spline_flow

Z = 5.5
RECIPES = {
    "affine_flow": lambda d: affine_flow(d),
    "real_nvp": lambda d: real_nvp(d, layers=3, hidden=(16,)),
    "maf": lambda d: maf(d, layers=2, hidden=(16,)),
    "iaf": lambda d: iaf(d, layers=2, hidden=(16,)),
    "spline_flow": lambda d: spline_flow(d, layers=3, hidden=(16,), bins=5),
}
STILL = SVI(steps=1, lr=1e-30)


@pytest.fixture(autouse=True)
def float64_and_seed():
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with torch.random.fork_rng(devices=[]), pyro.get_param_store().scope():
        torch.manual_seed(11)
        yield
    torch.set_default_dtype(default)


def bent(rows, features, dtype=torch.float64):
    """A curved cloud, far from normal: each column follows a wave of the one before."""
    noise = torch.randn(rows, features, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    columns = [noise[:, 0]]
    for i in range(1, features):
        columns.append(1.5 * (1.5 * columns[-1]).cos() + 0.3 * noise[:, i])
    return (1.0 + 2.0 * torch.stack(columns, 1)).to(dtype)


def mean_log_normal(x):
    """Evidence of independent normals with the moments of the columns."""
    return float(dist.Normal(x.mean(0), x.std(0, correction=0)).to_event(1).log_prob(x).mean())


def fitted(name, features=3, steps=500):
    return _fitted(name, features, steps)


@functools.cache
def _fitted(name, features, steps):
    algorithm = SVI(steps=steps, lr=5e-3) if steps else STILL
    return pg.fit(RECIPES[name](features), bent(800, features), algorithm, seed=0)


def shaken(flow, by=0.15):
    """A flow with random weights: one that has not been trained is the identity, where little can go wrong."""
    with torch.no_grad():
        for value in flow.parameters():
            value.add_(by * torch.randn_like(value))
    return flow


def flow_of(name, state, features=3, steps=500):
    flow = fitted(name, features, steps if state == "trained" else 0).module("flow")
    return shaken(flow) if state == "random" else flow


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
    assert bool((errors < 1e-8 + 1e-14 * condition).all())
    if state != "untrained" and name != "affine_flow":
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


@pytest.mark.parametrize("name", RECIPES)
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


@pytest.mark.parametrize("name", ("real_nvp", "maf", "iaf", "spline_flow"))
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


@pytest.mark.parametrize("name", ("real_nvp", "maf", "iaf", "spline_flow"))
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


# ------------------------------------------------------------------------------------------------------- as a program


def test_a_flow_is_one_observed_site_without_latents_or_guide():
    x = bent(50, 2)
    info = pg.check(real_nvp(2), x)
    assert [(s.name, s.kind, s.distribution) for s in info.sites.values()] == [
        ("x", "observed", "TransformedDistribution")
    ]
    assert info.offers == {"density", "samples", "differentiable samples", "data plate", "exact evidence"}
    fit = pg.fit(real_nvp(2), x, SVI(steps=20, batch_size=16), seed=0)
    assert fit.guide is None and set(fit.module("flow").state_dict()) >= {"loc", "scale"}
    assert fit.diagnose().attrs["verdict"].startswith(("trust:", "doubtful:", "do not trust:"))
    assert fit.sample(7)["x"].shape == (7, 2)
    for algorithm in (EM(), CAVI(), NUTS(draws=5, warmup=5, chains=1)):
        with pytest.raises(pg.IncompatibleError, match="real_nvp offers: +density"):
            pg.fit(real_nvp(2), x, algorithm)


@pytest.mark.parametrize("name", RECIPES)
def test_every_parameter_learns_and_whole_data_do_not_meet_a_stale_cache(name):
    """The same tensor of rows at every step is what a cache would take for known."""
    x = bent(60, 3)
    fit = pg.fit(RECIPES[name](3), x, SVI(steps=40, lr=0.01), seed=0)
    start = pg.fit(RECIPES[name](3), x, STILL, seed=0)
    still = [key for key, value in fit.params.items() if torch.equal(value, start.params[key])]
    assert not still or name == "affine_flow" and still == [], still
    assert len(set(fit.records["program_loss"])) == 40
    continued = pg.fit(RECIPES[name](3), x, STILL, seed=0, start=fit)
    assert continued.records["program_loss"][0] == pytest.approx(-fit.evidence().mean, abs=1e-12)


@pytest.mark.parametrize("name", RECIPES)
def test_the_module_is_the_program(name):
    fit = fitted(name)
    flow, x = fit.module("flow"), bent(30, 3)
    torch.testing.assert_close(flow.log_prob(x).detach(), fit.evidence(x).values, rtol=0, atol=1e-12)
    torch.testing.assert_close(flow(x), flow.encode(x))
    expected = dist.Normal(torch.zeros(3), 1.0).to_event(1).log_prob(flow.encode(x)) + flow.log_det(x)
    torch.testing.assert_close(flow.log_prob(x), expected)
    drawn = flow.rows().expand([4]).rsample()
    again = flow.rows()
    row = again.rsample()
    # Pyro knows the code of a row just drawn; the density is that of the module all the same.
    torch.testing.assert_close(again.log_prob(row), flow.log_prob(row), rtol=0, atol=1e-8)
    torch.testing.assert_close(flow.rows().log_prob(drawn.detach()), flow.log_prob(drawn), rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", RECIPES)
def test_a_used_flow_is_copied_pickled_and_saved(name, tmp_path):
    fit, x = fitted(name, features=4, steps=3), bent(30, 4)
    flow = fit.module("flow")
    value = flow.log_prob(x)
    assert value.requires_grad
    for other in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        assert torch.equal(other.log_prob(x), value)
    shaken(flow)
    assert not torch.allclose(flow.log_prob(x), value), "new weights, new density of the very same tensor"
    loaded = pg.load(fit.save(tmp_path / "fit"), RECIPES[name](4))
    assert torch.equal(loaded.evidence(x).values, fit.evidence(x).values)
    assert torch.equal(loaded.sample(5, seed=1)["x"], fit.sample(5, seed=1)["x"])


def test_orders_of_later_coupling_layers_are_drawn_under_the_seed_and_saved(tmp_path):
    x = bent(50, 6)
    recipe = real_nvp(6, layers=6, hidden=(8,))
    first, again, other = (pg.fit(recipe, x, SVI(steps=5), seed=seed) for seed in (1, 1, 2))
    orders = [torch.stack([layer.order for layer in fit.module("flow").layers]) for fit in (first, again, other)]
    assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])
    assert torch.equal(orders[0][0], torch.arange(6)) and torch.equal(orders[0][1::2], orders[0][::2].flip(1))
    assert first.records == again.records != other.records
    loaded = pg.load(first.save(tmp_path / "fit"), recipe)
    assert torch.equal(torch.stack([layer.order for layer in loaded.module("flow").layers]), orders[0])
    assert torch.equal(loaded.evidence().values, first.evidence().values)


def test_a_module_works_in_its_own_precision_whatever_the_default():
    flows = {name: flow_of(name, "trained") for name in RECIPES}
    torch.set_default_dtype(torch.float32)
    for name, flow in flows.items():
        x = bent(5, 3)
        back = flow.decode(flow.encode(x))
        assert back.dtype == torch.float64, name
        torch.testing.assert_close(back, x, rtol=0, atol=1e-8)


def test_a_comparison_holds_exact_evidence():
    comparison = pg.compare(maf(2, layers=1, hidden=(8,)), bent(100, 2), {"SVI": SVI(steps=20)}, seeds=[0])
    evidence = comparison["SVI"].evidence()
    assert evidence.kind == "exact" and comparison.table()["mc_se"].tolist() == [0.0]


def test_an_inverse_flow_says_that_its_density_is_slow_and_learns_from_samples_in_silence():
    x = bent(20, 8)
    with pytest.warns(UserWarning, match="8 passes of each network.*take maf"):
        pg.fit(iaf(8, layers=1, hidden=(8,)), x, SVI(steps=1))
    from ppl_gen.inference import Adversarial

    pg.fit(iaf(8, layers=1, hidden=(8,)), x, SVI(Adversarial("non-saturating"), steps=1))
    pg.fit(maf(8, layers=1, hidden=(8,)), x, SVI(steps=1))


@pytest.mark.parametrize(("recipe", "quick", "slow"), [(maf, "encode", "decode"), (iaf, "decode", "encode")])
def test_each_direction_is_one_pass_or_one_for_each_column(recipe, quick, slow):
    flow = pg.fit(recipe(7, layers=2, hidden=(7,)), bent(20, 7), STILL).module("flow")
    passes = []
    for layer in flow.layers:
        layer.network.register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        getattr(flow, quick)(torch.randn(3, 7))
        assert len(passes) == 2
        getattr(flow, slow)(torch.randn(3, 7))
    assert len(passes) == 2 + 2 * 7


# ------------------------------------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(
    "data, message",
    [
        (torch.randn(5, 3), r"rows of 2 columns, got shape \(5, 3\)"),
        (torch.randn(5), r"rows of 2 columns, got shape \(5,\)"),
        (torch.tensor([[1.0, 2.0], [1.0, 3.0]]), r"column\(s\) 0 are constant"),
        (torch.tensor([[1.0, 2.0], [math.nan, 3.0], [0.0, 1.0]]), r"'x'.*at index \(1, 0\)"),
        (torch.tensor([[1.0, 2.0], [3.0, 3.0], [0.0, math.inf]]), r"'x'.*at index \(2, 1\)"),
        ({"y": torch.randn(5, 2)}, "reads the entry 'x'"),
    ],
)
def test_data_that_do_not_suit_are_refused(name, data, message):
    with pytest.raises(ValueError, match=message):
        pg.fit(RECIPES[name](2), data, SVI(steps=1))


def test_arguments_out_of_range_are_refused():
    for recipe in (real_nvp, maf, iaf, spline_flow):
        for bad in ({"features": 0}, {"features": 1}, {"layers": 0}, {"hidden": ()}, {"hidden": (0,)}, {"hidden": 2.5}):
            with pytest.raises(ValueError, match=next(iter(bad))):
                recipe(**{"features": 3, **bad})
    for recipe in (maf, iaf):
        with pytest.raises(ValueError, match="hidden: expected widths of at least 5"):
            recipe(5, hidden=(4,))
    for bad in ({"bins": 1}, {"bins": 501}, {"bound": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            spline_flow(2, **bad)
    with pytest.raises(ValueError, match="features"):
        affine_flow(0)


def test_rows_of_another_width_are_refused_later_too():
    fit = fitted("maf")
    with pytest.raises(ValueError, match="x: this flow takes rows of 3 columns, got .*2"):
        fit.evidence(torch.randn(5, 2))
    with pytest.raises(ValueError, match="z: this flow takes rows of 3 columns"):
        fit.module("flow").decode(torch.randn(5, 4))


def test_rows_may_be_whole_numbers_and_labels_are_left_out():
    x = torch.arange(40).reshape(20, 2) ** 2
    fit = pg.fit(real_nvp(2, layers=2, hidden=(8,)), {"x": x, "label": torch.arange(20)}, SVI(steps=3))
    assert math.isfinite(fit.evidence({"x": x}).mean) and affine_flow(1) is not None
    one = pg.fit(affine_flow(1), x[:, :1], STILL)
    assert one.evidence().mean == pytest.approx(mean_log_normal(x[:, :1].double()), abs=1e-4)  # float32
