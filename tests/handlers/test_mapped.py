"""Latent sites whose support torch has no map into: mixtures have that of their components, the rest is refused by name."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from fixtures import float64_under
from pyro.infer.autoguide import AutoMultivariateNormal

import ppl_gen as pg
from ppl_gen.inference import NUTS, SVI, Laplace, Pathfinder

float64_and_seed = float64_under(4)

X = torch.tensor([0.9, 1.6, 0.4, 1.2])


def spike_and_slab(x):
    parts = dist.LogNormal(torch.tensor([0.0, 0.5]), torch.tensor([0.1, 1.0]))
    y = pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.5, 0.5])), parts))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(y, 1.0), obs=x)


def exact_mean():
    """By the midpoint rule on (0, 8), beyond which there is less than 1e-9."""
    y = (torch.arange(80_000) + 0.5) / 10_000
    parts = dist.LogNormal(torch.tensor([0.0, 0.5]), torch.tensor([0.1, 1.0]))
    prior = dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.5, 0.5])), parts)
    log = prior.log_prob(y) + dist.Normal(y[:, None], 1.0).log_prob(X).sum(-1)
    return float(log.softmax(0) @ y)


def components_apart(x):
    parts = dist.Uniform(torch.tensor([0.0, 0.5]), torch.tensor([1.0, 2.0]))
    y = pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.5, 0.5])), parts))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(y, 1.0), obs=x)


def direction(x):
    y = pyro.sample("y", dist.ProjectedNormal(torch.ones(2)))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(y.sum(), 1.0), obs=x)


@pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")
def test_chains_move_in_a_mixture():
    """sd of y is about 0.35; 2000 draws worth 300 leave 0.02, and the tolerance is 5.5 of that."""
    fit = pg.fit(spike_and_slab, X, NUTS(draws=1000, warmup=300, chains=2), seed=0)
    draws = fit.posterior()["y"]
    assert (draws > 0).all()
    assert float(draws.mean()) == pytest.approx(exact_mean(), abs=0.11)


def test_guides_draw_within_a_mixture():
    fit = pg.fit(spike_and_slab, X, SVI(steps=50, lr=0.05), seed=0)
    assert (fit.posterior(draws=200)["y"] > 0).all()


ALGORITHMS = {
    "SVI": (None, SVI(steps=2)),
    "SVI, full": (AutoMultivariateNormal, SVI(steps=2)),
    "NUTS": (None, NUTS(draws=5, warmup=5, chains=1)),
    "Laplace": (None, Laplace()),
    "Pathfinder": (None, Pathfinder(paths=1)),
}


@pytest.mark.parametrize("model", [components_apart, direction], ids=lambda m: m.__name__)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_other_supports_are_refused_by_name(name, model):
    guide, algorithm = ALGORITHMS[name]
    with pytest.raises(pg.IncompatibleError, match="the latent site 'y': there is no map from all real numbers"):
        pg.fit(pg.Program(model, guide), X, algorithm, seed=0)
