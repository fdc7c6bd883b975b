"""Persistent chains at several temperatures, and chains that begin anew; |z| < 5.5, or a margin of many errors."""

from __future__ import annotations

import pytest
import torch
from energy_cases import frequency_gap, played, states
from fixtures import float64_under

import ppl_gen as pg
from ppl_gen.inference import SVI, ContrastiveDivergence
from ppl_gen.inference.gradients import gradients
from ppl_gen.inference.objectives.contrastive import _Chains
from ppl_gen.models import energy_model, rbm
from ppl_gen.program.extensions import Energy

Z = 5.5

float64_and_seed = float64_under(4)


def two_modes(visible=6, pull=2.5):
    """All units on or all off, both as likely: a program, its machine and its rows."""
    x = torch.cat([torch.zeros(20, visible), torch.ones(20, visible)])
    program = rbm(visible, visible)(x)
    made = program.energy.free_energy.__self__
    with torch.no_grad():
        made.weight.fill_(pull)
        made.visible_bias.fill_(-pull * visible / 2)
        made.hidden_bias.fill_(-pull * visible / 2)
    return program, made, x


def test_swaps_leave_the_product_of_all_temperatures_invariant():
    program, made, _ = two_modes(4, 1.0)
    chains, count, tempering = _Chains(program.energy), 40_000, made.tempering()
    b = torch.linspace(0.0, 1.0, 4)
    exact = [(tempering.log_density(states(4), float(at))).detach().softmax(0) for at in b]
    drawn = torch.stack([states(4)[p.multinomial(count, replacement=True)] for p in exact])
    for first in (0, 1):
        moved, taken = chains._swapped(drawn, b, first)
        assert 0.05 < float(taken.mean()) < 1
        for level, p in zip(moved, exact, strict=True):
            assert frequency_gap(level, p) < Z
        pair = list(range(first, 3, 2))
        untouched = [k for k in range(4) if k not in pair and k - 1 not in pair]
        assert all(torch.equal(moved[k], drawn[k]) for k in untouched)
    states_after, _ = chains.tempered(drawn, 2)
    for level, p in zip(states_after, exact, strict=True):
        assert frequency_gap(level, p) < Z


def test_tempered_chains_find_the_other_mode_where_chains_of_one_temperature_stay():
    program, made, x = two_modes()
    exact = float(made.log_density(states(6)).exp().detach() @ (states(6).sum(1) > 3).double())
    on = {}
    for name, settings in {"one": {}, "ladder": {"temperatures": 12}}.items():
        game, batch = played(program, ContrastiveDivergence(persistent=True, chains=200, **settings), x[:20])
        state = game.init(batch)
        for _ in range(150):
            loss, state = game.loss("program", batch, state)
        chains = state["chains"] if name == "one" else state["chains"][-1]
        assert chains.shape == (200, 6)
        on[name] = float((chains.sum(1) > 3).double().mean())
    # A share of 200 chains has an error of 0.035; those of one temperature began where all units are off.
    assert exact == pytest.approx(0.5, abs=0.05) and abs(on["ladder"] - exact) < 0.2 and on["one"] < 0.1, on
    assert 0 < float(loss.parts["swaps"]) < 1


def test_restarted_chains_begin_at_the_base():
    program, made, x = two_modes(4, 1.0)
    chains = _Chains(program.energy)
    old = torch.full((60_000, 4), 1.0)
    anew = chains.restarted(old, 0.25, ladder=False)
    base = (0.25 * 0.5**4 * torch.ones(16)).index_add(0, torch.tensor([15]), torch.tensor([0.75]))
    assert frequency_gap(anew, base) < Z  # even coins: the data are on half of the time
    ladder = torch.stack([torch.zeros_like(old), old])
    again = chains.restarted(ladder, 0.25, ladder=True)
    assert torch.equal(again[0], ladder[0]) and frequency_gap(again[1], base) < Z
    game, batch = played(program, ContrastiveDivergence(persistent=True, restart=0.5), x)
    step = gradients(game, "program", list(made.parameters()), batch, game.init(batch))
    assert step.state["chains"].shape == x.shape


@pytest.mark.parametrize("shape", [(4,), (2, 3), (1, 2, 3)])
@pytest.mark.parametrize("temperatures", [None, 3])
def test_rows_of_chains_may_have_any_shape(shape, temperatures):
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(torch.Size(shape).numel(), 1))
    x = torch.randn(10, *shape)
    persistent = ContrastiveDivergence(persistent=True, restart=0.5, chains=6, temperatures=temperatures)
    fit = pg.fit(energy_model(network, sweeps=2), x, SVI(persistent, steps=3), seed=0)
    assert fit.status == "finished"
    program = energy_model(network)(x)
    game, batch = played(program, persistent, x)
    begun = game.init(batch)["chains"]
    lead = () if temperatures is None else (temperatures,)
    assert begun.shape == (*lead, 6, *shape)
    kept = _Chains(program.energy).restarted(begun, 0.0, ladder=temperatures is not None)
    assert torch.equal(kept, begun)


@pytest.mark.slow
def test_tempering_learns_two_modes_that_persistent_chains_oscillate_between():
    x = torch.cat([torch.zeros(50, 12), torch.ones(50, 12)])
    x = torch.where(torch.rand(x.shape) < 0.02, 1 - x, x)
    entropy = -float(torch.tensor(0.5).log())

    def trained(objective):
        falling = SVI(
            objective, steps=1500, lr=0.02, schedule=lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.01, 1500)
        )
        return pg.fit(rbm(hidden=6, scale=0.1), x, falling, seed=0).evidence().mean

    ladder = trained(ContrastiveDivergence(persistent=True, chains=50, temperatures=10))
    noise = float(-(0.02 * torch.tensor(0.02).log() + 0.98 * torch.tensor(0.98).log())) * 12
    assert ladder > -(entropy + noise) - 1.0


def test_what_has_no_tempering_is_refused():
    built = rbm(4, 3)(torch.eye(4))
    plain = pg.Program(built.model, energy=Energy(built.energy.free_energy, built.energy.gibbs), name="rbm")
    for settings in ({"temperatures": 3}, {"restart": 0.1}):
        with pytest.raises(pg.IncompatibleError, match="has no `tempering`"):
            pg.fit(plain, torch.eye(4), SVI(ContrastiveDivergence(persistent=True, **settings), steps=1))
        with pytest.raises(ValueError, match=f"{next(iter(settings))}: .*persistent=True"):
            ContrastiveDivergence(**settings)
    for settings in ({"temperatures": 1}, {"restart": 1.0}, {"restart": -0.1}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            ContrastiveDivergence(persistent=True, **settings)
