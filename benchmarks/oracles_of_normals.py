"""Laplace, Pathfinder and SVI at its defaults: the normal equations, scipy's optimiser, quadrature."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from checks import Check, largest, rng
from pyro.infer.autoguide import AutoMultivariateNormal
from torch.distributions import MultivariateNormal, kl_divergence

import ppl_gen as pg
from ppl_gen.inference import SVI, Laplace, Pathfinder

__all__ = ["gaussian_posterior", "logistic_maximum", "mode_shares"]

UNITS = torch.tensor([1.0, 30.0, 0.02])
PRIOR = torch.tensor([2.0, 1.0, 50.0])


def linear(x, y):
    b = pyro.sample("b", dist.Normal(x.new_zeros(3), PRIOR.to(x)).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ b, 0.7), obs=y)


def gaussian_posterior() -> Iterator[Check]:
    x = torch.randn(60, 3, generator=rng()) * UNITS
    data = {"x": x, "y": x @ torch.tensor([0.5, -0.02, 20.0]) + 0.7 * torch.randn(60, generator=rng(1))}
    covariance = torch.linalg.inv(x.T @ x / 0.49 + torch.diag(PRIOR**-2))
    mean, sd = covariance @ (x.T @ data["y"]) / 0.49, covariance.diagonal().sqrt()
    exact = MultivariateNormal(mean, covariance)
    scaled = PRIOR * x
    evidence = float(MultivariateNormal(torch.zeros(60), 0.49 * torch.eye(60) + scaled @ scaled.T).log_prob(data["y"]))
    fit = pg.fit(linear, data, Laplace(), seed=0)
    loc, found = fit.guide.moments()
    yield Check("normal equations", "means by Laplace, in sds", largest((loc - mean) / sd, 0.0), 1e-8)
    error = largest(found / sd / sd[:, None], covariance / sd / sd[:, None])
    yield Check("normal equations", "covariance by Laplace, in sds", error, 1e-9)
    yield Check("closed form", "log evidence by Laplace", abs(fit.marginal_likelihood().mean - evidence), 1e-6)
    fit = pg.fit(linear, data, Pathfinder(), seed=0)
    found = float(kl_divergence(MultivariateNormal(*fit.guide.moments()), exact))
    yield Check("normal equations", "KL(q || p) by Pathfinder, nats", found, 0.05)
    yield Check("closed form", "log evidence by Pathfinder", abs(fit.marginal_likelihood().mean - evidence), 0.02)
    fit = pg.fit(pg.Program(linear, AutoMultivariateNormal), data, SVI(), seed=0)
    params = {name.rpartition(".")[2]: value for name, value in fit.params.items()}
    q = MultivariateNormal(params["loc"], scale_tril=params["scale"][:, None] * params["scale_tril"])
    yield Check("normal equations", "KL(q || p) by SVI() with full rank, nats", float(kl_divergence(q, exact)), 0.05)


def logistic_maximum() -> Iterator[Check]:
    from scipy.optimize import minimize
    from scipy.special import expit

    x = np.column_stack([np.ones(80), torch.randn(80, 2, generator=rng(2)).numpy()])
    y = (torch.rand(80, generator=rng(3)).numpy() < expit(x @ [0.3, -0.8, 0.5])).astype(float)

    def model(x, y):
        b = pyro.sample("b", dist.Normal(x.new_zeros(3), 2.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=x @ b), obs=y)

    def potential(b):
        return -(y * (x @ b) - np.logaddexp(0, x @ b)).sum() + b @ b / 8

    def slope(b):
        return -x.T @ (y - expit(x @ b)) + b / 4

    theirs = minimize(potential, np.zeros(3), jac=slope, method="BFGS", options={"gtol": 1e-10}).x
    share = expit(x @ theirs)
    covariance = np.linalg.inv(x.T @ ((share * (1 - share))[:, None] * x) + np.eye(3) / 4)
    fit = pg.fit(model, {"x": torch.tensor(x), "y": torch.tensor(y)}, Laplace(), seed=0)
    loc, found = fit.guide.moments()
    sd = np.sqrt(np.diag(covariance))
    yield Check("scipy BFGS", "logistic regression: maximum by Laplace, in sds", largest((loc - theirs) / sd, 0), 1e-6)
    yield Check("X'WX", "its covariance", largest(found, covariance), 1e-6)


def mode_shares() -> Iterator[Check]:
    def model(y):
        w = pyro.sample("w", dist.Normal(1.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(w.square(), 0.1), obs=y)

    fit = pg.fit(model, torch.ones(40), Pathfinder(paths=6, draws=4000), seed=0)
    grid = torch.linspace(-3, 3, 200_001)
    log = -0.5 * (grid - 1) ** 2 - 20 * ((1 - grid**2) / 0.1) ** 2
    exact = float(log[grid > 0].exp().sum() / log.exp().sum())
    share = float(fit.guide.shares[fit.guide.loc[:, 0] > 0].sum())
    yield Check("quadrature", f"share of the mode at +1, {exact:.4f}, by 6 paths", abs(share - exact), 0.04)
