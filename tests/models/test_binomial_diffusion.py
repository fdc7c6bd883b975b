"""Binomial diffusion against sums over every path of tiny chains, and on the heartbeat whose likelihood is known.

Sums of at most 16 * 16 products in float64 round to below 1e-13. Monte Carlo means are held to |z| < 5, a false alarm
of 6e-7 each.
"""

from __future__ import annotations

import itertools
import math

import pyro.distributions as dist
import pytest
import torch
from fixtures import float64_under

import ppl_gen as pg
from ppl_gen.data.rows import Rows
from ppl_gen.inference import ELBO, SVI
from ppl_gen.models import binomial_diffusion, inpaint
from ppl_gen.models.diffusion.bits import BitDiffusion, BitNoising, erasing_schedule

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")  # chains and guides are short on purpose

Z = 5.0
STILL = {"steps": 1, "lr": 1e-30}  # one step too small to change any weight

float64_and_seed = float64_under(11)


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def states(bits):
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=bits)))


def chances(ones, to):
    """Of going to each of the rows ``to`` from each row of chances of ones: from x to."""
    return dist.Bernoulli(ones[:, None]).log_prob(to).sum(-1).exp()


class Some(torch.nn.Module):
    """A chain back that looks at all bits, near enough to the right one for bounds to be close."""

    def __init__(self, noising, bits):
        super().__init__()
        self.noising = noising
        self.mix = torch.nn.Parameter(0.5 * torch.randn(noising.steps, bits, bits))

    def forward(self, x, t):
        guess = ((2 * x - 1)[:, None] @ self.mix[t - 1]).squeeze(1).sigmoid()
        one, zero = (self.noising.posterior(torch.full_like(x, bit), x, t) for bit in (1.0, 0.0))
        return guess * one + (1 - guess) * zero


def some_chain(bits=3, steps=4):
    noising = erasing_schedule(steps)
    return BitDiffusion(noising, Some(noising, bits), (bits,))


@pytest.mark.parametrize("betas", [[0.2, 0.5, 0.3], [0.25, 1 / 3, 0.5, 1.0]])
def test_closed_forms_of_the_chain_equal_sums_over_its_paths(betas):
    chain = BitNoising(torch.tensor(betas))
    kernels = [torch.tensor([[1 - b / 2, b / 2], [b / 2, 1 - b / 2]]) for b in betas]  # from x to, bits 0 and 1
    arrived = torch.eye(2)  # from b_0
    for t, kernel in enumerate(kernels, 1):
        before, arrived = arrived, arrived @ kernel
        for start, value in itertools.product((0, 1), repeat=2):
            b_0, b_t = (torch.tensor([[float(bit)]]) for bit in (start, value))
            exact = before[start, 1] * kernel[1, value] / arrived[start, value]
            close(chain.posterior(b_0, b_t, t).squeeze(), exact, 1e-8)
            close(chain.marginal(b_0, t).squeeze(), arrived[start, 1], 1e-8)
            close(chain.step(b_0, t).squeeze(), kernel[start, 1], 1e-8)
        for s in range(t):
            moved = torch.linalg.multi_dot(kernels[s:t]) if t - s > 1 else kernels[s]
            close(chain.between(torch.tensor([0.0, 1.0]), s, t), moved[:, 1], 1e-8)
    for bad in ([], [0.0], [1.0, 0.5], [1.5]):
        with pytest.raises(ValueError, match="betas"):
            BitNoising(torch.tensor(bad))


def log_density(chain, rows):
    """log p(b_0): all states carried from b_T down to b_0."""
    every = states(chain.shape[0])
    mass = torch.full((len(every),), 1.0 / len(every))
    for t in range(chain.steps, 1, -1):
        mass = mass @ chances(chain.reverse(every, t), every)
    return (mass @ chances(chain.reverse(every, 1), rows)).log().detach()


def exact_bound(chain, rows):
    """E_q of the terms, over every b_t."""
    every, total = states(chain.shape[0]), chain.constant(rows)
    for t in range(1, chain.steps + 1):
        weight = chances(chain.noising.marginal(rows, t), every)
        costs = [chain.cost(t, row.expand_as(every), every) for row in rows]
        total = total + (weight * torch.stack(costs)).sum(1)
    return -total.detach()


def path_bound(chain, row):
    """E_q[log p(b_0, ..., b_T) - log q(b_1, ..., b_T | b_0)] over every path, with no closed form in it."""
    every, total = states(chain.shape[0]), 0.0
    for path in itertools.product(range(len(every)), repeat=chain.steps):
        here, log_q, log_p = row, 0.0, -chain.shape[0] * math.log(2)
        for t, place in enumerate(path, 1):
            there = every[place]
            log_q = log_q + dist.Bernoulli(chain.noising.step(here[None], t)[0]).log_prob(there).sum()
            log_p = log_p + dist.Bernoulli(chain.reverse(there[None], t)[0]).log_prob(here).sum()
            here = there
        total = total + log_q.exp() * (log_p - log_q)
    return total.detach()


def test_terms_sum_to_the_bound_over_every_path_which_stays_below_the_density():
    chain = some_chain(bits=2, steps=3)
    rows = states(2)
    bound = exact_bound(chain, rows)
    close(bound, torch.stack([path_bound(chain, row) for row in rows]), 1e-8)
    assert bool((bound < log_density(chain, rows) - 1e-3).all())
    close(log_density(chain, rows).exp().sum(), torch.tensor(1.0), 1e-10)


def test_sampled_time_steps_have_the_bound_as_their_mean():
    chain, rows = some_chain(), states(3)
    exact = exact_bound(chain, rows)
    many = rows.repeat(4000, 1)
    t = 1 + torch.randint(chain.steps, (len(many),))
    drawn = -(chain.steps * chain.term(t, many) + chain.constant(many)).detach().unflatten(0, (4000, 8))
    z = (drawn.mean(0) - exact) / (drawn.std(0) / 4000**0.5)
    assert float(z.abs().max()) < Z and Z * float(drawn.std(0).max()) / 4000**0.5 < 0.5


@pytest.mark.slow
def test_evidence_lies_between_the_bound_and_the_density():
    chain, rows = some_chain(), states(3)
    fit = pg.fit(pg.Recipe(lambda data: chain.program()), rows, SVI(**STILL))
    truth, bound = log_density(chain, rows), exact_bound(chain, rows)
    many = fit.evidence(particles=4000, seed=1)
    assert bool((many.values > bound).all())
    close(many.values, truth, 0.25)  # some paths are rare under q: the worst of eight rows is off by 0.13 (measured)


def test_the_untrained_program_makes_independent_bits_with_the_frequencies_of_the_data():
    x = (torch.rand(40, 5) < torch.tensor([0.1, 0.5, 0.9, 0.3, 0.0])).double()
    fit = pg.fit(binomial_diffusion(steps=6, hidden=8), x, SVI(**STILL))
    often = (x.sum(0) + 0.5) / 41
    for particles in (1, 5):  # every weight is log p(x): no noise at all
        evidence = fit.evidence(particles=particles)
        close(evidence.values, dist.Bernoulli(often).log_prob(x).sum(-1), 1e-10)
    drawn = fit.sample(20_000, seed=1)
    assert set(drawn) == {"x", *(f"x_{t}" for t in range(1, 7))} and set(drawn["x"].unique().tolist()) == {0.0, 1.0}
    z = (drawn["x"].mean(0) - often) / (often * (1 - often) / 20_000) ** 0.5
    assert float(z.abs().max()) < Z
    assert abs(float(drawn["x_6"].mean()) - 0.5) < Z * 0.5 / 100_000**0.5


def heartbeat(rows):
    """A one in every fifth place and zeros between, begun anywhere: twenty places, five rows that differ."""
    place = torch.arange(20) % 5
    return (place == torch.randint(5, (rows, 1))).double()


@pytest.mark.slow
def test_trained_on_the_heartbeat_it_nears_the_truth_and_completes_it():
    """log p = -log 5 = -1.609 nats for each row; Sohl-Dickstein et al. (2015) report -1.673 (2.414 bits)."""
    x, truth = heartbeat(1000).float(), -math.log(5)
    recipe = binomial_diffusion(steps=20, hidden=64)
    still = pg.fit(recipe, x, SVI(**STILL)).evidence(particles=10).mean
    assert still < truth - 5.0
    fit = pg.fit(recipe, x, SVI(steps=1500, lr=3e-3, batch_size=200), seed=0)
    bound = fit.evidence(heartbeat(200).float(), particles=50)
    assert truth - 0.3 < bound.mean < truth + Z * bound.mc_stderr
    seen = torch.zeros(200, 20, dtype=torch.bool)
    seen[:, :5] = True
    rows = heartbeat(200).float()
    right = [
        float((inpaint(fit, rows, seen, seed=1, **how)[0] == rows).all(1).float().mean())
        for how in ({"resamples": 1}, {}, {"particles": 50})
    ]
    assert right[0] < right[1] < right[2] and right[2] > 0.8, right  # measured: 0.44, 0.81, 0.94


def test_whole_chains_and_sampled_steps_train_the_same_program():
    x = heartbeat(30)
    for objective in (ELBO(), ELBO(time_step="all")):
        fit = pg.fit(binomial_diffusion(steps=4, hidden=8), x, SVI(objective, steps=3), seed=0)
        assert fit.records["program_loss"][-1] > 0


@pytest.mark.parametrize(
    "data, message",
    [
        (torch.rand(5, 2) + 0.1, "binomial_diffusion takes zeros and ones, got"),
        (torch.ones(5, 3), r"takes rows of 2 columns, got \(5, 3\)"),
        ({"y": torch.ones(5, 2)}, "reads the entry 'x'"),
    ],
)
def test_data_that_do_not_suit_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        pg.fit(binomial_diffusion(2, steps=4), data, SVI(steps=1))


def test_rows_that_are_drawn_as_coins_for_every_batch_are_taken():
    grey = Rows({"x": torch.full((40, 3), 0.3)}, on_batch=lambda batch: {"x": torch.bernoulli(batch["x"])})
    fit = pg.fit(binomial_diffusion(steps=3, hidden=4), grey, SVI(steps=3, batch_size=10), seed=0)
    assert set(fit.sample(5, seed=0)["x"].unique().tolist()) <= {0.0, 1.0}
    with pytest.raises(ValueError, match="binomial_diffusion takes zeros and ones, got 0.3"):
        pg.check(binomial_diffusion(steps=3, hidden=4), grey["x"])
