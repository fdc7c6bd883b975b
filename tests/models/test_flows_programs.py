"""Normalising flows as programs: what a fit of one offers, copies and saves, and what is refused.

In float64 two ways to the same number differ by rounding that the layers amplify a little: 1e-12, or 1e-8 through an
inverse.
"""

from __future__ import annotations

import copy
import math
import pickle

import pyro.distributions as dist
import pytest
import torch
from fixtures import float64_under
from flow_cases import RECIPES, STILL, bent, fitted, flow_of, mean_log_normal, shaken

import ppl_gen as pg
from ppl_gen.inference import CAVI, EM, NUTS, SVI
from ppl_gen.models import affine_flow, iaf, maf, real_nvp, spline_flow

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")  # chains and guides are short on purpose


float64_and_seed = float64_under(11)


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
    with pytest.raises(ValueError, match=r"fit of 'maf' was made on x \(rows, 3\), and cannot take x \(rows, 2\)"):
        fit.evidence(torch.randn(5, 2))
    with pytest.raises(ValueError, match="z: this flow takes rows of 3 columns"):
        fit.module("flow").decode(torch.randn(5, 4))


def test_rows_may_be_whole_numbers_and_labels_are_left_out():
    x = torch.arange(40).reshape(20, 2) ** 2
    fit = pg.fit(real_nvp(2, layers=2, hidden=(8,)), {"x": x, "label": torch.arange(20)}, SVI(steps=3))
    assert math.isfinite(fit.evidence({"x": x}).mean) and affine_flow(1) is not None
    one = pg.fit(affine_flow(1), x[:, :1], STILL)
    assert one.evidence().mean == pytest.approx(mean_log_normal(x[:, :1].double()), abs=1e-4)  # float32
