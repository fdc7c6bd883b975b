"""Held-out rows of programs with an energy: log Z summed where it can be, else by annealing; oracle: sums over states."""

from __future__ import annotations

import pytest
import torch

import ppl_gen as pg
from ppl_gen.fits.monitoring import ANNEALED
from ppl_gen.inference import SVI, ContrastiveDivergence, WakeSleep, Walkback
from ppl_gen.models import dbm, dbn, gaussian_rbm, gsn, helmholtz, rbm

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")  # runs are short on purpose

X = torch.bernoulli(torch.full((90, 20), 0.4), generator=torch.Generator().manual_seed(0))
HELD = torch.bernoulli(torch.full((40, 20), 0.4), generator=torch.Generator().manual_seed(1))
CD, UP_DOWN = SVI(ContrastiveDivergence(), steps=10), SVI(WakeSleep(), steps=10)

SUMMED = {
    "rbm": (rbm(hidden=4), CD),
    "dbn": (dbn(hidden=(6, 3), sweeps=5), UP_DOWN),
    "helmholtz": (helmholtz(hidden=(3, 2)), UP_DOWN),
}
ANNEALING = {
    "rbm": (rbm(hidden=18), CD),
    "dbm": (dbm(hidden=(18, 18), sweeps=5), CD),
    "dbn": (dbn(hidden=(18, 18), sweeps=5), UP_DOWN),
    "gaussian_rbm": (gaussian_rbm(hidden=18), CD),
}


@pytest.mark.parametrize("name", SUMMED)
def test_where_log_z_is_a_sum_the_last_look_is_the_evidence_of_the_fit(name):
    recipe, algorithm = SUMMED[name]
    fit = pg.fit(recipe, X, algorithm, validation=HELD, validate_every=5, seed=0)
    seen = fit.history["validation_evidence"].values
    assert seen.shape == (2,) and "validation" not in fit.notes
    assert seen[-1] == pytest.approx(fit.evidence(HELD, particles=16, draws=16).mean, abs=1e-6)


@pytest.mark.parametrize("name", ANNEALING)
def test_elsewhere_it_is_annealed_and_the_notes_say_so(name):
    recipe, algorithm = ANNEALING[name]
    fit = pg.fit(recipe, X, algorithm, validation=HELD, validate_every=5, seed=0)
    seen = fit.history["validation_evidence"].values
    assert seen.shape == (2,) and "by annealing, 500 temperatures" in fit.notes["validation"]
    found = fit.evidence(HELD, method=ANNEALED, particles=16, draws=16)
    assert seen[-1] == pytest.approx(found.mean, abs=1e-6) and found.log_partition.agrees


def test_annealing_at_these_settings_is_the_sum_over_states():
    fit = pg.fit(rbm(hidden=10), X, SVI(ContrastiveDivergence(), steps=300, lr=0.05), seed=0)
    exact, found = fit.evidence(HELD), fit.evidence(HELD, method=ANNEALED)
    assert abs(float(fit.module("machine").weight.detach().std()) - 0.01) > 0.1, (
        "the machine is no product of coins any more"
    )
    assert 0 < found.mc_stderr < 0.2 and abs(found.mean - exact.mean) < 5.5 * found.mc_stderr + 0.02


def test_a_chain_of_which_nothing_is_known_but_its_rows_is_refused_with_what_to_look_at():
    with pytest.raises(pg.IncompatibleError, match=r"(?s)validation does not fit.*gsn.*pg\.compare_rows"):
        pg.fit(gsn(hidden=(3,)), X, SVI(Walkback(), steps=3), validation=HELD)
