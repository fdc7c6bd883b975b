"""The generative stochastic network against the stationary distribution of its chain, computed exactly."""

from __future__ import annotations

import pytest
import torch
from energy_cases import bars, played
from fixtures import float64_under

import ppl_gen as pg
from ppl_gen.inference import SVI, ContrastiveDivergence, Walkback
from ppl_gen.models import gsn, rbm
from ppl_gen.program.extensions import Transition

float64_and_seed = float64_under(8)

SHARES = torch.tensor([0.4, 0.05, 0.25, 0.1, 0.2])


def few_values(count=4000):
    """One column of five levels, in these shares exactly."""
    return torch.arange(5).repeat_interleave((SHARES * count).round().long())[:, None]


def stationary(machine, levels=5):
    """Of the chain over one column: the left eigenvector of its transition matrix."""
    values = torch.arange(levels)[:, None]
    corruption = machine.corruption / levels * torch.ones(levels, levels) + (1 - machine.corruption) * torch.eye(levels)
    restored = machine.denoise(values).base_dist.probs.detach().reshape(levels, levels)
    chain = torch.linalg.matrix_power(corruption @ restored, 1000)
    return chain[0]


def test_a_denoiser_that_is_right_has_the_data_as_its_stationary_distribution():
    """An affine map of one-hot codes is any conditional distribution; at its minimum the chain's law is the data's."""
    recipe = gsn(hidden=(), corruption=0.5, likelihood="categorical", levels=5, sweeps=60)
    x = few_values()
    untrained = pg.fit(recipe, x, SVI(Walkback(steps=1), steps=1, lr=1e-30), seed=0).module("machine")
    assert (
        float((stationary(untrained) - SHARES).abs().sum()) < 0.5
    )  # it begins at the shares of the data, off by noise
    steps = 600
    falling = SVI(
        Walkback(steps=1),
        steps=steps,
        lr=0.05,
        schedule=lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.01, steps),
    )
    fit = pg.fit(recipe, x, falling, seed=0)
    machine = fit.module("machine")
    # What is left is the noise of corruptions in the last steps: well below 0.01 in each of the five shares.
    assert float((stationary(machine) - SHARES).abs().sum()) < 0.03
    right = 0.5 * torch.eye(5) + 0.5 / 5
    exact = (right * SHARES[:, None]).T
    exact = exact / exact.sum(1, keepdim=True)  # given a corrupted level, the level that it was
    learned = machine.denoise(torch.arange(5)[:, None]).base_dist.probs.detach().reshape(5, 5)
    assert float((learned - exact).abs().max()) < 0.03
    drawn = torch.bincount(fit.sample(20_000, seed=1)["x"][:, 0].long(), minlength=5) / 20_000
    assert float((drawn - stationary(machine)).abs().max()) < 5.5 * 0.5 / 20_000**0.5


def test_untrained_chains_that_start_apart_from_the_data_have_another_law():
    recipe = gsn(hidden=(), corruption=0.5, likelihood="categorical", levels=5)
    machine = pg.fit(recipe, few_values(), SVI(Walkback(), steps=1, lr=1e-30), seed=0).module("machine")
    with torch.no_grad():
        machine.network.last.bias.zero_()
    assert float((stationary(machine) - SHARES).abs().sum()) > 0.1


def test_walkback_pays_for_coming_back_from_every_step_of_the_chain():
    x = bars(2)
    program = gsn(4, hidden=(6,))(x)
    machine = program.transition.denoise.__self__
    game, batch = played(program, Walkback(steps=3), x)
    torch.manual_seed(3)
    loss, _ = game.loss("program", batch, {})
    torch.manual_seed(3)
    costs, at = [], x
    for step in range(3):
        restored = machine.denoise(machine.corrupt(at))
        costs.append(-restored.log_prob(x).mean())
        at = restored.sample() if step < 2 else at
    assert torch.allclose(loss.value, torch.stack(costs).mean(), rtol=0, atol=1e-12)
    assert torch.equal(loss.parts["reconstruction"], costs[0])


@pytest.mark.parametrize("kind", ["bernoulli", "normal", "categorical"])
def test_corruption_forgets_what_it_says(kind):
    count = 40_000
    x = {"bernoulli": torch.ones(count, 2), "normal": torch.randn(count, 2), "categorical": torch.full((count, 2), 3)}
    rows = x[kind].clone()
    if kind != "normal":
        rows[::2] = 0
    machine = gsn(likelihood=kind, levels=4 if kind == "categorical" else None, corruption=0.3)(rows).transition
    changed = machine.corrupt(x[kind])
    if kind == "normal":
        noise = (changed - x[kind]).std() / rows.std()
        assert float(noise) == pytest.approx(0.3, rel=0.02)
        return
    kept = float((changed == x[kind]).double().mean())
    levels = 4 if kind == "categorical" else 2
    assert kept == pytest.approx(0.7 + 0.3 / levels, abs=5.5 * (0.25 / (2 * count)) ** 0.5)


def test_chains_of_a_trained_network_draw_rows_like_the_data():
    x = bars(3).repeat(20, 1)
    patterns = {tuple(row) for row in x.tolist()}

    def share(algorithm):
        fit = pg.fit(gsn(hidden=(100,), corruption=0.1, sweeps=200), x, algorithm, seed=0)
        return sum(tuple(row) in patterns for row in fit.sample(500, seed=1)["x"].tolist()) / 500

    before, after = share(SVI(Walkback(), steps=1, lr=1e-30)), share(SVI(Walkback(steps=3), steps=600, lr=0.01))
    assert before < 0.1 < 0.5 < after  # 14 of 512 rows are patterns


def test_what_does_not_fit_is_refused():
    x = bars(2)
    with pytest.raises(pg.IncompatibleError, match="SVI\\(Walkback\\) needs: +transition"):
        pg.fit(rbm(4, 2), x, SVI(Walkback(), steps=1))
    with pytest.raises(pg.IncompatibleError, match="energy"):
        pg.fit(gsn(4), x, SVI(ContrastiveDivergence(), steps=1))
    fit = pg.fit(gsn(4, hidden=(3,), sweeps=2), x, SVI(Walkback(), steps=1))
    with pytest.raises(pg.IncompatibleError, match="no density: it is a Markov chain"):
        fit.evidence()
    built = gsn(4)(x)
    other = pg.Program(built.model, transition=Transition(built.transition.corrupt, built.transition.denoise, "y"))
    with pytest.raises(ValueError, match="transition: its rows are those of the site 'y'"):
        pg.fit(other, x, SVI(Walkback(), steps=1))
    for arguments in ({"features": 0}, {"corruption": -0.1}, {"corruption": 0}, {"sweeps": 0}, {"hidden": (0,)}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            gsn(**arguments)
    with pytest.raises(ValueError, match="corruption: expected a chance"):
        gsn(corruption=1.5)(x)
    with pytest.raises(ValueError, match="steps"):
        Walkback(steps=0)
