"""Where the data hold no floats, a fit computes in torch's default dtype if that is float64."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

import ppl_gen as pg
from ppl_gen.inference import SVI

HELD = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


@pytest.fixture
def double() -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def model() -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    assert loc.dtype is torch.get_default_dtype()
    pyro.sample("x", dist.Normal(loc + torch.zeros(3), 1.0).to_event(1), obs=HELD)


@pytest.mark.usefixtures("double")
def test_the_users_double_is_kept_where_the_data_say_nothing() -> None:
    fit = pg.fit(model, (), SVI(steps=2))
    assert {value.dtype for value in fit.params.values()} == {torch.float64} == {fit.data.dtype}
    assert fit.posterior(draws=2)["loc"].dtype is torch.float64 and torch.get_default_dtype() is torch.float64

    def counts(n: torch.Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(1.0, 1.0))
        with pyro.plate("data", len(n)):
            pyro.sample("n", dist.Poisson(rate), obs=n)

    assert pg.fit(counts, torch.arange(4), SVI(steps=2)).data.dtype is torch.float64

    def rows(x: torch.Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    assert pg.fit(rows, HELD.float(), SVI(steps=2)).data.dtype is torch.float32


def test_without_it_single_precision_as_ever() -> None:
    assert {v.dtype for v in pg.fit(model, (), SVI(steps=2)).params.values()} == {torch.float32}
