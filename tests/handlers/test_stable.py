"""Stable distributions taken apart by Pyro's reparameterisers: many draws at once, against one at a time and a grid."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.reparam import LatentStableReparam, StableReparam, SymmetricStableReparam

import ppl_gen as pg
from ppl_gen.handlers.stable import batched_stable
from ppl_gen.inference import SVI

ALPHAS = torch.tensor([0.6, 0.993, 0.998, 1.0, 1.004, 1.3, 1.9])  # on both sides of the hole at 1, and in it
X = torch.tensor([-1.5, 0.2, 0.9, 4.0])


@pytest.mark.parametrize("how", [StableReparam(), SymmetricStableReparam(), LatentStableReparam()])
def test_many_draws_at_once_are_those_one_by_one(how) -> None:
    skew = 0.0 if isinstance(how, SymmetricStableReparam) else 0.4
    observed = None if isinstance(how, LatentStableReparam) else torch.tensor([0.3, -2.0])

    def total(alpha, seed):
        torch.manual_seed(seed)
        with poutine.reparam(config={"x": how}), poutine.trace() as kept:
            value = pyro.sample("x", dist.Stable(alpha, skew, 1.2, 0.5).expand([2]), obs=observed)
        return value.sum() if observed is None else kept.trace.nodes["x"]["fn"].log_prob(value).sum()

    with pyro.validation_enabled(False):
        slope, alone = torch.func.grad(total), torch.stack([total(a, 3) for a in ALPHAS])
        with pytest.raises(RuntimeError):
            torch.vmap(lambda a: total(a, 3), randomness="same")(ALPHAS)
        with batched_stable():
            together = torch.vmap(lambda a: total(a, 3), randomness="same")(ALPHAS)
            slopes = torch.vmap(lambda a: slope(a, 3), randomness="same")(ALPHAS)
    torch.testing.assert_close(together, alone, rtol=2e-4, atol=2e-4)
    leaves = [a.clone().requires_grad_() for a in ALPHAS]
    right = torch.stack([torch.autograd.grad(total(a, 3), a)[0] for a in leaves])
    torch.testing.assert_close(slopes, right, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("how, skew", [(LatentStableReparam(), 0.3), (StableReparam(), 0.3)])
@pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")
def test_latents_of_new_rows_against_a_grid(how, skew) -> None:
    prior = dist.Stable(1.6, skew, 1.0, 0.0)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    grid = torch.linspace(-12, 16, 4001)
    weights = torch.softmax(prior.log_prob(grid) + dist.Normal(grid, 0.5).log_prob(X[:, None]), -1)
    mean = (weights * grid).sum(-1)
    sd = ((weights * grid**2).sum(-1) - mean**2).sqrt()
    fit = pg.fit(poutine.reparam(model, {"z": how}), torch.zeros(6), SVI(steps=2), seed=0)
    z = fit.posterior(X, draws=400, seed=0)["z"]
    assert z.shape == (400, 4) and fit.predict(X, draws=3)["x"].shape == (3, 4)
    # chains of the auxiliary sites are worth an eighth of their draws at least: 5 standard errors of 50
    assert float(((z.mean(0) - mean) / sd).abs().max()) < 0.7
    torch.testing.assert_close(z.std(0), sd, rtol=0.5, atol=0)


@pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning", "ignore:.*draws carry:UserWarning")
@pytest.mark.parametrize("how, skew", [(StableReparam(), 0.3), (SymmetricStableReparam(), 0.0)])
def test_observed_in_new_rows_evidence_and_predictions(how, skew) -> None:
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Stable(1.6, skew, 1.0, 0.0), obs=x)

    fit = pg.fit(poutine.reparam(model, {"x": how}), torch.zeros(6), SVI(steps=2), seed=0)
    found = fit.evidence(X, particles=4000, seed=0)
    right = dist.Stable(1.6, skew, 1.0, 0.0).log_prob(X)
    torch.testing.assert_close(found.values, right.double(), rtol=0, atol=0.3)
    assert found.mc_stderr < 0.06
    assert fit.predict(X, draws=5)["x"].shape == (5, 4)
