"""Chains on a potential in C: the same draws as on other paths up to rounding, interrupts, signals, checkpoints, errors."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from resumable_runs import same

import ppl_gen as pg
from ppl_gen.capture.c_library import compiler
from ppl_gen.inference import NUTS
from ppl_gen.inference.mcmc import potential

pytestmark = [
    pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning"),  # chains are short on purpose
    pytest.mark.skipif(importlib.util.find_spec("nutpie") is None, reason="nutpie is not installed"),
    pytest.mark.skipif(compiler() is None, reason="no C compiler"),
]

X = torch.tensor([0.3, -1.2, 0.8, 2.1, -0.4, 1.7, 0.1, 0.9], dtype=torch.float64)
CHAINS = NUTS(draws=40, warmup=40, chains=3, processes=2)


def model(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, scale), obs=x)


def learned(algorithm=CHAINS, program=model, **settings):
    return pg.fit(program, X, algorithm, seed=2, progress=False, **settings)


@pytest.fixture
def in_c(monkeypatch):
    """However little is drawn."""
    monkeypatch.setattr(potential, "_worth_c", lambda mode, *rest: mode == "auto")


def test_much_is_drawn_in_c_and_little_is_not() -> None:
    assert learned(replace(CHAINS, draws=5, warmup=5)).cost["path"] == "numpy"
    assert learned(replace(CHAINS, draws=5000)).cost["path"] == "c"
    tape = potential.Tape(1, (None,) * 200, (), None, (), numbers=70_000)
    assert potential._worth_c("auto", tape, 10_000, "numpy")
    assert not potential._worth_c("auto", tape, 1000, "numpy")
    assert not potential._worth_c("inductor", tape, 10_000, "numpy")


def test_the_draws_are_those_of_other_paths_up_to_rounding(monkeypatch) -> None:
    """Rounding grows along a chain: over the first ten draws it stays small."""
    short = NUTS(draws=5, warmup=5, chains=3)
    other = learned(short)
    monkeypatch.setattr(potential, "_worth_c", lambda *rest: True)
    found = learned(short)
    assert (other.cost["path"], found.cost["path"]) == ("numpy", "c")
    for name in ("loc", "scale"):
        assert torch.allclose(found.learned.draws[name], other.learned.draws[name], rtol=1e-6)
    for name in ("n_steps", "tree_depth", "diverging"):
        assert torch.equal(found.learned.stats[name], other.learned.stats[name])
    for name in ("lp", "energy", "acceptance_rate", "step_size"):
        assert torch.allclose(found.learned.stats[name], other.learned.stats[name], rtol=1e-5)
    assert found.cost["gradient_evaluations"] == other.cost["gradient_evaluations"]


def test_the_posterior_is_the_known_one() -> None:
    """loc | x for a known scale of 1: a normal of precision 1/4 + 8 and its mean.

    8000 draws of a one-dimensional normal by NUTS have an ESS above 2000; 5.5 standard errors of the mean are 0.12 sd,
    and of the sd 0.09 of it.
    """

    def known(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    fit = learned(NUTS(draws=2000, warmup=300, chains=4), known)
    assert fit.cost["path"] == "c"
    draws, precision = fit.learned.draws["loc"], 0.25 + len(X)
    mean, sd = float(X.sum()) / precision, precision**-0.5
    assert abs(float(draws.mean()) - mean) < 0.12 * sd and abs(float(draws.std()) - sd) < 0.09 * sd


def test_draws_do_not_depend_on_threads(in_c) -> None:
    one, two = (learned(replace(CHAINS, processes=count)).learned.draws for count in (1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_thinning_keeps_the_draws_that_stay(in_c) -> None:
    every, thinned = learned(CHAINS), learned(replace(CHAINS, draws=20, thin=2))
    assert torch.equal(thinned.learned.draws["loc"], every.learned.draws["loc"][:, 1::2])
    assert torch.equal(thinned.learned.stats["lp"], every.learned.stats["lp"][:, 1::2])
    more = learned(replace(CHAINS, draws=60))
    assert torch.equal(more.learned.draws["loc"][:, :40], every.learned.draws["loc"])


def test_callbacks_hear_of_every_iteration(in_c) -> None:
    seen = []
    learned(replace(CHAINS, thin=2), callbacks=[lambda step, info: seen.append(step)])
    assert seen == list(range(1, 3 * 120 + 1))


def test_interrupts_keep_what_was_drawn() -> None:
    def stop(step, info):
        if step > 200:
            raise KeyboardInterrupt

    fit = learned(NUTS(draws=1_000_000, warmup=40, chains=2, processes=2), callbacks=[stop])
    assert fit.cost["path"] == "c" and fit.status is pg.Status.INTERRUPTED
    _, draws = fit.learned.draws["loc"].shape
    assert 0 < draws < 1_000_000 and fit.learned.stats["lp"].isfinite().all()
    assert bool(fit.learned.stats["n_steps"].gt(0).all())
    some = min(draws, 2000)
    whole = learned(NUTS(draws=some, warmup=40, chains=2)).learned.draws["loc"]
    assert all(any(torch.equal(one[:some], other) for other in whole) for one in fit.learned.draws["loc"])


def test_checkpoints_keep_chains_that_ended(in_c, tmp_path, monkeypatch) -> None:
    one = replace(CHAINS, processes=1)
    whole = learned(one)

    def stop(step, info):
        if step > 80:  # the first chain has ended
            raise SystemExit

    with pytest.raises(SystemExit):
        learned(one, checkpoint=tmp_path, callbacks=[stop])
    monkeypatch.setattr(potential, "_worth_c", lambda *rest: False)  # it goes on by the path that it began with
    resumed = learned(one, checkpoint=tmp_path)
    assert resumed.cost["path"] == "c" and "went on" in resumed.notes["resumed"]
    assert same(dict(whole.learned.draws), dict(resumed.learned.draws))


def test_walls_are_divergences(in_c) -> None:
    """A density that is no number beyond a wall: trajectories end there, chains go on."""

    def walled(x):
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        pyro.factor("wall", (1.5 - u).sqrt() * 0.0)  # no number above 1.5
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(u, 3.0), obs=x)

    fit = learned(NUTS(draws=500, warmup=200, chains=2), walled)
    assert fit.cost["path"] == "c"
    assert float(fit.learned.draws["u"].max()) < 1.5 and float(fit.learned.stats["diverging"].double().sum()) > 0


def test_without_a_compiler_numpy_serves_and_says_why(in_c, monkeypatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler-anywhere")
    from ppl_gen.capture import c_library

    c_library._library.cache_clear()
    fit = learned()
    assert fit.cost["path"] == "numpy" and "no compiler" in fit.cost["path_reason"]


def test_a_matrix_that_is_factorised_stays_in_torch(in_c) -> None:
    def correlated(x):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
        covariance = scale * torch.eye(2, dtype=torch.float64) + 0.5
        u = pyro.sample("u", dist.MultivariateNormal(x.new_zeros(2), covariance))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(u[0], 1.0), obs=x)

    fit = learned(replace(CHAINS, draws=5, warmup=5), correlated)
    assert fit.cost["path"] == "graph" and "C: " in fit.cost["path_reason"] or "NumPy" in fit.cost["path_reason"]


@pytest.mark.slow
def test_eight_schools_beside_the_paths_that_are_known() -> None:
    """Means of tau by C and by NumPy: 4 x 1500 draws, ESS above 500 each, 5.5 standard errors of the difference."""
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=torch.float64)
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=torch.float64)

    def schools(y, sigma):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("data", len(y)):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * theta, sigma), obs=y)

    nuts = NUTS(draws=1500, warmup=500, chains=4)
    found = {}
    for path in ("auto", "graph"):
        fit = pg.fit(schools, {"y": y, "sigma": sigma}, nuts, seed=1, progress=False, compile=path)
        found[fit.cost["path"]] = fit.learned.draws["tau"].log()
    assert sorted(found) == ["c", "graph"]
    one, other = found["c"], found["graph"]
    error = math.sqrt(float(one.var() + other.var()) / 500)
    assert abs(float(one.mean() - other.mean())) < 5.5 * error
