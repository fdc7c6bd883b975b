"""Densities without data, flat priors, and reparameterisations whose centredness is a parameter."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.reparam import LocScaleReparam

import ppl_gen as pg
from ppl_gen.errors import IncompatibleError
from ppl_gen.inference import NUTS, SVI

CHAINS = NUTS(draws=800, warmup=300, chains=2, processes=1)


def gamma():
    """Gamma(3, 2) over a flat prior: mean 1.5, sd 0.87."""
    y = pyro.sample("y", dist.ImproperUniform(constraints.positive, (), ()))
    pyro.factor("u", dist.Gamma(3.0, 2.0).log_prob(y))


@pytest.mark.parametrize("algorithm", [CHAINS, SVI(steps=800, lr=0.02)], ids=["chains", "svi"])
def test_a_flat_prior_and_a_potential(algorithm) -> None:
    fit = pg.fit(gamma, (), algorithm, seed=0)
    draws = fit.posterior(draws=500)["y"]
    assert abs(float(draws.mean()) - 1.5) < 0.45 * 0.87  # 4.5 standard errors at an effective size of 100
    assert (draws > 0).all() and 0.6 < float(draws.std()) / 0.87 < 1.5
    with pytest.raises(IncompatibleError, match="flat"):
        pg.prior_predictive(gamma, ())


def groups(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", 3):
        t = pyro.sample("t", dist.Normal(mu, 0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(t.mean(), 1.0), obs=x)


def test_the_centredness_of_a_reparameterisation_is_no_unknown_of_the_posterior() -> None:
    """mean(t) ~ Normal(mu, 0.5 / sqrt 3): mu given x has precision 1 + 1 / (1 / 12 + 1 / n)."""
    x = torch.linspace(-1.0, 3.0, 12)
    model = poutine.reparam(groups, config={"t": LocScaleReparam()})
    draws = pg.fit(model, x, CHAINS, seed=0).posterior()["mu"]
    weight = 1 / (1 / 12 + 1 / 12)
    mean, sd = weight / (1 + weight), (1 + weight) ** -0.5
    assert abs(float(draws.mean()) - mean) < 0.35 * sd and 0.7 < float(draws.std()) / sd < 1.4
