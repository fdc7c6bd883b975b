"""Guides that hold a site at one value: no uncertainty there, no density to propose from, and nothing to trust."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoNormal, AutoStructured

import ppl_gen as pg
from ppl_gen.inference import SVI
from ppl_gen.inference.guides.resolved import point_sites

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")  # chains and guides are short on purpose

X = torch.tensor([1.4, 0.2, 0.9, 1.7, -0.4, 0.8, 1.1, 0.3])


def model(x):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)


def deep(x):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(m, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def half(model, point):
    guide = AutoGuideList(model)
    guide.append(AutoDelta(pyro.poutine.block(model, expose=[point])))
    guide.append(AutoNormal(pyro.poutine.block(model, hide=[point])))
    return guide


def amortised_point(x):
    m = pyro.sample("m", dist.Normal(pyro.param("loc", torch.tensor(0.5)), 0.3))
    slope = pyro.param("slope", torch.tensor(0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Delta(m + slope * (x - m)))  # moves with m, which is drawn: no point


def local_point(x):
    pyro.sample("m", dist.Normal(pyro.param("loc", torch.tensor(0.5)), 0.3))
    slope = pyro.param("slope", torch.tensor(0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Delta(slope * x))


def finite_fed(x):
    up = pyro.sample("up", dist.Bernoulli(0.5), infer={"is_auxiliary": True})
    pyro.sample("a", dist.Delta(up * pyro.param("step", torch.tensor(1.0))))
    pyro.sample("b", dist.Delta(pyro.param("b_value", torch.tensor(0.3))))


CASES = {
    "all": (model, AutoDelta, ["a", "b"]),
    "half": (model, half(model, "a"), ["a"]),
    "structured": (model, AutoStructured(model, conditionals={"a": "normal", "b": "delta"}), ["b"]),
    "local autoguide": (deep, half(deep, "z"), ["z"]),
    "local": (deep, local_point, ["z"]),
}


@pytest.mark.parametrize("case", CASES)
def test_no_question_takes_a_point_for_a_posterior(case):
    program, guide, points = CASES[case]
    fit = pg.fit(pg.Program(program, guide), X, SVI(steps=150, lr=0.05))
    assert point_sites(fit.info) == points
    frame = fit.diagnose(draws=100)
    assert frame.attrs["verdict"].startswith(("doubtful", "do not trust"))
    assert f"{', '.join(points)} at one value" in frame.attrs["verdict"]
    with pytest.raises(pg.IncompatibleError, match=f"puts {', '.join(points)} at one value"):
        fit.marginal_likelihood(draws=20)
    tree = fit.to_arviz(draws=20)
    assert "log_q" not in tree["sample_stats"] and "at one value" in str(tree.attrs["log_q"])


def test_evidence_at_a_point_says_that_it_is_one():
    everything = pg.fit(pg.Program(model, AutoDelta), X, SVI(steps=300, lr=0.05))
    at = everything.posterior(draws=1)
    found = everything.evidence()
    assert found.kind == "exact; given one value of a, b"
    assert found.mean == pytest.approx(float(dist.Normal(at["a"][0] + at["b"][0], 1.0).log_prob(X).mean()), abs=1e-5)
    some = pg.fit(pg.Program(model, half(model, "a")), X, SVI(steps=300, lr=0.05))
    kind = some.evidence(draws=20).kind
    assert kind.startswith("averaged over 20 posterior draws") and kind.endswith("given one value of a")
    drawn = pg.fit(pg.Program(model, AutoNormal), X, SVI(steps=5))
    assert "one value" not in drawn.evidence(draws=20).kind


def test_deltas_that_move_with_a_draw_are_no_points():
    assert point_sites(pg.fit(pg.Program(deep, amortised_point), X, SVI(steps=2)).info) == []
    assert point_sites(pg.fit(pg.Program(model, AutoNormal), X, SVI(steps=2)).info) == []
    info = pg.fit(pg.Program(model, finite_fed), X, SVI(steps=2)).info
    assert point_sites(info) == ["b"]  # five coins that fall alike: once in 32 fits, and not under this seed


def test_points_of_rows_are_not_shared_by_minibatches():
    def row_points(x):
        pyro.sample("m", dist.Normal(pyro.param("loc", torch.tensor(0.5)), 0.3))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(pyro.param("places", torch.zeros(len(x)))))

    with pytest.raises(pg.IncompatibleError, match="z.*cannot follow a batch of another size"):
        pg.fit(pg.Program(deep, row_points), X, SVI(steps=5, batch_size=4))


def test_the_rest_of_a_half_point_guide_is_judged_given_the_point():
    fit = pg.fit(pg.Program(model, half(model, "a")), X, SVI(steps=600, lr=0.03))
    # Given a, b is normal with precision 1 + n: a mean-field guide is exact, so all weights are alike.
    frame = fit.diagnose(draws=200)
    assert frame.attrs["pareto_k"] < 0.5
    drawn = fit.posterior(draws=2000)
    assert float(drawn["b"].std()) == pytest.approx(1 / math.sqrt(1 + len(X)), rel=0.15)


def test_rows_are_weighed_at_the_auxiliary_draw_that_their_guide_saw():
    def through_an_auxiliary(x):
        drawn = pyro.sample(
            "m_raw", dist.Normal(pyro.param("loc", torch.tensor(0.5)), 1.0), infer={"is_auxiliary": True}
        )
        pyro.sample("m", dist.Delta(drawn))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((drawn + x) / 2, math.sqrt(0.5)))  # p(z | x, m), exactly

    fit = pg.fit(pg.Program(deep, through_an_auxiliary), X, SVI(steps=2, lr=1e-6))
    # Given m every weight is p(x_i | m): constant but for rounding, so that no row has a tail.
    assert float(max(fit.diagnose(draws=100).attrs["pareto_k_rows"])) < 0.3
