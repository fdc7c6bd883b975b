"""Verdicts on models of other shapes: fits that are right by training or by a closed form, and their wrong siblings."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from verdict_kit import Case, as_written, falling, rows, source

import ppl_gen as pg
from ppl_gen.inference import EM, NUTS, SVI
from ppl_gen.models import gaussian_mixture


def regression(x, y):
    w = pyro.sample("w", dist.Normal(0.0, 3.0).expand([5]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


def correlated(seed: int, n: int = 60) -> dict[str, torch.Tensor]:
    """Five columns that share half of their variance."""
    z, common, e = (torch.randn(n, k, generator=source(seed + 100 * k)) for k in (5, 1, 2))
    x = (z + common) / 2**0.5
    return {"x": x, "y": x @ torch.tensor([1.0, -1.0, 0.5, 0.0, 2.0]) + e[:, 0]}


def logistic(x, y):
    w = pyro.sample("w", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=w[0] + w[1] * x), obs=y)


def clicks(seed: int) -> dict[str, torch.Tensor]:
    x = torch.randn(200, generator=source(seed))
    return {"x": x, "y": torch.bernoulli(torch.sigmoid(0.5 + x), generator=source(seed + 100))}


def coin(x):
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Bernoulli(p), obs=x)


def coin_guide(x):
    a = pyro.param("a", 2.0 + x.sum())
    pyro.sample("p", dist.Beta(a, 2.0 + len(x) - x.sum()))


def counts(x):
    rate = pyro.sample("rate", dist.Gamma(1.0, 0.5).expand([3]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Poisson(rate).to_event(1), obs=x)


def counts_guide(x):
    a = pyro.param("a", 1.0 + x.sum(0))
    pyro.sample("rate", dist.Gamma(a, 0.5 + len(x)).to_event(1))


def three_counts(seed: int) -> torch.Tensor:
    return torch.poisson(torch.tensor([0.5, 3.0, 20.0]).expand(12, 3), generator=source(seed))


def shares(x):
    p = pyro.sample("p", dist.Dirichlet(torch.ones(4)))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Categorical(p), obs=x)


def shares_guide(x):
    pyro.sample(
        "p", dist.Dirichlet(pyro.param("a", 1.0 + torch.bincount(x.long(), minlength=4).to(torch.get_default_dtype())))
    )


def mean_and_precision(x):
    tau = pyro.sample("tau", dist.Gamma(2.0, 2.0))
    t = pyro.sample("t", dist.Normal(0.0, (0.1 * tau).rsqrt()))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(t, tau.rsqrt()), obs=x)


def normal_gamma_guide(x):
    n, kappa = len(x), 0.1 + len(x)
    loc = pyro.param("loc", x.sum() / kappa)
    rate = 2.0 + 0.5 * (x - x.mean()).square().sum() + 0.05 * n * x.mean() ** 2 / kappa
    tau = pyro.sample("tau", dist.Gamma(2.0 + n / 2, rate))
    pyro.sample("t", dist.Normal(loc, (kappa * tau).rsqrt()))


def groups(x):
    """Eight groups of three rows each; non-centred."""
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    tau = pyro.sample("tau", dist.HalfNormal(2.0))
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([8]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu + tau * z, 1.0).to_event(1), obs=x)


def grouped(seed: int) -> torch.Tensor:
    means, e = torch.randn(8, generator=source(seed)), torch.randn(3, 8, generator=source(seed + 100))
    return 1.0 + means + e


def heavy(x):
    t = pyro.sample("t", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.StudentT(4.0, t, 1.0), obs=x)


def normal_mean(x):
    t = pyro.sample("t", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(t, 1.0), obs=x)


def few_counts(x):
    """All rows zero: the posterior of the rate is Gamma(1/2, 4), skewed on both of its scales."""
    rate = pyro.sample("rate", dist.Gamma(0.5, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Poisson(rate), obs=x)


def schools(y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("data", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


SCHOOLS = {
    "y": torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]),
    "sigma": torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]),
}


def student(df: float, times: float):
    """The normal posterior's centre with Student's tails; its scale ``times`` the posterior's sd."""

    def guide(x):
        variance = 1 / (1 / 100 + len(x))
        loc = pyro.param("loc", variance * x.sum())
        pyro.sample("t", dist.StudentT(df, loc, times * variance**0.5))

    return guide


def square(x):
    t = pyro.sample("t", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(t**2, 1.0), obs=x)


def both_modes(share: float):
    """Both modes of the square, each by its Laplace approximation, one with ``share`` of the mass."""

    def guide(x):
        mode = (x.mean() - 1 / (18 * len(x))).sqrt()
        sd = (4 * len(x) * mode**2).rsqrt()
        loc = pyro.param("loc", torch.stack([mode, -mode]))
        parts = dist.Normal(loc, sd)
        pyro.sample("t", dist.MixtureSameFamily(dist.Categorical(torch.tensor([share, 1 - share])), parts))

    return guide


def trained(program, guide, data, steps: int, lr: float = 0.03, **settings) -> Callable[[int], pg.Fit]:
    algorithm = SVI(steps=steps, lr=lr, schedule=falling(steps), **settings)
    return lambda seed: pg.fit(pg.Program(program, guide), data(seed), algorithm, seed=seed)


def sampled(program, data, **settings) -> Callable[[int], pg.Fit]:
    algorithm = NUTS(draws=1000, warmup=500, chains=4, processes=1, **settings)
    return lambda seed: pg.fit(program, data(seed), algorithm, seed=seed)


def with_outlier(seed: int) -> torch.Tensor:
    return torch.cat([rows(seed, 40, 0.0), torch.tensor([25.0])]).double()


def onto_one_row(seed: int) -> pg.Fit:
    """Maximum likelihood of a mixture whose second component has a row to itself: it narrows down to the floor."""
    return pg.fit(gaussian_mixture(components=2), with_outlier(seed), EM(), seed=seed)


def free_mixture(x):
    loc = pyro.param("loc", torch.tensor([0.0, 25.0]))
    scale = pyro.param("scale", torch.tensor([1.0, 0.05]), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(loc, scale)), obs=x)


def steps_onto_one_row(seed: int) -> pg.Fit:
    """The same by gradient steps whose rate falls to nothing: the loss settles though it has no end."""
    algorithm = SVI(steps=2000, lr=0.01, schedule=falling(2000))
    return pg.fit(pg.Program(free_mixture), with_outlier(seed), algorithm, seed=seed)


def two_clusters(seed: int) -> pg.Fit:
    """A narrow component of many rows has not collapsed."""
    x = torch.cat([rows(seed, 40, 0.0), 5.0 + 0.05 * rows(seed + 50, 20, 0.0)]).double()
    return pg.fit(gaussian_mixture(components=2), x, EM(), seed=seed)


SHAPES = [
    Case("regression, full rank", trained(regression, AutoMultivariateNormal, correlated, 3000), True),
    Case("regression, chains", sampled(regression, correlated), True),
    Case("a coin, exact", as_written(coin, coin_guide, lambda s: (rows(s, 25) > 0.5).float()), True),
    Case("three rates, exact", as_written(counts, counts_guide, three_counts), True),
    Case("shares, exact", as_written(shares, shares_guide, lambda s: rows(s, 60).abs().clamp_max(3).floor()), True),
    Case("mean and precision, exact", as_written(mean_and_precision, normal_gamma_guide, rows), True),
    Case("groups non-centred, chains", sampled(groups, grouped, target_accept=0.95), True),
    Case("logistic, full rank", trained(logistic, AutoMultivariateNormal, clicks, 3000), True),
    Case("heavy rows, trained", trained(heavy, AutoNormal, lambda s: rows(s, 100), 2000), True),
    Case(
        "minibatches, falling rate", trained(normal_mean, AutoNormal, lambda s: rows(s, 400), 4000, batch_size=50), True
    ),
    Case("Student's tails of 10, same sd", as_written(normal_mean, student(10.0, 0.8**0.5), rows), True),
    Case("both modes, equal", as_written(square, both_modes(0.5), lambda s: rows(s, 30, 4.0)), True),
    Case("two clusters by EM", two_clusters, True),
    Case("few counts, log-normal", trained(few_counts, AutoNormal, lambda s: torch.zeros(3), 3000), False),
    Case("eight schools centred, independent", trained(schools, AutoNormal, lambda s: SCHOOLS, 3000), False),
    Case("Student's tails of 2, wide", as_written(normal_mean, student(2.0, 1.3), rows), False),
    Case("both modes, 9 to 1", as_written(square, both_modes(0.9), lambda s: rows(s, 30, 4.0)), False),
    Case("regression, independent", trained(regression, AutoNormal, correlated, 3000), None),
    Case("onto one row by EM", onto_one_row, False),
    Case("onto one row by gradients", steps_onto_one_row, False),
]
