"""Programs of the user's own kind for EM, where each step can be written out by hand."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch

import ppl_gen as pg

F64 = torch.float64


def tensor(*values):
    return torch.tensor(values, dtype=F64)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def close(actual, expected, tolerance):
    torch.testing.assert_close(torch.as_tensor(actual), torch.as_tensor(expected), rtol=tolerance, atol=tolerance)


def rises(fit, name="log_likelihood"):
    return bool((fit.history[name].diff("step") >= -1e-9).all())


def last(fit, name="log_likelihood"):
    return float(fit.history[name][-1])


def normals(x):
    """The user's own mixture of two normals: nothing offered, nothing standardised."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.tensor([2.0, 3.0])))
    with pyro.plate("components", 2):
        loc = pyro.sample("loc", dist.Normal(0.5, 2.0))
        scale = pyro.sample("scale", dist.LogNormal(-1.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)


def normals_log_density(values, x):
    return (values["weights"].log() + dist.Normal(values["loc"], values["scale"]).log_prob(x[:, None])).logsumexp(-1)


def normals_log_prior(values):
    return (
        dist.Dirichlet(tensor(2.0, 3.0)).log_prob(values["weights"])
        + dist.Normal(tensor(0.5), tensor(2.0)).log_prob(values["loc"]).sum()
        + dist.LogNormal(tensor(-1.0), tensor(1.0)).log_prob(values["scale"]).sum()
    )


def two_groups(count=60):
    noise = torch.randn(count, generator=rng(3), dtype=F64)
    return torch.where(torch.arange(count) % 3 == 0, -1.0 + 0.5 * noise, 1.5 + noise)


NORMALS_START = {"weights": tensor(0.4, 0.6), "loc": tensor(-0.5, 1.0), "scale": tensor(0.8, 1.3)}


def normals_step(values, x, weights=None):
    """One EM step by hand."""
    joint = values["weights"].log() + dist.Normal(values["loc"], values["scale"]).log_prob(x[:, None])
    share = joint.softmax(-1) * (1.0 if weights is None else weights[:, None])
    count = share.sum(0)
    loc = share.T @ x / count
    scale = ((share * (x[:, None] - loc) ** 2).sum(0) / count).sqrt()
    return {"weights": count / count.sum(), "loc": loc, "scale": scale}


def started(model, values, **parts):
    return pg.Program(model, start=lambda: values, **parts)


def regressions(a, y):
    """Two lines, two scales, a common curvature: locations share a coordinate across different scales."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    bend = pyro.sample("bend", dist.Normal(0.0, 1.0))
    with pyro.plate("lines", 2):
        start = pyro.sample("start", dist.Normal(0.0, 3.0))
        slope = pyro.sample("slope", dist.Normal(0.0, 3.0))
        scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
    with pyro.plate("data", len(a)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(start[z] + slope[z] * a + bend * a**2, scale[z]), obs=y)


def lines(count=80):
    a = torch.linspace(-2, 2, count, dtype=F64)
    noise = torch.randn(count, generator=rng(1), dtype=F64)
    odd = torch.arange(count) % 2 == 0
    return {"a": a, "y": torch.where(odd, 1.0 + 2.0 * a + 0.3 * noise, -1.0 - a + 0.7 * noise) + 0.2 * a**2}


REGRESSIONS_START = {
    "weights": tensor(0.5, 0.5),
    "bend": tensor(0.0).squeeze(),
    "start": tensor(0.5, -0.5),
    "slope": tensor(1.0, 0.0),
    "scale": tensor(1.0, 1.0),
}


def hierarchical(x):
    centre = pyro.sample("centre", dist.Normal(0.0, 5.0))
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("components", 2):
        loc = pyro.sample("loc", dist.Normal(centre, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], 0.8), obs=x)
