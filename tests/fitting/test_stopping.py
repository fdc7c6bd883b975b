"""Stopping rules are pure functions of the history; the driver turns their sentence into a status."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

import ppl_gen as pg
from ppl_gen.fitting.stopping import EarlyStop, Patience, Plateau
from ppl_gen.inference import SVI


def model(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def test_plateau_waits_for_a_falling_loss_and_stops_on_a_level_one():
    generator = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(400, generator=generator)
    falling = (noise - 0.01 * torch.arange(400)).tolist()
    rule = Plateau(window=200, tolerance=1e-3)
    assert rule({"program_loss": falling}) is None
    assert rule({"program_loss": noise.tolist()}) is not None
    assert rule({"program_loss": noise.tolist()[:399]}) is None, "two full windows are needed"


def test_a_converged_run_ends_early_and_says_so():
    x = torch.randn(50, generator=torch.Generator().manual_seed(1))
    fit = pg.fit(model, x, SVI(steps=5000, lr=0.05, stop_rule=Plateau(window=100, tolerance=0.01)), seed=0)
    assert fit.status is pg.Status.CONVERGED and fit.cost["steps"] < 5000
    assert "program_loss" in fit.message
    short = pg.fit(model, x, SVI(steps=100, stop_rule=Plateau(window=100)), seed=0)
    assert short.status is pg.Status.FINISHED


def test_patience_stops_on_held_out_evidence():
    assert isinstance(Patience(checks=1)({"validation_evidence": [1.0, 0.5]}), EarlyStop)
    x = torch.randn(50, generator=torch.Generator().manual_seed(1))
    algorithm = SVI(steps=2000, lr=0.05, stop_rule=Patience(checks=2))
    fit = pg.fit(model, x, algorithm, seed=0, validation=x[:20], validate_every=50)
    assert fit.status is pg.Status.STOPPED and fit.cost["steps"] < 2000
    assert fit.history["validation_evidence"].sizes["check"] >= 3


REFUSED = [lambda: Plateau(window=1), lambda: Plateau(tolerance=-1.0), lambda: Patience(checks=0)]


@pytest.mark.parametrize("make", REFUSED)
def test_settings_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match="expected a .* of at least"):
        make()
