"""Wake-sleep against sums over all states of a small belief network.

Gradients are held to |z| < 5.5, a false alarm of 4e-8 each; no test looks at more than 100 of them.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from energy_cases import bars, mean_gradient, played, states
from fixtures import float64_under

import ppl_gen as pg
from ppl_gen.inference import ELBO, SVI, WakeSleep
from ppl_gen.models import helmholtz, ppca, vae

Z = 5.5

float64_and_seed = float64_under(5)


COPIES = 200  # of every row: the mean over rows is then a mean over as many draws


class Small:
    """A belief network of 4 visible and (2, 1) hidden units, with every density in closed form."""

    def __init__(self) -> None:
        self.x = torch.tensor([[1.0, 0, 0, 1], [1, 1, 0, 0], [0, 0, 0, 1]])
        self.rows = self.x.repeat(COPIES, 1)
        self.program = helmholtz(4, hidden=(2, 1))(self.x)
        trace = pyro.poutine.trace(self.program.model).get_trace(self.x)
        guided = pyro.poutine.trace(self.program.guide).get_trace(self.x)
        self.model = [node["value"] for node in trace.nodes.values() if node["type"] == "param"]
        self.guide = [node["value"] for node in guided.nodes.values() if node["type"] == "param"]
        with torch.no_grad():
            for parameter in (*self.model, *self.guide):
                parameter.normal_()
        self.hidden = states(3)

    def densities(self, x):
        """log p(x, z) and log q(z | x): rows x hidden states."""
        z1, z2 = self.hidden[:, :2], self.hidden[:, 2:]
        values = {"z1": z1[:, None].expand(-1, len(x), -1), "z2": z2[:, None].expand(-1, len(x), -1)}
        p, q = [], []
        for k in range(len(self.hidden)):
            at = {name: value[k] for name, value in values.items()}
            for function, found in ((self.program.model, p), (self.program.guide, q)):
                trace = pyro.poutine.trace(pyro.poutine.condition(function, at)).get_trace(x)
                trace.compute_log_prob()
                found.append(sum(trace.nodes[name]["log_prob"] for name in ("x", "z1", "z2") if name in trace.nodes))
        return torch.stack(p, 1), torch.stack(q, 1)


def flat(grads):
    return torch.cat([grad.flatten() for grad in grads]).detach()


def gap(found, exact):
    mean, error = found
    return float(((mean - exact).abs() / error.clamp_min(1e-12)).max())


def test_both_phases_have_the_gradients_of_their_sums_over_all_states():
    made = Small()
    game, batch = played(made.program, WakeSleep(), made.rows)
    log_p, log_q = made.densities(made.x)
    exact = flat(torch.autograd.grad(-(log_q.exp().detach() * log_p).sum(1).mean(), made.model))
    assert gap(mean_gradient(game, "program", made.model, batch, 100), exact) < Z
    every = states(4)
    log_p, log_q = made.densities(every)
    asleep = flat(torch.autograd.grad(-(log_p.exp().detach() * log_q).sum(), made.guide))
    found = mean_gradient(game, "guide", made.guide, batch, 100)
    assert gap(found, asleep) < Z
    log_p, log_q = made.densities(made.x)
    elbo = flat(torch.autograd.grad((log_q.exp() * (log_q - log_p.detach())).sum(1).mean(), made.guide))
    assert gap(found, elbo) > Z, "the sleep phase minimises the other divergence, and the test sees it"


def test_the_reweighted_phases_are_those_of_the_importance_weighted_bound():
    made = Small()
    game, batch = played(made.program, WakeSleep(particles=2, guide="wake"), made.rows)
    log_p, log_q = made.densities(made.x)
    weights = (log_p - log_q)[:, :, None].expand(-1, -1, len(made.hidden))
    pairs = torch.stack([weights, weights.mT])  # both particles, rows x states x states
    chance = (log_q[:, :, None] + log_q[:, None, :]).exp().detach()
    bound = torch.logsumexp(pairs, 0) - torch.tensor(2.0).log()
    exact = flat(torch.autograd.grad(-(chance * bound).sum((1, 2)).mean(), made.model, retain_graph=True))
    assert gap(mean_gradient(game, "program", made.model, batch, 100), exact) < Z
    shares = pairs.softmax(0).detach()
    both = torch.stack([log_q[:, :, None].expand(chance.shape), log_q[:, None, :].expand(chance.shape)])
    awake = flat(torch.autograd.grad(-(chance * (shares * both).sum(0)).sum((1, 2)).mean(), made.guide))
    assert gap(mean_gradient(game, "guide", made.guide, batch, 100), awake) < Z
    once, _ = played(made.program, WakeSleep(), made.rows)
    assert gap(mean_gradient(once, "program", made.model, batch, 100), exact) > Z, "one particle has another gradient"


def test_many_particles_learn_the_exact_likelihood():
    made = Small()
    game, batch = played(made.program, WakeSleep(particles=400), made.x.repeat(20, 1))
    log_p, _ = made.densities(made.x)
    exact = flat(torch.autograd.grad(-torch.logsumexp(log_p, 1).mean(), made.model))
    mean, error = mean_gradient(game, "program", made.model, batch, 20)
    assert float(((mean - exact).abs() - Z * error).max()) < 0.02  # self-normalised weights: a bias of order 1 / K


def test_each_player_moves_its_own_parameters_and_draws_carry_no_gradient():
    x = torch.randn(8, 3)
    program = vae(3, latent=2, hidden=(4,))(x)
    game, batch = played(program, WakeSleep(), x)
    assert [player.name for player in game.players] == ["guide", "program"]
    assert game.players[0].owns("encoder$$$network.first.weight")
    assert not game.players[0].owns("decoder$$$network.first.weight")
    names = {}
    for function in (program.guide, program.model):
        trace = pyro.poutine.trace(function).get_trace(x)
        names |= {n: node["value"] for n, node in trace.nodes.items() if node["type"] == "param"}
    for player in game.players:
        loss, _ = game.loss(player.name, batch, {})
        grads = torch.autograd.grad(loss.value, list(names.values()), allow_unused=True)
        reached = {name for name, grad in zip(names, grads, strict=True) if grad is not None and bool(grad.any())}
        assert reached and all(game.players[0].owns(name) == (player.name == "guide") for name in reached)


@pytest.mark.parametrize(
    "objective, gain",
    [
        pytest.param(WakeSleep(), 1.0, id="one", marks=pytest.mark.slow),
        pytest.param(WakeSleep(particles=10, guide="both"), 2.0, id="ten", marks=pytest.mark.slow),
    ],
)
def test_training_raises_the_evidence_and_reweighting_more_so(objective, gain):
    x = bars(3).repeat(4, 1)
    recipe = helmholtz(hidden=(8, 4))
    coins = float(dist.Bernoulli(x.mean(0)).to_event(1).log_prob(x).mean())
    untrained = pg.fit(recipe, x, SVI(objective, steps=1, lr=1e-30), seed=0)
    fit = pg.fit(recipe, x, SVI(objective, steps=600, lr=0.03), seed=0)
    assert untrained.evidence(particles=300).mean < coins + 0.2
    assert coins + gain < fit.evidence(particles=300).mean
    assert {"guide_loss", "program_loss", "bound"} <= set(fit.history)


def test_what_dreams_cannot_be_made_of_is_refused():
    def of_images(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(pyro.param("a", torch.ones(())) * z, 1.0), obs=2 * x)

    def guide(x):
        loc = pyro.param("b", torch.zeros(()))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc * x, 1.0))

    def sharing(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(pyro.param("b", torch.zeros(())) * z, 1.0), obs=x)

    def plain(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(pyro.param("a", torch.ones(())) * z, 1.0), obs=x)

    x, algorithm = torch.randn(6), SVI(WakeSleep(), steps=1)
    with pytest.raises(pg.IncompatibleError, match="'x' shows no entry of the data as it is"):
        pg.fit(pg.Program(of_images, guide), x, algorithm)
    with pytest.raises(pg.IncompatibleError, match=r"both have the parameter\(s\) b"):
        pg.fit(pg.Program(sharing, guide), x, algorithm)
    with pytest.raises(pg.IncompatibleError, match="amortised guide"):
        pg.fit(plain, x, algorithm)
    with pytest.raises(pg.IncompatibleError, match="outside the data plate"):
        pg.fit(ppca(3, 1), torch.randn(20, 3), algorithm)
    for settings, word in (
        ({"particles": 0}, "particles"),
        ({"guide": "awake"}, "guide"),
        ({"guide": "wake"}, "guide"),
    ):
        with pytest.raises(ValueError, match=word):
            WakeSleep(**settings)


def test_entries_by_name_are_dreamt_of_in_their_places():
    x = {"x": torch.bernoulli(torch.full((8, 3), 0.5)).byte(), "label": torch.arange(8)}
    fit = pg.fit(helmholtz(hidden=(2,)), x, SVI(WakeSleep(), steps=3), seed=0)
    again = pg.fit(helmholtz(hidden=(2,)), x["x"].numpy(), SVI(WakeSleep(), steps=3), seed=0)
    assert all(torch.equal(fit.params[name], again.params[name]) for name in fit.params)
    elbo = pg.fit(helmholtz(hidden=(2,)), x, SVI(ELBO(), steps=3), seed=0)
    assert set(elbo.params) == set(fit.params)
