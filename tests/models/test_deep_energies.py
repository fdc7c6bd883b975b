"""Deep Boltzmann machines and belief networks of 6-4-3 units against sums over all of their states.

A sum over at most 2^13 states in float64 rounds to below 1e-11. Frequencies and gradients: |z| < 5.5.
"""

from __future__ import annotations

import pyro
import pytest
import torch
from energy_cases import bars, frequency_gap, mean_gradient, played, randomise, states
from fixtures import float64_under

import ppl_gen as pg
from ppl_gen.evidence.annealed import AIS, log_partition
from ppl_gen.inference import SVI, ContrastiveDivergence, WakeSleep
from ppl_gen.models import dbm, dbn, gan, rbm, rbm_stack
from ppl_gen.models.energy.dbm import DeepMachine
from ppl_gen.models.energy.rbm import BoltzmannMachine
from ppl_gen.nn.chain_rows import ChainRows

Z = 5.5

float64_and_seed = float64_under(3)


def machine(sizes=(6, 4, 3), scale=1.0, updates=50):
    made = DeepMachine(torch.zeros(sizes[0]), sizes[1:], 1.0, updates)
    randomise(made, scale)
    return made


def minus_energy(made):
    """-E(v, h) of every joint state, written out term by term: states of the first layer x ... x of the last."""
    layers = [states(size) for size in made.sizes]
    total = torch.zeros(())
    for place, (layer, bias) in enumerate(zip(layers, made.biases, strict=True)):
        shape = [1] * len(layers)
        shape[place] = len(layer)
        total = total + (layer @ bias).reshape(shape)
    for place, weight in enumerate(made.weights):
        shape = [1] * len(layers)
        shape[place : place + 2] = len(layers[place]), len(layers[place + 1])
        total = total + (layers[place] @ weight @ layers[place + 1].T).reshape(shape)
    return total.detach()


# ------------------------------------------------------------------------------------------- deep Boltzmann machines


@pytest.mark.parametrize("sizes", [(6, 4, 3), (4, 2, 3, 2), (3, 2, 2, 2, 2)])
def test_log_z_and_the_exact_free_energy_are_sums_over_all_states(sizes):
    made = machine(sizes)
    weights = minus_energy(made).flatten(1)
    rows = states(sizes[0])
    torch.testing.assert_close(made.log_partition(), torch.logsumexp(weights.flatten(), 0), rtol=0, atol=1e-10)
    exact = -torch.logsumexp(weights, 1)
    torch.testing.assert_close(made.exact_free_energy(rows), exact, rtol=0, atol=1e-10)
    torch.testing.assert_close(made.log_density(rows).exp().sum(), torch.tensor(1.0), rtol=0, atol=1e-10)


@pytest.mark.parametrize("sizes", [(6, 4, 3), (4, 2, 3, 2)])
def test_the_mean_field_lies_above_the_free_energy_by_a_divergence(sizes):
    made = machine(sizes)
    rows = states(sizes[0])
    hidden = minus_energy(made)
    log_posterior = hidden.flatten(1) - torch.logsumexp(hidden.flatten(1), 1, keepdim=True)
    log_q = torch.zeros(len(rows), *hidden.shape[1:])
    for place, logits in enumerate(made.mean_field(rows), 1):
        layer = states(sizes[place])
        coins = torch.distributions.Bernoulli(logits=logits[:, None])
        shape = [len(rows)] + [1] * (len(sizes) - 1)
        shape[place] = len(layer)
        log_q = log_q + coins.log_prob(layer).sum(-1).reshape(shape)
    log_q = log_q.flatten(1)
    divergence = (log_q.exp() * (log_q - log_posterior)).sum(1)
    gap = made.free_energy(rows) - made.exact_free_energy(rows)
    torch.testing.assert_close(gap, divergence, rtol=0, atol=1e-10)
    assert float(divergence.min()) > -1e-12 and float(divergence.max()) > 1e-3


def test_the_bound_is_tight_where_the_layers_above_are_not_connected():
    made = machine()
    with torch.no_grad():
        made.weights[1].zero_()
    rows = states(6)
    torch.testing.assert_close(made.free_energy(rows), made.exact_free_energy(rows), rtol=0, atol=1e-12)
    loose = machine(updates=1)
    better = machine(updates=1)
    better.load_state_dict(loose.state_dict())
    better.updates = 30
    assert float((better.free_energy(rows) - loose.free_energy(rows)).detach().max()) < 1e-9, (
        "updates never loosen the bound"
    )


def test_chains_over_odd_layers_leave_the_machine_where_it_is():
    made, count = machine(scale=0.6), 30_000
    joint = minus_energy(made).flatten().softmax(0).reshape(64, 16, 8)
    tempering = made.tempering()
    odd = tempering.move(tempering.begin(count), 1.0, 80)
    assert frequency_gap(odd, joint.sum((0, 2))) < Z
    assert frequency_gap(tempering.begin(count), joint.sum((0, 2))) > Z, "coins are another distribution"
    drawn = ChainRows(made, sweeps=80).expand(torch.Size([count])).sample()
    assert frequency_gap(drawn, joint.sum((1, 2))) < Z


def test_annealing_finds_log_z_from_below_and_above():
    made = machine(scale=0.7)
    exact = float(made.log_partition().detach())
    rows = ChainRows(made, sweeps=300).expand(torch.Size([200])).sample()
    found = log_partition(made.tempering(), AIS(temperatures=1000, chains=200), rows)
    assert found.agrees and abs(found.forward - exact) < 3 * found.forward_stderr + 0.1
    assert abs(found.reverse - exact) < 3 * found.reverse_stderr + 0.1


@pytest.mark.slow
def test_the_gradient_is_that_of_the_bound_where_chains_have_arrived():
    x = torch.bernoulli(torch.full((200, 6), 0.4))
    program = dbm(6, (4, 3), updates=60)(x)
    made = program.energy.free_energy.__self__
    randomise(made, 0.7)
    game, batch = played(program, ContrastiveDivergence(steps=60), x)
    found, error = mean_gradient(game, "program", list(made.parameters()), batch, 40)
    bound = made.free_energy(x).mean() + made.log_partition()
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(bound, list(made.parameters()))])
    assert float(((found - exact).abs() / error).max()) < Z
    short, _ = played(program, ContrastiveDivergence(steps=1), x)
    found, error = mean_gradient(short, "program", list(made.parameters()), batch, 300)
    assert float(((found - exact).abs() / error).max()) > Z


def test_a_deep_machine_learns_bars_and_its_bound_is_below_its_evidence():
    x, recipe = bars(3), dbm(hidden=(8, 4), scale=0.1, sweeps=200)
    persistent = ContrastiveDivergence(persistent=True, chains=100)
    coins = float(torch.distributions.Bernoulli(x.mean(0)).log_prob(x).sum(1).mean())
    untrained = pg.fit(recipe, x, SVI(persistent, steps=1, lr=1e-30), seed=0)
    assert untrained.evidence().mean < coins + 0.05
    fit = pg.fit(recipe, x, SVI(persistent, steps=800, lr=0.01), seed=0)
    exact = fit.evidence()
    assert exact.exact and exact.mean > coins + 1.0
    bound = fit.evidence(method=pg.AIS(temperatures=1000, chains=200))
    assert bound.mean < exact.mean + 3 * bound.mc_stderr and bound.mean > exact.mean - 2.0
    assert "variational lower bound" in bound.kind


# ------------------------------------------------------------------------------------------------- belief networks


def network(x, sizes=(4, 3), scale=1.0):
    program = dbn(6, sizes)(x)
    top = program.energy.free_energy.__self__
    params = {}
    for function in (program.model, program.guide):
        trace = pyro.poutine.trace(function).get_trace(x)
        params |= {name: node["value"] for name, node in trace.nodes.items() if node["type"] == "param"}
    with torch.no_grad():
        for value in params.values():
            value.normal_(std=scale)
    return program, top, params


def test_the_evidence_of_a_belief_network_is_its_sum_over_hidden_states():
    x = torch.bernoulli(torch.full((20, 6), 0.4))
    algorithm = SVI(WakeSleep(), steps=150, lr=0.05)
    fit = pg.fit(dbn(6, (4, 3), scale=0.5, sweeps=50), x, algorithm, seed=0)
    net = fit.module("network")
    z = states(4)
    log_prior = -net.top.free_energy(z) - net.top.log_partition()
    log_likelihood = net.down.coins(0, z[:, None]).log_prob(x)  # states x rows
    exact = torch.logsumexp(log_prior[:, None] + log_likelihood, 0).detach()
    found = fit.evidence(particles=4000)
    assert "log Z by enumeration" in found.kind
    assert abs(found.mean - float(exact.mean())) < Z * found.mc_stderr + 1e-3
    annealed = fit.evidence(particles=4000, method=pg.AIS(temperatures=500, chains=200))
    assert abs(annealed.mean - float(exact.mean())) < Z * annealed.mc_stderr + 0.01


def test_up_down_has_the_gradients_of_its_sums_where_the_top_chain_has_arrived():
    x = torch.tensor([[1.0, 0, 0, 1, 1, 0], [0, 1, 1, 0, 1, 0]])
    rows = x.repeat(200, 1)  # the mean over rows is then a mean over as many draws
    program, top, params = network(x, scale=0.7)
    model = [value for name, value in params.items() if name.startswith("network")]
    guide = [value for name, value in params.items() if name.startswith("recogniser")]
    game, batch = played(program, WakeSleep(steps=60), rows)
    z, up = states(4), program.guide
    log_q = pyro.poutine.trace(up).get_trace(x).nodes["z1"]["fn"].log_prob(z[:, None])  # states x rows
    down = pyro.poutine.trace(program.model).get_trace(x).nodes["x"]["fn"]
    assert down.event_shape == (6,)
    layer = [value for name, value in params.items() if "down" in name and value.dim() == 2][0]
    bias = [value for name, value in params.items() if "down" in name and value.dim() == 1][0]
    log_x = torch.distributions.Bernoulli(logits=(z @ layer.T + bias)[:, None]).log_prob(x).sum(-1)
    joint = log_x - top.free_energy(z)[:, None] - top.log_partition()
    exact = torch.autograd.grad(-(log_q.exp().detach() * joint).sum(0).mean(), model, allow_unused=True)
    exact = torch.cat(
        [torch.zeros_like(m).flatten() if g is None else g.flatten() for g, m in zip(exact, model, strict=True)]
    )
    found, error = mean_gradient(game, "program", model, batch, 60)
    assert float(((found - exact).abs() / error.clamp_min(1e-12)).max()) < Z
    every = states(6)
    log_p = torch.distributions.Bernoulli(logits=(z @ layer.T + bias)[:, None]).log_prob(every).sum(-1)
    chance = (log_p - top.free_energy(z)[:, None] - top.log_partition()).exp().detach()
    dreams = pyro.poutine.trace(up).get_trace(every).nodes["z1"]["fn"].log_prob(z[:, None])
    asleep = torch.cat([g.flatten() for g in torch.autograd.grad(-(chance * dreams).sum(), guide)])
    found, error = mean_gradient(game, "guide", guide, batch, 60)
    assert float(((found - asleep).abs() / error.clamp_min(1e-12)).max()) < Z


def test_greedy_layers_begin_where_the_machines_are_and_up_down_goes_on():
    x = bars(3).repeat(3, 1)
    stack = rbm_stack(x, (10, 6), SVI(ContrastiveDivergence(), steps=400, lr=0.03))
    assert [fit.module("machine").weight.shape for fit in stack] == [(9, 10), (10, 6)]
    begun = pg.fit(dbn(layers=stack, sweeps=100), x, SVI(WakeSleep(), steps=1, lr=1e-30), seed=0)
    net, below = begun.module("network"), stack[0].module("machine")
    torch.testing.assert_close(net.down.layers[0].weight, below.weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(net.top.weight, stack[1].module("machine").weight, rtol=0, atol=1e-6)
    coins = float(torch.distributions.Bernoulli(x.mean(0)).log_prob(x).sum(1).mean())
    greedy = begun.evidence(particles=500).mean
    tuned = pg.fit(dbn(layers=stack, sweeps=100), x, SVI(WakeSleep(steps=3), steps=500, lr=0.005), seed=0)
    found = tuned.evidence(particles=500).mean
    assert coins + 0.5 < greedy and found > greedy + 0.2, (coins, greedy, found)
    again = rbm_stack(x, (10, 6), SVI(ContrastiveDivergence(), steps=400, lr=0.03))
    assert torch.equal(again[1].params["machine$$$weight"], stack[1].params["machine$$$weight"])


def test_what_does_not_fit_is_refused():
    x = bars(3)
    with pytest.raises(pg.IncompatibleError, match="latent site 'z1'"):
        pg.fit(dbn(hidden=(4, 3)), x, SVI(ContrastiveDivergence(), steps=1))
    with pytest.raises(ValueError, match="hidden: expected units of at least 2"):
        dbn(hidden=(4,))
    with pytest.raises(ValueError, match="hidden: expected units of at least 2"):
        dbm(hidden=(4,))
    with pytest.raises(TypeError, match="layers: expected fits of rbm"):
        dbn(layers=["rbm"])
    stack = rbm_stack(x, (4, 3), SVI(ContrastiveDivergence(), steps=1))
    with pytest.raises(ValueError, match="layers: expected machines between layers"):
        pg.fit(dbn(hidden=(5, 3), layers=stack), x, SVI(WakeSleep(), steps=1))
    other = pg.fit(gan(latent=2, hidden=(3,)), x, SVI(pg.inference.Adversarial(), steps=1))
    with pytest.raises(TypeError, match="got a fit of 'gan'"):
        dbn(layers=[other, other])
    with pytest.raises(ValueError, match="zeros and ones"):
        pg.fit(dbm(), x * 0.5, SVI(ContrastiveDivergence(), steps=1))
    with pytest.raises(pg.IncompatibleError, match="normaliser"):
        pg.fit(rbm(hidden=17), torch.ones(3, 17), SVI(ContrastiveDivergence(), steps=1)).evidence()


# ------------------------------------------------------------------------------------------------ greedy layers of a dbm
@pytest.mark.parametrize("copies", [(2, 1), (1, 2)])
def test_copies_of_units_share_their_weights_in_energy_and_chain(copies):
    machine = BoltzmannMachine(torch.zeros(3), 2, 1.0, copies)
    randomise(machine)
    rows, hidden = states(3 * copies[0]), states(2 * copies[1])
    pull = torch.zeros(len(rows), len(hidden))
    for low in rows.split(3, 1):
        pull = pull + (low @ machine.visible_bias)[:, None]
        for high in hidden.split(2, 1):
            pull = pull + low @ machine.weight @ high.T
    for high in hidden.split(2, 1):
        pull = pull + high @ machine.hidden_bias
    torch.testing.assert_close(machine.free_energy(rows), -pull.logsumexp(1), atol=1e-5, rtol=0)
    chances = (pull.logsumexp(1) - pull.flatten().logsumexp(0)).exp().detach()
    begun = rows[torch.multinomial(chances, 40_000, replacement=True)]
    assert frequency_gap(machine.gibbs(begun, 1), chances) < Z


@pytest.mark.parametrize("hidden", [(6, 4), (5, 4, 3)])
def test_greedy_layers_raise_the_likelihood_at_which_a_dbm_begins(hidden):
    x = bars(3)
    for seed in range(5):
        stack = rbm_stack(x, hidden, SVI(ContrastiveDivergence(), steps=400, lr=0.03), undirected=True, seed=seed)
        begun = [
            pg.fit(recipe, x, SVI(ContrastiveDivergence(), steps=1, lr=1e-30), seed=seed).evidence()
            for recipe in (dbm(layers=stack), dbm(hidden=hidden))
        ]
        assert all(one.exact for one in begun) and begun[0].mean > begun[1].mean + 0.3, (seed, begun)


def test_layers_of_the_other_kind_of_network_are_refused():
    x, once = bars(3), SVI(ContrastiveDivergence(), steps=1)
    directed, undirected = (rbm_stack(x, (4, 3), once, undirected=kind) for kind in (False, True))
    with pytest.raises(ValueError, match="expected the machines of .*undirected=True"):
        dbm(layers=directed)
    with pytest.raises(ValueError, match=r"expected the machines of rbm_stack\(x, hidden\)"):
        dbn(layers=undirected)
    with pytest.raises(ValueError, match="layers: expected machines between layers"):
        pg.fit(dbm(hidden=(5, 3), layers=undirected), x, once)
    with pytest.raises(ValueError, match="hidden: expected units of at least 2"):
        rbm_stack(x, (4,), once, undirected=True)
    with pytest.raises(pg.IncompatibleError):
        undirected[0].evidence(method=pg.AIS(temperatures=5, chains=2))
    made = pg.fit(dbm(layers=undirected), x, SVI(ContrastiveDivergence(), steps=1, lr=1e-30)).module("machine")
    low, high = (fit.module("machine") for fit in undirected)
    assert torch.equal(made.weights[0], low.weight) and torch.equal(made.weights[1], high.weight)
    torch.testing.assert_close(made.biases[1], (low.hidden_bias + high.visible_bias) / 2)
