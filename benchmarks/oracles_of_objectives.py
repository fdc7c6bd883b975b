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
from ppl_gen.inference.objectives.costs import COSTS
from ppl_gen.inference.objectives.critics import largest_singular_value, starting_vectors
from ppl_gen.inference.objectives.divergences import DIVERGENCES
from ppl_gen.inference.objectives.game import Setting
from ppl_gen.models import gaussian_mixture
from ppl_gen.program.dry_run import dry_run

__all__ = [
    "any_critic",
    "bounds_on_minibatches",
    "divergences",
    "evidence_by_importance",
    "optimal_critic",
    "parallel_lines",
    "players_in_turn_and_at_once",
    "singular_values",
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


def _divergence(name: str, p: dist.Normal, q: dist.Normal) -> float:
    """The integral of q f(p / q) by quadrature, f as it stands in the literature."""
    formulas = {
        "kl": lambda u: u * math.log(u),
        "reverse-kl": lambda u: -math.log(u),
        "hellinger": lambda u: (math.sqrt(u) - 1) ** 2,
        "jensen-shannon": lambda u: u * math.log(u) - (u + 1) * math.log(u + 1) + math.log(4),
        "pearson": lambda u: (u - 1) ** 2,
    }

    def integrand(value):
        a, b = (float(each.log_prob(torch.tensor(value))) for each in (p, q))
        return math.exp(b) * formulas[name](math.exp(a - b))

    return quad(integrand, -12, 14, limit=400, epsabs=1e-11)[0]


def _inverse(name: str, ratio: torch.Tensor) -> torch.Tensor:
    """The outputs r at which activation(r) = f'(ratio), in closed form."""
    log = ratio.log()
    return {"kl": log + 1, "reverse-kl": log, "hellinger": log / 2, "jensen-shannon": log, "pearson": 2 * (ratio - 1)}[
        name
    ]


def divergences() -> Iterator[Check]:
    p, q = dist.Normal(0.0, 1.0), dist.Normal(1.0, 1.5)
    grid = torch.linspace(-30.0, 30.0, 20_001)
    log_p, log_q = p.log_prob(grid), q.log_prob(grid)
    ratios = torch.logspace(-4, 4, 81)
    for name, chosen in DIVERGENCES.items():
        best = _inverse(name, (log_p - log_q).exp())
        paid = log_p.exp() * COSTS[name].real(best) + log_q.exp() * COSTS[name].fake(best)
        error = abs(float(-torch.trapezoid(paid, grid)) - _divergence(name, p, q))
        yield Check("quadrature", f"value of the {name} game at T* = f'(p/q) and the integral of q f(p/q)", error, 1e-6)
        slopes = chosen.slope(ratios)
        both, product = chosen.f(ratios) + chosen.conjugate(slopes), ratios * slopes
        error = float(((both - product).abs() / (1 + product.abs())).max())
        yield Check("identity", f"f(u) + f*(f'(u)) and u f'(u), u from 1e-4 to 1e4: {name}", error, 1e-10)


def any_critic() -> Iterator[Check]:
    p, q = dist.Normal(0.0, 1.0), dist.Normal(1.0, 1.5)
    grid = torch.linspace(-30.0, 30.0, 20_001)
    log_p, log_q = p.log_prob(grid), q.log_prob(grid)
    for name in DIVERGENCES:
        exact, numbers, bounds = _divergence(name, p, q), rng(3), []
        for _ in range(100):
            size, pitch, phase, share = torch.rand(4, 5, generator=numbers)
            wave = (size[:, None] * torch.sin(4 * pitch[:, None] * grid + 6.3 * phase[:, None])).sum(0)
            part = 1.2 * share[0]
            output = part * _inverse(name, (log_p - log_q).exp()) + (1 - part) * (COSTS[name].border + wave)
            paid = log_p.exp() * COSTS[name].real(output) + log_q.exp() * COSTS[name].fake(output)
            bounds.append(float(-torch.trapezoid(paid, grid)))
        said = f"values of the {name} game at 100 random critics: {min(bounds):.3g} to {max(bounds):.3g}"
        yield Check("bound", f"{said}, at most the divergence {exact:.3g}", max(bounds) - exact, 0.0)


def singular_values() -> Iterator[Check]:
    for shape in ((128, 2), (128, 128), (32, 144), (512, 256)):
        matrix = torch.randn(shape, generator=rng(5))
        exact = float(torch.linalg.matrix_norm(matrix, 2))
        found = float(largest_singular_value(matrix, starting_vectors(matrix), steps=30)[0])
        said = f"largest singular value of {shape[0]} x {shape[1]} by 30 steps of power iteration, relative"
        yield Check("closed form", said, abs(found - exact) / exact, 1e-3)


def players_in_turn_and_at_once() -> Iterator[Check]:
    rate, steps = 0.1, 50

    def point(x):
        theta = pyro.param("theta", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Delta(theta.expand(len(x), 1), event_dim=1), obs=x)

    turns = {"simultaneous": [[1.0, -rate], [rate, 1.0]], "alternating": [[1.0, -rate], [rate, 1.0 - rate**2]]}
    for schedule, turn in turns.items():
        critic = nn.Linear(1, 1, bias=False)
        nn.init.constant_(critic.weight, 0.5)
        game = Adversarial("wasserstein", critic=critic, penalty="none", critic_steps=1, schedule=schedule, averaging=0)
        fit = pg.fit(point, torch.zeros(4, 1), SVI(game, steps=steps, lr=rate, optimiser="sgd"), seed=0)
        ends = np.linalg.matrix_power(np.array(turn), steps) @ [0.5, 1.0]
        error = max(
            abs(float(fit.module("critic").weight.detach()) - ends[0]), abs(float(fit.params["theta"]) - ends[1])
        )
        yield Check("closed form", f"both players of the game theta phi after {steps} steps, {schedule}", error, 1e-10)


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
        # JS is log 2, KL infinite and total variation 1 at any distance: only W1 says how far.
        found = {}
        for kind in ("jensen-shannon", "kl", "hinge"):
            free = SVI(Adversarial(kind, penalty="none"), steps=300, batch_size=64, lr=rates)
            run = pg.fit(lines, data, free, seed=0)
            found[kind] = float(np.mean(run.records["divergence_bound"][-20:]))
        at = f"of lines {abs(theta):g} apart by a critic of 300 steps"
        js, apart, kl = found["jensen-shannon"] / 2, found["hinge"], found["kl"]
        yield Check("closed form", f"JS {at}: {js:.4f}, exact log 2", abs(js - math.log(2)), 0.02)
        said = f"total variation {at}: {apart:.4f}, exact 1"
        yield Check("closed form", said, abs(apart - 1), 0.03)
        if theta == 1.0:  # nearer than that the critic of KL, which pays exponentially for its errors, is not steady
            yield Check("bound", f"KL {at}: {kl:.3g}, exact: infinite; 10 less that", 10 - kl, 0.0)


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
