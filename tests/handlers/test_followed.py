"""Values that bear marks have the shapes of those that bear none; oracle: the same draw without marks."""

from __future__ import annotations

from contextlib import ExitStack

import pyro
import pyro.distributions as dist
import pytest
import torch
from fixtures import float64_under
from pyro import poutine
from pyro.infer.autoguide import AutoGaussian, AutoMultivariateNormal, AutoStructured

import ppl_gen as pg
from ppl_gen.handlers.followed import Followed
from ppl_gen.inference import SVI

float64_and_seed = float64_under(3)

KINDS = {
    "Exponential": dist.Exponential,
    "Cauchy": lambda s: dist.Cauchy(0.0, s),
    "HalfCauchy": dist.HalfCauchy,
    "Laplace": lambda s: dist.Laplace(0.0, s),
    "Pareto": lambda s: dist.Pareto(s, 3.0),
    "Weibull": lambda s: dist.Weibull(s, 3.0),
    "Geometric": lambda s: dist.Geometric(s / (1 + s)),
    "Gamma": lambda s: dist.Gamma(s, s),  # one that needs nothing
}


@pytest.mark.parametrize("sizes", [(), (5,), (3, 5)], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_draws_keep_their_shapes_where_a_parameter_is_marked(name, sizes):
    def model():
        scale = pyro.sample("s", dist.LogNormal(0.0, 1.0)) * torch.ones(sizes)
        with ExitStack() as plates:
            for i, size in enumerate(sizes):
                plates.enter_context(pyro.plate(f"p{i}", size, dim=i - len(sizes)))
            pyro.sample("y", KINDS[name](scale))

    with Followed():
        trace = poutine.trace(model).get_trace()
    assert trace.nodes["y"]["value"].shape == sizes


def test_so_do_counts_of_categories():
    def model():
        share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
        pyro.sample("y", dist.Multinomial(4, share))

    with Followed():
        trace = poutine.trace(model).get_trace()
    assert trace.nodes["y"]["value"].shape == (3,)


def waiting(x):
    """A time and a shift, of which the rows see the sum alone."""
    rate = pyro.sample("rate", dist.LogNormal(0.0, 0.3))
    wait = pyro.sample("wait", dist.Exponential(rate))
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(wait.log().sum() + shift, 1.0), obs=x)


def correlation(fit):
    draws = fit.posterior(draws=4000, seed=1)
    return float(torch.corrcoef(torch.stack([draws["wait"].log(), draws["shift"]]))[0, 1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AutoGaussian, AutoStructured])
def test_guides_by_dependencies_see_those_of_such_draws(kind, tmp_path):
    """The parts of a sum are correlated at -0.8 or so; where the draw is lost, at zero to 0.09 (5.5 sd of 4000 draws)."""
    x = torch.tensor([0.2, 1.4, -0.7, 0.9])
    full = correlation(pg.fit(pg.Program(waiting, AutoMultivariateNormal), x, SVI(), seed=0))
    assert full < -0.7
    program = pg.Program(waiting, kind)
    assert abs(correlation(pg.fit(program, x, SVI(steps=1), seed=0))) < 0.4  # not yet learned
    fit = pg.fit(program, x, SVI(steps=700, lr=0.05), seed=0)
    assert correlation(fit) == pytest.approx(full, abs=0.15)
    fit.save(tmp_path / "fit")
    again = pg.load(tmp_path / "fit", program=program)
    assert torch.equal(again.posterior(draws=5, seed=2)["wait"], fit.posterior(draws=5, seed=2)["wait"])


@pytest.mark.parametrize("kind", [AutoGaussian, AutoStructured])
def test_they_are_set_up_over_a_plate_of_such_draws(kind):
    def horseshoe(x, y):
        width = pyro.sample("width", dist.HalfCauchy(1.0))
        with pyro.plate("columns", 3):
            scale = pyro.sample("scale", dist.HalfCauchy(width))
            slope = pyro.sample("slope", dist.Normal(0.0, scale))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ slope, 1.0), obs=y)

    x = torch.randn(30, 3)
    fit = pg.fit(pg.Program(horseshoe, kind), {"x": x, "y": 2 * x[:, 0]}, SVI(steps=5, lr=0.01), seed=0)
    assert fit.posterior(draws=7)["slope"].shape == (7, 3)
