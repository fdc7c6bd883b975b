"""Pyro's ImproperUniform is answered with the name of what takes its place, which then works."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

import ppl_gen as pg
from ppl_gen.inference import EM, NUTS, SVI
from ppl_gen.models.improper import Flat

X = torch.arange(5.0)


def flat(kind):
    def model(x):
        pyro.sample("other", dist.Normal(0.0, 1.0))
        loc = pyro.sample("loc", kind)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    return model


@pytest.mark.parametrize("algorithm", [None, EM(), NUTS(draws=5, warmup=5, chains=1), SVI(steps=3), "prior"])
def test_what_has_no_draws_is_answered_with_flat(algorithm):
    model = flat(dist.ImproperUniform(constraints.real, (), ()))
    with pytest.raises(pg.IncompatibleError, match=r"at site 'loc': ImproperUniform has .*write ppl_gen.models.improp"):
        if algorithm is None:
            pg.check(model, X)
        elif algorithm == "prior":
            pg.prior_predictive(model, X, draws=2)
        else:
            pg.fit(model, X, algorithm)


def test_flat_gives_the_mode_of_the_likelihood():
    fit = pg.fit(flat(Flat()), X, NUTS(draws=200, warmup=100, chains=1), seed=0)
    # The posterior is Normal(2, 1 / sqrt(5)): the mean of 200 draws, 40 of them effective, is within 5 errors of 2.
    assert abs(float(fit.posterior()["loc"].mean()) - 2.0) < 5 * 0.447 / 40**0.5
