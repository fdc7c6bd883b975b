"""One warning for a bad fit, none for a good one or inside a comparison; and the verdict where a fit is shown."""

from __future__ import annotations

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

import ppl_gen as pg
from ppl_gen.inference import NUTS, SVI

X = torch.linspace(3.0, 5.0, 8, dtype=torch.float64)


def two_modes(x):
    t = pyro.sample("t", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(t**2, 1.0), obs=x)


def normal_mean(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


BAD = NUTS(draws=60, warmup=60, chains=4, processes=1)


def test_a_bad_fit_warns_once_and_says_all_of_it() -> None:
    with pytest.warns(pg.FitWarning) as caught:
        pg.fit(two_modes, X, BAD, seed=0)
    assert len(caught) == 1
    text = str(caught[0].message)
    assert text.startswith("NUTS on 'two_modes': do not trust: the chains disagree on t (r_hat 1.")
    assert issubclass(pg.FitWarning, UserWarning)


def test_a_good_fit_does_not_warn() -> None:
    """800 draws of 2 chains on a Normal posterior: an effective sample size near 400 a chain, and R-hat near 1.002."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", pg.FitWarning)
        pg.fit(normal_mean, X, NUTS(draws=800, warmup=200, chains=2, processes=1), seed=0)
        pg.fit(normal_mean, X, SVI(steps=3), seed=0)
        pg.compare(two_modes, X, {"NUTS": BAD})  # whose rows have verdicts


def test_starts_and_columns_are_named() -> None:
    def regression(z, y):
        slope = pyro.sample("slope", dist.Normal(torch.zeros(2), 10.0).to_event(1))
        with pyro.plate("data", len(z)):
            pyro.sample("y", dist.Normal(z @ slope, 1.0), obs=y)

    program = pg.Program(regression, start=lambda: {"slope": torch.zeros(2)})
    data = {"z": torch.stack([1e4 * X, X], 1), "y": X}
    with pytest.warns(pg.FitWarning, match="Note on starts: all 2 chains(.|\n)*Note on unscaled columns: z") as caught:
        pg.fit(program, data, NUTS(draws=20, warmup=5, chains=2, jitter=0.1, max_tree_depth=3, processes=1), seed=0)
    assert len(caught) == 1


def test_a_fit_shows_its_verdict_once_it_is_known() -> None:
    fit = pg.fit(normal_mean, X, SVI(steps=400, lr=0.05), seed=0)
    assert "not diagnosed yet" in repr(fit) and "not diagnosed yet" in fit._repr_html_()
    found = fit.verdict
    assert f"verdict: {found.grade}: " in repr(fit) and found.grade in fit._repr_html_()
