"""Fits whose posterior is known: a program, a guide at a known distance from it, and how far its moments are off."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from verdict_kit import UNTRAINED, Case, rows
from verdict_locals import LOCALS
from verdict_shapes import SHAPES

import ppl_gen as pg
from ppl_gen.inference import NUTS, SVI, Adversarial


def normal_mean(x):
    t = pyro.sample("t", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(t, 1.0), obs=x)


def free_mean(x):
    """A density, and a parameter that a game may move."""
    loc = pyro.param("loc", torch.tensor(0.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def funnel(x):
    s = pyro.sample("s", dist.Normal(0.0, 3.0))
    z = pyro.sample("z", dist.Normal(0.0, (s / 2).exp()).expand([5]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z.mean(), 1.0), obs=x)


def two_modes(x):
    t = pyro.sample("t", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(t**2, 1.0), obs=x)


def mixture(x):
    m = pyro.sample("m", dist.Normal(0.0, 5.0).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(m, 1.0)), obs=x)


def one_number(shift: float, scale: float) -> Callable[[int], pg.Fit]:
    """The exact posterior of a normal mean, moved by ``shift`` sd and ``scale`` times as wide."""

    def make(seed: int) -> pg.Fit:
        x = rows(seed)
        variance = 1 / (1 / 100 + len(x))
        mean, sd = variance * x.sum(), variance**0.5

        def guide(x):
            pyro.sample("t", dist.Normal(pyro.param("mean", mean + shift * sd), scale * sd))

        return pg.fit(pg.Program(normal_mean, guide), x, UNTRAINED, seed=seed)

    return make


def many_numbers(size: int, correlation: float, shift: float, scale: float, full: bool) -> Callable[[int], pg.Fit]:
    """A normal posterior: its own guide moved and widened, or (``full=False``) the best one of independent normals."""
    cov = (1 - correlation) * torch.eye(size) + correlation * torch.ones(size, size)
    tril = torch.linalg.cholesky(cov)
    spread = scale * (tril if full else torch.diag(torch.linalg.inv(cov).diagonal().rsqrt()))

    def make(seed: int) -> pg.Fit:
        def program(x):
            pyro.sample("u", dist.MultivariateNormal(torch.zeros(size), scale_tril=tril))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

        def guide(x):
            pyro.sample("u", dist.MultivariateNormal(pyro.param("loc", shift * torch.ones(size)), scale_tril=spread))

        return pg.fit(pg.Program(program, guide), rows(seed, 5), UNTRAINED, seed=seed)

    return make


def trained(program, guide, algorithm, n: int = 30, loc: float = 1.0) -> Callable[[int], pg.Fit]:
    return lambda seed: pg.fit(pg.Program(program, guide), rows(seed, n, loc), algorithm, seed=seed)


def half_a_point(seed: int) -> pg.Fit:
    def program(x):
        t = pyro.sample("t", dist.Normal(0.0, 10.0))
        s = pyro.sample("s", dist.Gamma(2.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(t, s), obs=x)

    def guide(x):
        pyro.sample("t", dist.Normal(x.mean(), 0.18))
        pyro.sample("s", dist.Delta(pyro.param("point", x.std())))

    return pg.fit(pg.Program(program, guide), rows(seed), UNTRAINED, seed=seed)


def gamma_rate(scale: float) -> Callable[[int], pg.Fit]:
    """The exact Gamma posterior of a Poisson rate, or one with ``scale`` times its sd at the same mean."""

    def program(x):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Poisson(rate), obs=x)

    def make(seed: int) -> pg.Fit:
        x = torch.poisson(torch.full((10,), 3.0), generator=torch.Generator().manual_seed(seed))

        def guide(x):
            a = pyro.param("a", (2.0 + x.sum()) / scale**2)
            pyro.sample("rate", dist.Gamma(a, (1.0 + len(x)) / scale**2))

        return pg.fit(pg.Program(program, guide), x, UNTRAINED, seed=seed)

    return make


def from_one_point(seed: int) -> pg.Fit:
    program = pg.Program(two_modes, start=lambda: {"t": torch.tensor(2.0)})
    algorithm = NUTS(draws=300, warmup=200, chains=4, jitter=0.1, processes=1)
    return pg.fit(program, rows(seed, 30, 4.0), algorithm, seed=seed)


def chains(program, loc: float = 1.0, **settings) -> Callable[[int], pg.Fit]:
    algorithm = NUTS(**{"draws": 500, "warmup": 300, "chains": 4, "processes": 1, **settings})
    return lambda seed: pg.fit(program, rows(seed, 30, loc), algorithm, seed=seed)


def one_label(seed: int) -> pg.Fit:
    x = torch.cat([rows(seed, 30, -2.0), rows(seed + 50, 30, 2.0)])
    return pg.fit(pg.Program(mixture, AutoMultivariateNormal), x, SVI(steps=1500, lr=0.01), seed=seed)


CASES = [
    Case("exact, 1 number", one_number(0.0, 1.0), True),
    *(Case(f"shifted by {s} sd, 1 number", one_number(s, 1.0), False) for s in (0.5, 1.0, 1.5, 2.0)),
    *(Case(f"scaled by {c}, 1 number", one_number(0.0, c), False) for c in (0.3, 0.5, 0.6, 1.6, 3.0, 30.0)),
    Case("shifted by 3 sd and scaled by 5", one_number(3.0, 5.0), False),
    Case("a little off (0.1 sd, 1.1 times)", one_number(0.1, 1.1), True),
    *(
        Case(f"exact, {d} numbers, correlation {r}", many_numbers(d, r, 0, 1, True), True)
        for d, r in ((2, 0.9), (20, 0.5))
    ),
    *(Case(f"independent, {d} numbers, correlation 0.9", many_numbers(d, 0.9, 0, 1, False), False) for d in (2, 5, 20)),
    *(Case(f"shifted by {s} sd, 20 numbers", many_numbers(20, 0.0, s, 1, True), False) for s in (0.5, 1.0)),
    *(Case(f"scaled by {c}, 5 numbers", many_numbers(5, 0.5, 0, c, True), False) for c in (0.5, 0.6, 1.6, 3.0)),
    Case("exact, a rate", gamma_rate(1.0), True),
    *(Case(f"scaled by {c}, a rate", gamma_rate(c), False) for c in (0.5, 1.7)),
    Case("a point", trained(normal_mean, AutoDelta, SVI(steps=500, lr=0.02)), False),
    Case("half a point", half_a_point, False),
    Case("unconverged, 20 steps", trained(normal_mean, AutoNormal, SVI(steps=20, lr=0.01)), False),
    Case("unconverged, 60 steps", trained(normal_mean, AutoNormal, SVI(steps=60, lr=0.01)), False),
    Case("trained", trained(normal_mean, AutoNormal, SVI(steps=2000, lr=0.01)), True),
    Case("minibatches, large steps", trained(normal_mean, AutoNormal, SVI(steps=300, lr=0.5, batch_size=2), 400), None),
    Case("funnel, independent", trained(funnel, AutoNormal, SVI(steps=1000, lr=0.02), 40, 0.5), False),
    Case("funnel, full rank", trained(funnel, AutoMultivariateNormal, SVI(steps=1000, lr=0.02), 40, 0.5), False),
    Case("one of two modes, guide", trained(two_modes, AutoNormal, SVI(steps=1000, lr=0.02), 30, 4.0), False),
    Case("one of two modes, chains from one point", from_one_point, False),
    Case("swapped labels, guide", one_label, None),
    Case("a game", trained(free_mean, None, SVI(Adversarial(), steps=50)), False),
    Case("chains", chains(normal_mean), True),
    Case("chains, two modes", chains(two_modes, 4.0), False),
    Case("chains, not mixed", chains(normal_mean, draws=30, warmup=5), False),
    Case("chains, divergent", chains(funnel), False),
    *LOCALS,
    *SHAPES,
]

assert len({case.name for case in CASES}) == len(CASES) >= 30
