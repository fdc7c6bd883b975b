"""Games at their known optima, bounds on minibatches, evidence by importance weighting."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from checks import Check, rng
from oracles_of_models import mixture_rows
from pyro.infer import RenyiELBO
from scipy.integrate import quad
from torch import nn

import ppl_gen as pg
from ppl_gen.data.batching import Batch
from ppl_gen.inference import ELBO, IWAE, SVI, Adversarial
from ppl_gen.inference.objectives.adversarial import COSTS
from ppl_gen.inference.objectives.game import Setting
from ppl_gen.models import gaussian_mixture
from ppl_gen.program.dry_run import dry_run

__all__ = [
    "bounds_on_minibatches",
    "evidence_by_importance",
    "optimal_critic",
    "parallel_lines",
    "unbiased_minibatches",
]


def optimal_critic() -> Iterator[Check]:
    p, q = dist.Normal(0.0, 1.0), dist.Normal(1.0, 1.5)
    grid = torch.linspace(-30.0, 30.0, 20_001)
    log_p, log_q = p.log_prob(grid), q.log_prob(grid)

    def half(one, other):
        def integrand(value):
            a, b = (float(each.log_prob(torch.tensor(value))) for each in (one, other))
            return math.exp(a) * (a - np.logaddexp(a, b) + math.log(2))

        return 0.5 * quad(integrand, -30, 30, limit=200, epsabs=1e-11)[0]

    expected = 2 * (half(p, q) + half(q, p)) - math.log(4)
    for kind in ("minimax", "non-saturating"):
        best = log_p - log_q
        paid = log_p.exp() * COSTS[kind].real(best) + log_q.exp() * COSTS[kind].fake(best)
        error = abs(float(-torch.trapezoid(paid, grid)) - expected)
        yield Check("quadrature", f"value of the {kind} game at its best critic and 2 JS - log 4", error, 1e-6)


def parallel_lines() -> Iterator[Check]:
    for theta in (1.0, -0.5):

        def lines(x, theta=theta):
            shift = pyro.param("theta", torch.tensor(theta))
            with pyro.plate("data", len(x)):
                h = pyro.sample("h", dist.Uniform(0.0, 1.0))
                pyro.sample("x", dist.Delta(torch.stack([shift.expand_as(h), h], -1), event_dim=1), obs=x)

        critic = nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 1))
        h = torch.linspace(0.0, 1.0, 1000)
        data, made = (torch.stack([torch.full_like(h, place), h], -1) for place in (0.0, theta))
        objective = Adversarial("wasserstein", critic=critic, penalty="gradient", penalty_weight=50.0, critic_steps=1)
        rates = {"critic": 1e-2, "program": 1e-12}  # the program stays where it is
        trained = pg.fit(lines, data, SVI(objective, steps=400, batch_size=64, lr=rates), seed=0).module("critic")
        w1 = [float((net(data) - net(made)).mean().detach()) for net in (critic, trained)]
        said = f"W1 of lines {abs(theta):g} apart by a penalised critic: {w1[0]:.3f} untrained, {w1[1]:.3f} trained"
        yield Check("closed form", said, abs(w1[1] - abs(theta)), 0.05 * abs(theta))


# ----------------------------------------------------------------------------------------------- bounds and minibatches


def conjugate(x):
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(theta, 1.0), obs=x)


def game_of(objective, program, x) -> Callable[[torch.Tensor], float]:
    """The bound in nats, minus N times the loss, as a function of the batch's rows."""
    whole = Batch((x,), {}, len(x), len(x))
    info = dry_run(program, whole, guide=program.guide)
    game = objective.build(Setting(program, program.model, program.guide, info, whole, minibatches=True))

    def bound(rows):
        with torch.no_grad():
            return -len(x) * float(game.loss("program", Batch((x[rows],), {}, len(rows), len(x), rows), {})[0].value)

    return bound


def bounds_on_minibatches() -> Iterator[Check]:
    particles, count = 10, 320
    x = 1.0 + torch.randn(8, generator=rng(1))
    exact = float(dist.MultivariateNormal(torch.zeros(8), torch.eye(8) + 1).log_prob(x))
    mean, sd = x.sum() / 9, 1.5 / 3  # the posterior's mean, and half as much again as its sd
    elbo = exact - (0.5 * (1.5**2 - 1) - math.log(1.5))  # the evidence less KL(guide || posterior)

    def guide(*_):
        pyro.sample("theta", dist.Normal(mean, sd))

    ours = game_of(IWAE(particles), pg.Program(conjugate, guide), x)

    def pyros(rows):
        def model():
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            with pyro.plate("data", 8, subsample=rows):
                pyro.sample("x", dist.Normal(theta, 1.0), obs=x[rows])

        return -RenyiELBO(alpha=0, num_particles=particles, vectorize_particles=True, max_plate_nesting=1).loss(
            model, guide
        )

    for size in (8, 4, 2, 1):
        values = {"ours": [], "pyro's": []}
        for turn in range(count):  # every batch of the partition equally often
            rows = torch.arange(8).roll(-size * (turn % (8 // size)))[:size]
            values["ours"].append(ours(rows))
            values["pyro's"].append(pyros(rows))
        bound, error = np.mean(values["ours"]), np.std(values["ours"]) / math.sqrt(count)
        theirs, spread = np.mean(values["pyro's"]), np.std(values["pyro's"]) / math.sqrt(count)
        said = (
            f"IWAE({particles}) on batches of {size} of 8: {bound:.3f} ({error:.3f}), "
            + (f"in theory {elbo:.3f}, " if size < 8 else "")
            + f"at most the evidence {exact:.3f}; "
            f"pyro's RenyiELBO(alpha=0): {theirs:.3f} ({spread:.3f})"
            + (", above it" if theirs > exact + 5 * spread else "")
        )
        yield Check("closed form", said, bound - exact, 5 * error)


def unbiased_minibatches() -> Iterator[Check]:
    """The mean over every batch equals the whole at the same draw of the globals: an identity, to rounding."""
    x = mixture_rows(0, 6)
    mixture = gaussian_mixture(components=2)(x)
    start = mixture.start()

    def conjugate_guide(*_):
        pyro.sample("theta", dist.Normal(30.0, 0.5))

    def mixture_guide(*_):
        pyro.sample("weights", dist.Dirichlet(torch.tensor([3.0, 4.0])))
        pyro.sample("loc_standard", dist.Normal(start["loc_standard"], 0.1).to_event(1))
        pyro.sample("precision", dist.Gamma(torch.tensor([5.0, 6.0]), 2.0).to_event(1))

    def mixture_model(x):
        return mixture.model(x)

    programs = {
        "conjugate Normal": pg.Program(conjugate, conjugate_guide),
        "mixture, assignments summed out": pg.Program(mixture_model, mixture_guide),
    }
    for name, program in programs.items():
        bound, error = game_of(ELBO(), program, x), 0.0
        for size in (1, 2, 4):
            batches = [torch.tensor(rows) for rows in itertools.combinations(range(6), size)]

            def value(rows, bound=bound):
                torch.manual_seed(3)
                return bound(rows)

            error = max(error, abs(np.mean([value(rows) for rows in batches]) - value(torch.arange(6))))
        yield Check("identity", f"ELBO, mean over all batches of 1, 2, 4 of 6 rows and the whole: {name}", error, 1e-8)


def evidence_by_importance() -> Iterator[Check]:
    x = 1.0 + torch.randn(8, generator=rng(1))
    exact = float(dist.MultivariateNormal(torch.zeros(8), torch.eye(8) + 1).log_prob(x))
    fit = pg.fit(conjugate, x, SVI(steps=300, lr=0.02), seed=0)
    found = fit.marginal_likelihood(draws=2000)
    said = f"log p(all data) by importance weighting from SVI's guide: {found.mean:.4f}, exact {exact:.4f}"
    yield Check("closed form", said, abs(found.mean - exact), 5 * found.mc_stderr)
