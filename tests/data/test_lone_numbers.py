"""A single number that a model takes is a constant by itself; where rows are meant, it is refused in words."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from programs import X8, conjugate

import ppl_gen as pg
from ppl_gen.inference import SVI

NUMBERS = [8.5, 8, np.float32(8.5), torch.tensor(8.5), np.array(8.5)]


def weighing(guess: Any) -> None:
    weight = pyro.sample("weight", dist.Normal(guess, 1.0))
    pyro.sample("measurement", dist.Normal(weight, 0.75), obs=torch.tensor(9.5))


def weighing_guide(guess: Any) -> None:
    loc, scale = (0.75**2 * guess + 9.5) / (1 + 0.75**2), pyro.param("scale", torch.tensor(1.0))
    pyro.sample("weight", dist.Normal(loc, scale.abs()))


@pytest.mark.parametrize("guess", NUMBERS)
def test_a_guess_is_a_constant(guess: Any) -> None:
    """Oracle: the conjugate posterior has scale 0.6, log p(9.5 | guess) is that of a normal of variance 1 + 0.75^2."""
    fit = pg.fit(pg.Program(weighing, weighing_guide), guess, SVI(steps=300, lr=0.02), seed=0)
    assert abs(float(fit.params["scale"]) - 0.6) < 0.05 < abs(1.0 - 0.6)
    assert fit.notes["constants"].startswith("guess (") and fit.data.rows is None
    variance = 1 + 0.75**2
    exact = -0.5 * (math.log(2 * math.pi * variance) + (9.5 - float(guess)) ** 2 / variance)
    found = fit.marginal_likelihood(draws=2000)
    assert abs(float(found.mean) - exact) < max(6 * float(found.stderr), 0.01)
    assert fit.predict(draws=5)["measurement"].shape[0] == 5
    other = fit.posterior(guess, draws=5)
    assert other["weight"].shape[0] == 5


@pytest.mark.parametrize("flag", [True, False, np.bool_(True)])
def test_a_flag_is_a_constant(flag: Any) -> None:
    """Oracle: Beta(10, 10) after six of ten is Beta(16, 14), and with it as the guide the loss is -log p(x)."""
    data = torch.tensor([1.0] * 6 + [0.0] * 4)

    def model(switch: bool) -> None:
        f = pyro.sample("f", dist.Beta(10.0, 10.0))
        assert isinstance(switch, bool)
        with pyro.plate("data_plate"):
            pyro.sample("obs", dist.Bernoulli(f), obs=data)

    def guide(switch: bool) -> None:
        pyro.sample("f", dist.Beta(pyro.param("a", torch.tensor(16.0)), 14.0))

    fit = pg.fit(pg.Program(model, guide), flag, SVI(pyro.infer.Trace_ELBO(), steps=1))
    exact = sum(map(math.lgamma, (10, 10, 30))) - sum(map(math.lgamma, (16, 14, 20)))
    assert abs(float(fit.history["program_loss"][0]) - exact) < 1e-4


@pytest.mark.parametrize("number", NUMBERS)
def test_where_rows_are_meant_it_is_refused(number: Any) -> None:
    said = "data 'x': expected rows along the first dimension, got a single number"
    with pytest.raises(ValueError, match=said):
        pg.fit(conjugate, number, SVI(steps=1))

    def open_plate(x: torch.Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data"):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    fit = pg.fit(open_plate, X8.float(), SVI(steps=1))
    with pytest.raises(ValueError, match=said):
        fit.evidence(number)
    with pytest.raises(ValueError, match=r"batch_size|rows"):
        pg.fit(weighing, number, SVI(steps=1, batch_size=2))


def test_a_plate_without_a_size_is_refused_where_it_may_hold_the_rows() -> None:
    def model(x: torch.Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("people"):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"'people'\) has no size and holds 8.*data_plate='people'"):
        pg.check(model, X8)
    assert pg.fit(pg.Program(model, data_plate="people"), X8, SVI(steps=1)).info.data_plate == "people"


def test_a_number_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="'guess'.*finite"):
        pg.fit(weighing, math.nan, SVI(steps=1))
