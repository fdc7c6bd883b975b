"""The restricted Boltzmann machine and contrastive divergence against sums over all states.

Tolerances: a sum over at most 2^10 states in float64 rounds to below 1e-12 relative, values are of order 10, so 1e-10.
Frequencies and gradients are held to |z| < 5.5, a false alarm of 4e-8 each; no test looks at more than 100 of them.
"""

from __future__ import annotations

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from fixtures import float64_under

import ppl_gen as pg
from ppl_gen.data.batching import Batch
from ppl_gen.inference import ELBO, IWAE, SVI, ContrastiveDivergence
from ppl_gen.inference.gradients import gradients
from ppl_gen.inference.objectives.game import Setting
from ppl_gen.models import rbm
from ppl_gen.models.energy.rbm import BoltzmannMachine
from ppl_gen.nn.chain_rows import ChainRows
from ppl_gen.program.dry_run import dry_run
from ppl_gen.program.extensions import Energy

Z = 5.5


float64_and_seed = float64_under(7)


def states(units):
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=units)))


def machine(visible=4, hidden=3, scale=1.0):
    made = BoltzmannMachine(torch.randn(visible), hidden, scale)
    with torch.no_grad():
        made.hidden_bias.normal_()
    return made


def log_weights(made):
    """-E(v, h) of every joint state, written out term by term: visible states x hidden states."""
    v, h = states(made.weight.shape[0]), states(made.weight.shape[1])
    pairs = torch.einsum("ni,ij,mj->nm", v, made.weight, h)
    return pairs + (v * made.visible_bias).sum(1)[:, None] + (h * made.hidden_bias).sum(1)


def bars(side):
    """Every pattern of full rows, and every pattern of full columns."""
    patterns = {tuple(p for p in line for _ in range(side)) for line in itertools.product((0, 1), repeat=side)}
    patterns |= {tuple(line) * side for line in itertools.product((0, 1), repeat=side)}
    return torch.tensor(sorted(patterns), dtype=torch.float32)


def untrained(recipe, data, objective=None):
    """A fit at the recipe's starting weights: one step too small to change any of them."""
    return pg.fit(recipe, data, SVI(objective or ContrastiveDivergence(), steps=1, lr=1e-30))


# ------------------------------------------------------------------------------------------------------ closed forms


@pytest.mark.parametrize("visible, hidden", [(5, 3), (3, 6), (4, 4), (1, 1)])
def test_free_energy_and_log_z_equal_sums_over_every_state(visible, hidden):
    made = machine(visible, hidden, scale=1.5)
    weights = log_weights(made)
    torch.testing.assert_close(made.free_energy(states(visible)), -torch.logsumexp(weights, 1), rtol=0, atol=1e-10)
    log_z = torch.logsumexp(weights.flatten(), 0)
    torch.testing.assert_close(made.log_partition(), log_z, rtol=0, atol=1e-10)
    torch.testing.assert_close(
        made.log_density(states(visible)), torch.logsumexp(weights, 1) - log_z, rtol=0, atol=1e-10
    )


def test_log_z_in_blocks_and_from_float32_weights():
    made = machine(14, 20, scale=0.5)  # 16384 states of the visible side: four blocks
    slow = torch.logsumexp(-made.free_energy(states(14)), 0)
    torch.testing.assert_close(made.log_partition(), slow, rtol=1e-13, atol=0)
    single = machine(6, 5).float()
    exact = BoltzmannMachine(torch.zeros(6), 5, 0.0)
    exact.load_state_dict({k: v.double() for k, v in single.state_dict().items()})
    assert single.log_partition().dtype is torch.float64 and torch.equal(single.log_partition(), exact.log_partition())


def exact_gradient(made, x):
    """Of mean -log p(x): data minus model expectations of -v, -h and -vh', the latter from the joint distribution."""
    p = log_weights(made).flatten().softmax(0).reshape(2 ** made.weight.shape[0], -1)
    v, h = states(made.weight.shape[0]), states(made.weight.shape[1])
    active = (x @ made.weight + made.hidden_bias).sigmoid()
    data = x.T @ active / len(x), x.mean(0), active.mean(0)
    model = torch.einsum("ni,nm,mj->ij", v, p, h), p.sum(1) @ v, p.sum(0) @ h
    return [(b - a).detach() for a, b in zip(data, model, strict=True)]


def test_autograd_of_the_exact_log_likelihood_is_data_minus_model():
    made, x = machine(), torch.bernoulli(torch.full((20, 4), 0.4))
    grads = torch.autograd.grad(-made.log_density(x).mean(), list(made.parameters()))
    for grad, expected in zip(grads, exact_gradient(made, x), strict=True):
        torch.testing.assert_close(grad, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("sweeps", [1, 2])
def test_a_gibbs_sweep_has_the_transition_probabilities_of_the_joint_distribution(sweeps):
    made, count = machine(scale=0.5), 200_000  # no state so rare that its count is far from normal
    joint = log_weights(made).detach().flatten().softmax(0).reshape(16, 8)
    there, back = joint / joint.sum(1, keepdim=True), joint / joint.sum(0)
    move = torch.linalg.matrix_power(there @ back.T, sweeps)
    code = 2 ** torch.arange(3, -1, -1)
    for start in (0, 11):
        ends = made.gibbs(states(4)[start].expand(count, 4), sweeps)
        seen = torch.bincount((ends.long() * code).sum(1), minlength=16) / count
        error = (move[start] * (1 - move[start]) / count).sqrt()
        assert float(((seen - move[start]) / error).abs().max()) < Z


def test_a_row_is_a_chain_that_ends_near_the_model_and_has_no_log_density():
    made, count = machine(scale=0.5), 100_000
    drawn = ChainRows(made, sweeps=60).expand(torch.Size([count])).sample()
    assert drawn.shape == (count, 4)
    p = made.log_density(states(4)).exp().detach()
    seen = torch.bincount((drawn.long() * 2 ** torch.arange(3, -1, -1)).sum(1), minlength=16) / count
    assert float(((seen - p) / (p * (1 - p) / count).sqrt()).abs().max()) < Z
    with pytest.raises(pg.IncompatibleError, match="ContrastiveDivergence"):
        ChainRows(made, sweeps=1).log_prob(drawn)


# --------------------------------------------------------------------------------------- gradients of the objective


def made_program(x, energy=None):
    built = rbm(4, 3)(x)
    made = built.energy.free_energy.__self__
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=1.5)
    if energy is not None:
        built = pg.Program(built.model, energy=energy(made), name="rbm")
    return built, made


def z_scores(objective, x, energy=None, burn=0, repeats=200):
    """Of the objective's gradient against the exact one, from independent games at fixed weights."""
    program, made = made_program(x, energy)
    batch = Batch((x,), {}, len(x), len(x))
    info = dry_run(program, batch)
    draws = []
    for _ in range(repeats):
        game = objective.build(Setting(program, program.model, None, info, batch))
        state = game.init(batch)
        for _ in range(burn):
            _, state = game.loss("program", batch, state)
        grads = gradients(game, "program", list(made.parameters()), batch, state).gradients
        draws.append(torch.cat([g.flatten() for g in grads]))
    draws = torch.stack(draws)
    exact = torch.cat([g.flatten() for g in exact_gradient(made, x)])
    return ((draws.mean(0) - exact) / (draws.std(0) / repeats**0.5)).abs().max()


def exactly(made):
    """The energy with a sampler that needs no chain: CD with infinitely many sweeps."""
    p = made.log_density(states(4)).exp().detach()
    return Energy(made.free_energy, lambda x, steps: states(4)[p.multinomial(len(x), replacement=True)])


def test_the_gradient_is_exact_in_the_limit_of_long_chains_and_biased_for_short_ones():
    x = torch.bernoulli(torch.full((100, 4), 0.3))
    assert float(z_scores(ContrastiveDivergence(), x, energy=exactly)) < Z
    assert float(z_scores(ContrastiveDivergence(steps=300), x, repeats=100)) < Z
    assert float(z_scores(ContrastiveDivergence(steps=1), x)) > Z, "CD-1 is biased, and the test sees it"


def test_persistent_chains_at_fixed_weights_reach_the_exact_gradient():
    x = torch.bernoulli(torch.full((100, 4), 0.3))
    persistent = ContrastiveDivergence(persistent=True, chains=150)
    assert float(z_scores(persistent, x, burn=60, repeats=50)) < Z
    assert float(z_scores(persistent, x, burn=0, repeats=50)) > Z, "the chains have only started"


def test_the_chain_is_not_differentiated_and_the_parts_are_what_they_say():
    x = states(4)[:10]
    program, made = made_program(x)
    batch = Batch((x,), {}, 10, 10)
    info = dry_run(program, batch)
    game = ContrastiveDivergence(steps=3).build(Setting(program, program.model, None, info, batch))
    torch.manual_seed(1)
    loss = game.loss("program", batch, game.init(batch))[0]
    torch.manual_seed(1)
    once = made.gibbs(x, 1)
    ends = made.gibbs(once, 2)
    assert not ends.requires_grad
    data, chain = made.free_energy(x).mean(), made.free_energy(ends).mean()
    assert torch.equal(loss.value, data - chain)
    assert torch.equal(loss.parts["free_energy"], data) and torch.equal(loss.parts["chain_free_energy"], chain)
    torch.testing.assert_close(loss.parts["reconstruction_error"], (once != x).sum() / 10, check_dtype=False)


# ------------------------------------------------------------------------------------------------------------ fitting


def test_the_untrained_machine_without_weights_is_independent_coins():
    x = torch.bernoulli(torch.tensor([0.1, 0.5, 0.7, 0.0]).expand(50, 4))
    coins = dist.Bernoulli((x.sum(0) + 0.5) / 51).to_event(1)
    evidence = untrained(rbm(4, 3, scale=0.0), x).evidence()
    assert evidence.exact and evidence.kind == "exact" and evidence.rows == 50
    torch.testing.assert_close(evidence.values, coins.log_prob(x), rtol=0, atol=1e-10)


def test_training_raises_the_exact_evidence_above_independent_coins():
    x, recipe = bars(3), rbm(9, 8, scale=0.1)
    coins = float(dist.Bernoulli(x.mean(0)).to_event(1).log_prob(x).mean())  # -9 log 2: every pixel is on half the time
    enough, ceiling = coins + 2.0, -float(torch.tensor(14.0).log())
    assert untrained(recipe, x).evidence().mean < coins + 0.01 < enough
    fit = pg.fit(recipe, x, SVI(ContrastiveDivergence(), steps=1000, lr=0.02), seed=0)
    assert enough < fit.evidence().mean < ceiling, "no density gives 14 rows more than log 1/14 each on average"
    assert set(fit.history) == {"program_loss", "free_energy", "chain_free_energy", "reconstruction_error"}
    assert fit.evidence(states(9)).values.exp().sum().item() == pytest.approx(1.0, abs=1e-4)  # float32 weights
    patterns = {tuple(row) for row in x.tolist()}

    def share(one):
        return sum(tuple(row) in patterns for row in one.sample(500, seed=3)["x"].tolist()) / 500

    assert share(untrained(recipe, x)) < 0.1 < 0.6 < share(fit)  # 14 of 512 rows are patterns
    assert torch.equal(fit.sample(20, seed=3)["x"], fit.sample(20, seed=3)["x"])
    assert not torch.equal(fit.sample(20, seed=3)["x"], fit.sample(20, seed=4)["x"])


@pytest.mark.slow
def test_persistent_chains_with_a_falling_rate_beat_one_step_of_divergence():
    x, steps = bars(4), 2500

    def trained(objective):
        falling = SVI(
            objective, steps=steps, lr=0.02, schedule=lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, steps)
        )
        return pg.fit(rbm(16, 12, scale=0.1), x, falling, seed=0).evidence().mean

    once, persistent = (
        trained(ContrastiveDivergence()),
        trained(ContrastiveDivergence(persistent=True, chains=100)),
    )
    assert -11.1 < once < persistent - 0.3, (once, persistent)  # -11.09 is independent coins


def test_chains_belong_to_one_fit_and_the_same_fit_comes_out_bit_for_bit():
    x, objective = bars(3), ContrastiveDivergence(persistent=True)
    algorithm = SVI(objective, steps=30, batch_size=5, lr=0.05)
    first, again = (pg.fit(rbm(9, 4), x, algorithm, seed=3) for _ in range(2))
    other = pg.fit(rbm(9, 4), x, algorithm, seed=4)
    assert all(torch.equal(first.params[name], again.params[name]) for name in first.params)
    assert first.records == again.records
    assert not torch.equal(first.params["machine$$$weight"], other.params["machine$$$weight"])
    on = pg.fit(rbm(9, 4), x, algorithm, seed=3, start=first)
    assert not torch.equal(on.params["machine$$$weight"], first.params["machine$$$weight"])


def test_evidence_is_that_of_the_trained_weights_also_after_loading(tmp_path):
    x = bars(3).double()
    fit = pg.fit(rbm(9, 4, sweeps=20), x, SVI(ContrastiveDivergence(), steps=50, lr=0.05), seed=0)
    trained = fit.module("machine")
    expected = (-trained.free_energy(x) - trained.log_partition()).detach()
    torch.testing.assert_close(fit.evidence().values, expected, rtol=0, atol=1e-12)
    assert fit.evidence().mean != pytest.approx(untrained(rbm(9, 4), x).evidence().mean, abs=1e-3)
    loaded = pg.load(fit.save(tmp_path / "fit"), rbm(9, 4, sweeps=20))
    torch.testing.assert_close(loaded.evidence().values, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cast", [torch.Tensor.bool, torch.Tensor.byte, torch.Tensor.numpy, torch.Tensor.double])
def test_rows_may_be_of_any_kind_of_number(cast):
    reference = pg.fit(rbm(9, 4), bars(3), SVI(ContrastiveDivergence(), steps=3), seed=0)
    fit = pg.fit(rbm(9, 4), {"x": cast(bars(3)), "label": torch.arange(14)}, SVI(ContrastiveDivergence(), steps=3))
    assert fit.evidence().mean == pytest.approx(reference.evidence().mean, abs=0.1)  # float64 draws other numbers


# ------------------------------------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize("objective", [ELBO(), IWAE(), pyro.infer.Trace_ELBO()])
def test_objectives_that_need_a_density_refuse_and_say_what_there_is(objective):
    with pytest.raises(pg.IncompatibleError) as caught:
        pg.fit(rbm(9, 4), bars(3), SVI(objective, steps=1))
    message = str(caught.value)
    assert "needs:" in message and "density" in message
    assert "rbm offers:" in message and "exact evidence, energy" in message


def test_contrastive_divergence_refuses_what_has_no_energy():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0), obs=x)

    with pytest.raises(pg.IncompatibleError, match=r"needs: +energy\n"):
        pg.fit(model, torch.zeros(5), SVI(ContrastiveDivergence(), steps=1))
    optimiser = pyro.optim.Adam({"lr": 0.1})
    script = pyro.infer.SVI(model, lambda x: None, optimiser, loss=ContrastiveDivergence())
    with pytest.raises(pg.IncompatibleError, match="energy"):
        script.step(torch.zeros(5))


def test_without_an_enumerable_side_there_is_no_evidence():
    x = torch.bernoulli(torch.full((10, 17), 0.5))
    fit = untrained(rbm(17, 17, sweeps=5), x)
    assert "exact evidence" not in fit.info.offers and fit.sample(3)["x"].shape == (3, 17)
    with pytest.raises(pg.IncompatibleError, match="normaliser"):
        fit.evidence()
    assert "exact evidence" in untrained(rbm(17, 16), x).info.offers


@pytest.mark.parametrize(
    "data, message",
    [
        (torch.full((3, 9), 0.5), r"zeros and ones, got 0.5 at index \(0, 0\)"),
        (torch.ones(3, 8), r"rows of 9 columns, got shape \(3, 8\)"),
        (torch.ones(9), r"rows of 9 columns, got shape \(9,\)"),
        ({"y": torch.ones(3, 9)}, "reads the entry 'x'"),
    ],
)
def test_data_that_do_not_suit_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        pg.fit(rbm(9, 4), data, SVI(ContrastiveDivergence(), steps=1))


def test_arguments_out_of_range_are_refused():
    for arguments in ({"visible": 0}, {"hidden": 1.5}, {"sweeps": 0}, {"scale": -1.0}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            rbm(**{"visible": 3, "hidden": 2, **arguments})
    for arguments in ({"steps": 0}, {"persistent": True, "chains": 0}, {"chains": 5}):
        with pytest.raises(ValueError, match="steps|chains"):
            ContrastiveDivergence(**arguments)
    with pytest.raises(ValueError, match="zeros and ones"):
        untrained(rbm(9, 4), bars(3)).evidence(bars(3) * 0.5)


def test_an_energy_of_a_site_that_is_not_observed_is_refused():
    built = rbm(9, 4)(bars(3))
    energy = Energy(built.energy.free_energy, built.energy.gibbs, site="y")
    with pytest.raises(ValueError, match="site 'y', which 'rbm' does not observe"):
        pg.fit(pg.Program(built.model, energy=energy, name="rbm"), bars(3), SVI(ContrastiveDivergence(), steps=1))
