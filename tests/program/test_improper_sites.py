"""A flat prior, ours or Pyro's ImproperUniform: it is fitted, and has no draws."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.distributions.transforms import ExpTransform

import ppl_gen as pg
from ppl_gen.inference import NUTS
from ppl_gen.models.improper import Flat

X = torch.arange(5.0)


def flat(kind):
    def model(x):
        pyro.sample("other", dist.Normal(0.0, 1.0))
        loc = pyro.sample("loc", kind)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    return model


NO_DRAWS = {
    "bare": dist.ImproperUniform(constraints.real, (), ()),
    "masked": dist.ImproperUniform(constraints.real, (), ()).mask(True),
    "transformed": dist.TransformedDistribution(dist.ImproperUniform(constraints.real, (), ()), [ExpTransform()]),
}


@pytest.mark.parametrize("kind", NO_DRAWS)
def test_it_has_no_prior_draws_and_says_so(kind):
    model = flat(NO_DRAWS[kind])
    assert pg.check(model, X).sites["loc"].improper
    with pytest.raises(pg.IncompatibleError, match=r"gives loc a flat \(improper\) prior, which has no draws"):
        pg.prior_predictive(model, X, draws=2)


@pytest.mark.parametrize("kind", [Flat(), dist.ImproperUniform(constraints.real, (), ())], ids=["flat", "improper"])
@pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")
def test_it_gives_the_mode_of_the_likelihood(kind):
    fit = pg.fit(flat(kind), X, NUTS(draws=200, warmup=100, chains=1), seed=0)
    # The posterior is Normal(2, 1 / sqrt(5)): the mean of 200 draws, 40 of them effective, is within 5 errors of 2.
    assert abs(float(fit.posterior()["loc"].mean()) - 2.0) < 5 * 0.447 / 40**0.5
