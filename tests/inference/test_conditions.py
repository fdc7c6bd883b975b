"""Rows that are made from labels; oracle: each label has a place of its own, and rows near it are counted.

Made with no regard to labels, a third of the rows lies near the place of its own one.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import ppl_gen as pg
from ppl_gen.diagnostics.game_verdicts import unseen, verdict_game
from ppl_gen.diagnostics.made_rows import RowsCompared
from ppl_gen.inference import EBGAN, SVI, Adversarial, ConditionalAdversarial

PLACES = torch.tensor([[0.0, 3.0], [-3.0, -1.0], [3.0, -1.0]])
LABELS = torch.arange(600) % 3
ROWS = PLACES[LABELS] + 0.3 * torch.randn(600, 2, generator=torch.Generator().manual_seed(0))


def one_hot(labels):
    return nn.functional.one_hot(labels, 3).float()


def generator():
    return nn.Sequential(nn.Linear(5, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))


def made(network, labels, x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(labels), 2]).to_event(1))
    pyro.sample("x", dist.Delta(network(torch.cat([z, one_hot(labels)], -1)), event_dim=1), obs=x)


@pg.Recipe
def of_an_argument(data):
    """The label is an entry of the data."""
    network = generator()

    def model(x, y):
        pyro.module("network", network)
        with pyro.plate("data", len(y)):
            made(network, y, x)

    return pg.Program(model)


@pg.Recipe
def of_a_site(data):
    """The label is an observed site, with shares that nothing learns."""
    network = generator()

    def model(x, y=None):
        pyro.module("network", network)
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.ones(3) / 3), obs=y)
            made(network, y, x)

    return pg.Program(model)


@pg.Recipe
def of_learned_shares(data):
    network = generator()

    def model(x, y=None):
        pyro.module("network", network)
        shares = pyro.param("shares", torch.ones(3) / 3, constraint=dist.constraints.simplex)
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(shares), obs=y)
            made(network, y, x)

    return pg.Program(model)


def in_their_places(fit):
    """The share of made rows that are within 1 of the place of the label they were asked for."""
    rows = fit.sample(600, given={"y": LABELS}, seed=1)["x"]
    return float(((rows - PLACES[LABELS]).norm(dim=1) < 1.0).float().mean())


DATA = {"x": ROWS, "y": LABELS}
GAMES = {
    "argument, conditional": (of_an_argument, ConditionalAdversarial()),
    "site, conditional": (of_a_site, ConditionalAdversarial()),
    "site, joint": (of_a_site, Adversarial()),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")
@pytest.mark.parametrize("name", GAMES)
def test_rows_belong_to_the_labels_they_are_made_from(name):
    program, objective = GAMES[name]
    assert in_their_places(pg.fit(program, DATA, SVI(objective, steps=1), seed=0)) < 0.5
    assert in_their_places(pg.fit(program, DATA, SVI(objective, steps=1500, batch_size=128), seed=0)) > 0.8


@pytest.mark.parametrize("objective", [Adversarial(), EBGAN()], ids=lambda o: o.label)
def test_a_critic_that_does_not_see_them_is_told_of(objective):
    with pytest.warns(pg.FitWarning, match="x is made from y, which the critic does not see"):
        fit = pg.fit(of_an_argument, DATA, SVI(objective, steps=60, batch_size=64), seed=0)
    found = verdict_game(RowsCompared(1000, 0.51, 0.6, 0.96, 1.01, 0.0, 0.0), {}, more=unseen(fit))  # all else is well
    assert str(found).startswith("doubtful: x is made from y") and "ConditionalAdversarial()" in found.advice


def test_entries_that_decide_nothing_are_no_conditions():
    @pg.Recipe
    def counted(data):
        network = nn.Linear(2, 2)

        def model(x, y):
            pyro.module("network", network)
            with pyro.plate("data", len(y)):  # how many, and nothing else
                z = pyro.sample("z", dist.Normal(torch.zeros(len(y), 2), 1.0).to_event(1))
                pyro.sample("x", dist.Delta(network(z), event_dim=1), obs=x)

        return pg.Program(model)

    for objective in (Adversarial(), ConditionalAdversarial()):
        fit = pg.fit(counted, DATA, SVI(objective, steps=3, batch_size=64), seed=0)
        assert "inputs" not in fit.notes and "critics see" not in fit.notes


def test_conditional_critics_see_labels_one_hot():
    """Two numbers of the row and three labels, for an argument and for a site alike."""
    for program in (of_an_argument, of_a_site):
        fit = pg.fit(program, DATA, SVI(ConditionalAdversarial({"x": nn.Linear(5, 1)}), steps=3, batch_size=64), seed=0)
        assert fit.notes["critics see"] == "y beside what is made"
        assert sorted(fit.module("critic")) == ["x"]


def test_images_have_them_as_channels():
    @pg.Recipe
    def images(data):
        network = nn.Linear(5, 64)

        def model(x, y):
            pyro.module("network", network)
            with pyro.plate("data", len(y)):
                z = pyro.sample("z", dist.Normal(torch.zeros(len(y), 2), 1.0).to_event(1))
                picture = network(torch.cat([z, one_hot(y)], -1)).reshape(-1, 1, 8, 8)
                pyro.sample("x", dist.Delta(picture, event_dim=3), obs=x)

        return pg.Program(model)

    critic = nn.Sequential(nn.Conv2d(1 + 3, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(144, 1))
    data = {"x": torch.rand(30, 1, 8, 8), "y": torch.arange(30) % 3}
    fit = pg.fit(images, data, SVI(ConditionalAdversarial({"x": critic}), steps=3, batch_size=10), seed=0)
    assert fit.sample(4, given={"y": 2})["x"].shape == (4, 1, 8, 8)


def test_labels_with_learned_shares_still_have_no_gradient():
    with pytest.raises(pg.IncompatibleError, match="gives no gradient to its draws of y"):
        pg.fit(of_learned_shares, DATA, SVI(ConditionalAdversarial(), steps=2), seed=0)
    fit = pg.fit(of_learned_shares, DATA, SVI(Adversarial(), steps=2), seed=0)
    assert "y: probabilities of Categorical" in fit.notes["gradients"]
    fit = pg.fit(of_a_site, DATA, SVI(Adversarial(), steps=2), seed=0)
    assert "y: draws, which no parameter decides" in fit.notes["gradients"]


def test_critics_that_see_too_few_numbers_are_told_what_stands_beside_the_row():
    for program in (of_an_argument, of_a_site):
        with pytest.raises(ValueError, match=r"critics: x \(joined with y, which x may be made from\).*\(256, 5\)"):
            pg.fit(program, DATA, SVI(ConditionalAdversarial({"x": nn.Linear(2, 1)}), steps=3, batch_size=64), seed=0)


def test_labels_and_inputs_that_take_no_other_values_are_conditions_too():
    """An embedding has no row for a blanked label that counts from one, and a program may refuse an exposure of zero."""

    def checked(exposure):
        if bool((exposure <= 0.0).any()):
            raise ValueError("an exposure is above zero")
        return exposure

    @pg.Recipe
    def picky(data):
        table, network = nn.Embedding(3, 3), generator()

        def model(x, y, exposure):
            pyro.module("table", table)
            pyro.module("network", network)
            with pyro.plate("data", len(y)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0)) * checked(exposure)
                rows = network(torch.cat([z.unsqueeze(-1), z.unsqueeze(-1), table(y - 1)], -1))
                pyro.sample("x", dist.Delta(rows, event_dim=1), obs=x)

        return pg.Program(model)

    data = {"x": ROWS, "y": LABELS + 1, "exposure": 1.0 + torch.rand(600, generator=torch.Generator().manual_seed(1))}
    fit = pg.fit(picky, data, SVI(ConditionalAdversarial(), steps=1), seed=0)
    assert fit.notes["critics see"] == "y and exposure beside what is made"
    assert fit.module("critic")["x"](torch.zeros(1, 2 + 4 + 1)).numel() == 1  # labels from 0 to 3
    with pytest.warns(pg.FitWarning, match="x is made from y and exposure, which the critic does not see"):
        pg.fit(picky, data, SVI(Adversarial(), steps=1), seed=0)
