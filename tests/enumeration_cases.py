"""Programs with discrete sites, their values, and brute-force sums over all their states."""

from __future__ import annotations

import itertools

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine

from ppl_gen.enumeration.marginals import enumerated_trace


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def mixture(x, subsample=None):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("components", 3):
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=subsample) as rows:
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], scale), obs=x[rows])


def mixture_values():
    values = {
        "weights": torch.tensor([0.2, 0.5, 0.3]),
        "loc": torch.tensor([-1.0, 0.5, 2.0]),
        "scale": torch.tensor(0.7),
    }
    return {name: value.requires_grad_() for name, value in values.items()}


def mixture_table(x, values):
    weights = values["weights"] / values["weights"].sum()  # as Categorical does, which the gradient sees
    return weights.log() + dist.Normal(values["loc"], values["scale"]).log_prob(x[:, None])


def hmm(x, start, move, out, lengths=None, markov=pyro.markov):
    """Rows are sequences; a mask ends each at its own length."""
    count, steps = x.shape
    with pyro.plate("data", count):
        z = None
        for t in markov(range(steps)):
            alive = torch.ones(count, dtype=torch.bool) if lengths is None else t < lengths
            with poutine.mask(mask=alive):
                z = pyro.sample(f"z_{t}", dist.Categorical(start if z is None else move[z]))
                emission = dist.Normal(out[z], 0.8) if x.is_floating_point() else dist.Categorical(out[z])
                pyro.sample(f"x_{t}", emission, obs=x[:, t])


def hmm_case(states, steps, emission, rows=3):
    values = {
        "start": torch.rand(states, generator=rng(1)) + 0.1,
        "move": torch.rand(states, states, generator=rng(2)) + 0.1,
    }
    values = {name: value / value.sum(-1, keepdim=True) for name, value in values.items()}
    if emission == "normal":
        values["out"], x = torch.arange(states) - 0.5, torch.randn(rows, steps, generator=rng(3))
    else:
        table = torch.rand(states, 4, generator=rng(4)) + 0.1
        values["out"] = table / table.sum(-1, keepdim=True)
        x = torch.randint(4, (rows, steps), generator=rng(5))
    return x, {name: value.requires_grad_() for name, value in values.items()}


def all_paths(x, values):
    """Every state path (paths x steps), and its log-joint with each row (rows x paths)."""
    states, steps = len(values["start"]), x.shape[1]
    paths = torch.tensor(list(itertools.product(range(states), repeat=steps)))
    start, move = (values[name] / values[name].sum(-1, keepdim=True) for name in ("start", "move"))
    log = start.log()[paths[:, 0]]
    log = log + sum((move.log()[paths[:, t - 1], paths[:, t]] for t in range(1, steps)), torch.zeros(()))
    if x.is_floating_point():
        emission = dist.Normal(values["out"], 0.8).log_prob(x[..., None])
    else:
        emission = values["out"].log().t()[x]
    return paths, log + sum(emission[:, t][:, paths[:, t]] for t in range(steps))


def traced(model, *args, nesting=1, **kwargs):
    return enumerated_trace(model, args, plate_nesting=nesting, **kwargs)


def traced_hmm(x, values, **kwargs):
    return enumerated_trace(hmm, (x,), {**values, **kwargs}, plate_nesting=1)


def topics(words):
    """Documents are rows; a plate of words with topics of their own lies inside the plate of documents."""
    with pyro.plate("data", words.shape[1], dim=-1):
        kind = pyro.sample("kind", dist.Categorical(torch.tensor([0.4, 0.6])))
        with pyro.plate("words", words.shape[0], dim=-2):
            topic = pyro.sample("topic", dist.Categorical(torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.3, 0.2]])[kind]))
            pyro.sample("word", dist.Normal(1.0 * topic, 1.0), obs=words)


def coupled(x):
    shift = pyro.sample("shift", dist.Bernoulli(0.3))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.6))
        pyro.sample("x", dist.Normal(shift + 2 * z, 1.0), obs=x)
