"""The Gaussian-Bernoulli machine against quadrature and against the mixture of normals that it is.

Quadrature over a grid of spacing 0.1 standard deviations integrates normals to below 1e-10. |z| < 5.5 elsewhere.
"""

from __future__ import annotations

import math

import pytest
import torch
from energy_cases import mean_gradient, played, randomise, states
from fixtures import float64_under

import ppl_gen as pg
from ppl_gen.evidence.annealed import AIS, log_partition
from ppl_gen.inference import SVI, ContrastiveDivergence
from ppl_gen.models import gaussian_rbm
from ppl_gen.models.energy.gaussian_rbm import GaussianMachine
from ppl_gen.nn.chain_rows import ChainRows

Z = 5.5

float64_and_seed = float64_under(2)


def machine(hidden=3, scale=0.8):
    made = GaussianMachine(torch.tensor([5.0, -3.0]), torch.tensor([2.0, 0.5]), hidden, 1.0)
    randomise(made, scale)
    return made


@torch.no_grad()
def mixture(made):
    """The normals of the hidden states, in the user's units."""
    h = states(made.weight.shape[1])
    a, precision = made.visible_bias, torch.exp(-2 * made.log_scale)
    mean = a + h @ made.weight.T
    logits = h @ made.hidden_bias + 0.5 * ((mean**2 - a**2) * precision).sum(1)
    normals = torch.distributions.Normal(made.loc + made.spread * mean, made.spread * made.log_scale.exp())
    return torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=logits), torch.distributions.Independent(normals, 1)
    )


def test_the_density_is_that_of_a_mixture_of_normals_and_integrates_to_one():
    made = machine()
    x = made.loc + made.spread * torch.randn(50, 2)
    torch.testing.assert_close(made.log_density(x).detach(), mixture(made).log_prob(x), rtol=0, atol=1e-10)
    axis = torch.arange(-20.0, 20.0, 0.1)
    grid = torch.cartesian_prod(axis, axis)
    mass = made.log_density(made.loc + made.spread * grid).detach().exp().sum() * 0.1**2 * made.spread.prod()
    assert float(mass) == pytest.approx(1.0, abs=1e-8)


def test_sweeps_leave_the_density_invariant_and_rows_reach_it():
    made, count = machine(), 100_000
    exact = mixture(made)
    for rows in (
        made.gibbs(exact.sample((count,)), 1),
        ChainRows(made, sweeps=80).expand(torch.Size([count])).sample(),
    ):
        error = exact.stddev / count**0.5
        assert float(((rows.mean(0) - exact.mean) / error).abs().max()) < Z
        square = (rows - exact.mean) ** 2
        assert float(((square.mean(0) - exact.variance) / (square.std(0) / count**0.5)).abs().max()) < Z
    begun = made.begin(torch.Size([count]))
    assert float(((begun.mean(0) - exact.mean) / (exact.stddev / count**0.5)).abs().max()) > Z


@pytest.mark.parametrize("b", [0.0, 0.4, 1.0])
def test_tempered_sweeps_leave_each_density_on_the_way_invariant(b):
    """By importance weights from a wide normal: E_b[v] before and after a sweep."""
    made, count = machine(hidden=2), 200_000
    tempering = made.tempering()
    proposal = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(2), 3.0), 1)
    v = proposal.sample((count,))
    weights = (tempering.log_density(v, b) - proposal.log_prob(v)).detach().softmax(0)
    chosen = v[weights.multinomial(50_000, replacement=True)]
    moved = tempering.move(chosen, b, 2)
    for power in (1, 2):
        before, after = chosen**power, moved**power
        spread = (before.std(0) ** 2 + after.std(0) ** 2) ** 0.5 / 50_000**0.5
        heavy = (weights.square().sum() * before.var(0)) ** 0.5  # the resampled rows are no exact draws either
        assert float(((before.mean(0) - after.mean(0)).abs() / (spread + heavy)).max()) < Z


def test_annealing_finds_the_enumerated_log_z_and_a_fused_step_is_the_plain_one():
    made = machine(scale=0.6)
    exact, tempering = float(made.log_partition().detach()), made.tempering()
    rows = made.gibbs(made.begin(torch.Size([200])), 300)
    found = log_partition(tempering, AIS(temperatures=1000, chains=200), rows)
    assert found.agrees and abs(found.forward - exact) < 3 * found.forward_stderr + 0.1
    assert abs(found.reverse - exact) < 3 * found.reverse_stderr + 0.1
    v = tempering.begin(100)
    torch.manual_seed(1)
    states_after, gain = tempering.between(v, 0.2, 0.5)
    plain = (tempering.log_density(v, 0.5) - tempering.log_density(v, 0.2)).detach()
    torch.testing.assert_close(gain, plain, rtol=0, atol=1e-12)
    torch.manual_seed(1)
    assert torch.allclose(states_after, tempering.move(v, 0.5, 1), rtol=0, atol=1e-12)


def test_the_gradient_of_long_chains_is_that_of_the_exact_likelihood():
    x = torch.randn(40, 2) * torch.tensor([2.0, 0.5]) + torch.tensor([5.0, -3.0])
    program = gaussian_rbm(2, 2)(x)
    made = program.energy.free_energy.__self__
    randomise(made, 0.5)
    game, batch = played(program, ContrastiveDivergence(steps=60), x)
    found, error = mean_gradient(game, "program", list(made.parameters()), batch, 150)
    exact = torch.autograd.grad(-made.log_density(x).mean(), list(made.parameters()))
    assert float(((found - torch.cat([g.flatten() for g in exact])).abs() / error).max()) < Z


def test_training_finds_two_clusters_that_one_normal_does_not():
    centres = torch.tensor([[-3.0, 10.0], [3.0, 30.0]])
    x = torch.cat([centre + torch.randn(200, 2) * torch.tensor([0.5, 3.0]) for centre in centres])
    normal = torch.distributions.Normal(x.mean(0), x.std(0)).log_prob(x).sum(1).mean()
    recipe = gaussian_rbm(hidden=3, scale=0.1, sweeps=100)
    algorithm = SVI(ContrastiveDivergence(steps=2), steps=500, lr=0.03)
    untrained = pg.fit(recipe, x, SVI(ContrastiveDivergence(), steps=1, lr=1e-30), seed=0)
    assert abs(untrained.evidence().mean - float(normal)) < 0.15  # at small weights the machine is that normal
    fit = pg.fit(recipe, x, algorithm, seed=0)
    evidence = fit.evidence()
    assert evidence.exact and evidence.mean > float(normal) + 0.8
    near = torch.cdist(fit.sample(400, seed=1)["x"] / x.std(0), centres / x.std(0)).argmin(1)
    assert 100 < int(near.sum()) < 300, "chains visit both clusters"


def test_data_and_arguments_that_do_not_suit_are_refused():
    x = torch.randn(20, 3)
    for data, word in ((torch.ones(20, 3), "constant"), (x[:, :2], "rows of 3 columns")):
        with pytest.raises(ValueError, match=word):
            gaussian_rbm(3, 2)(data)
    for arguments in ({"visible": 0}, {"hidden": 0}, {"scale": -1.0}, {"scale": math.nan}, {"sweeps": 0}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            gaussian_rbm(**arguments)
