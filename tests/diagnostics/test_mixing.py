"""Chains that do not reach all of their density are told of; those that do are not."""

from __future__ import annotations

import pyro
import pytest
import torch
from energy_cases import bars
from fixtures import float64_under

import ppl_gen as pg
from ppl_gen.diagnostics.mixing import unmixed
from ppl_gen.inference import SVI, ContrastiveDivergence, WakeSleep, Walkback
from ppl_gen.models import dbn, gsn, helmholtz, rbm
from ppl_gen.models.energy.rbm import BoltzmannMachine
from ppl_gen.nn.chain_rows import ChainRows
from ppl_gen.program.extensions import Energy

float64_and_seed = float64_under(5)


def judged(coupling):
    """Of 12 equal units and one hidden: all of them off, or all on, the more surely the larger the coupling."""
    x = (torch.rand(600, 1) < 0.2).double().expand(600, 12).clone()
    machine = BoltzmannMachine(torch.full((12,), -coupling / 2), 1, 0.0)
    with torch.no_grad():
        machine.weight.fill_(coupling)
        machine.hidden_bias.fill_(-coupling * 6)

    def model(x):
        pyro.module("machine", machine)
        with pyro.plate("data", len(x)):
            pyro.sample("x", ChainRows(machine, 20), obs=x)

    program = pg.Program(model, energy=Energy(machine.free_energy, machine.gibbs), name="two modes")
    return pg.fit(program, x, SVI(ContrastiveDivergence(), steps=1, lr=1e-30), seed=0)


def test_a_machine_of_two_far_modes_is_not_trusted_and_one_of_near_modes_is_told_nothing_of_chains():
    far, near = judged(4.0), judged(0.2)
    assert far.verdict.grade == "do not trust" and "do not mix" in far.verdict.reason, far.verdict
    assert "temperatures" in far.verdict.advice
    assert not unmixed(near) and "do not mix" not in near.verdict.reason


def test_more_sweeps_mend_it():
    x = bars(3).repeat(20, 1)
    for sweeps, stuck in ((1, True), (300, False)):
        fit = pg.fit(rbm(hidden=6, sweeps=sweeps), x, SVI(ContrastiveDivergence(), steps=1500, lr=0.03), seed=0)
        assert bool(unmixed(fit)) == stuck, (sweeps, unmixed(fit))


def test_of_every_kind_of_chain_and_of_no_others():
    x = bars(3)
    for recipe, objective in (
        (dbn(hidden=(3, 2), sweeps=50), WakeSleep()),
        (gsn(hidden=(4,), sweeps=50, corruption=0.9), Walkback()),
        (helmholtz(hidden=(3,)), WakeSleep()),
    ):
        fit = pg.fit(recipe, x.repeat(2, 1), SVI(objective, steps=2), seed=0)
        assert unmixed(fit) == []
        tree = fit.to_arviz(draws=5)
        assert "observed_data" in tree.groups() or "observed_data" in tree


def test_what_is_said_of_an_energy_fits_an_energy():
    fit = pg.fit(rbm(hidden=2), bars(3).repeat(4, 1), SVI(ContrastiveDivergence(), steps=2), seed=0)
    assert "Adversarial" not in str(fit.verdict) and "no density was learned" not in str(fit.verdict)
    with pytest.raises(pg.IncompatibleError, match="whose normaliser fit.evidence.. sums up"):
        pg.fit(dbn(hidden=(3, 2)), bars(3), SVI(WakeSleep(), steps=1), seed=0).marginal_likelihood()
