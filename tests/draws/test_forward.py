"""Drawing forward where a factor weighs the draws."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import ppl_gen as pg
from ppl_gen.inference import SVI

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")  # guides are short on purpose

X = torch.tensor([0.3, 1.2, 0.8, 0.1, 2.0])


def cut(x=None, t=None):
    """A row's latent is positive, which only a factor says."""
    with pyro.plate("data", len(t)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("positive", torch.where(z > 0.0, 0.0, -30.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def censored(x, over):
    """Rows that are known to lie above x, by a factor that holds data."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.poutine.mask(mask=~over):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.factor("above", torch.where(over, torch.special.log_ndtr(z - x), 0.0))


def test_rows_are_not_drawn_past_a_factor_that_weighs_them() -> None:
    fit = pg.fit(cut, {"x": X, "t": torch.zeros(5)}, SVI(steps=3), seed=0)
    said = "weighs what it draws by pyro.factor at 'positive'"
    with pytest.raises(pg.IncompatibleError, match="sample: the program 'cut' " + said):
        fit.sample(100)
    with pytest.raises(pg.IncompatibleError, match="predict: the program 'cut' " + said):
        fit.predict({"x": None, "t": torch.zeros(5)})
    with pytest.raises(pg.IncompatibleError, match="prior_predictive: the program 'cut' " + said):
        pg.prior_predictive(cut, {"x": X, "t": torch.zeros(5)}, draws=2)
    groups = fit.to_arviz(draws=5)
    assert "posterior_predictive" in groups and "prior" not in groups and "prior_predictive" not in groups


def test_what_a_factor_weighs_may_be_given_or_drawn_given_rows() -> None:
    fit = pg.fit(cut, {"x": X, "t": torch.zeros(5)}, SVI(steps=3), seed=0)
    assert abs(float(fit.sample(400, given={"z": 2.0})["x"].mean()) - 2.0) < 4 * 0.5 / math.sqrt(400)
    assert bool((fit.posterior({"x": X[:2], "t": torch.zeros(2)}, draws=50)["z"] > 0.0).all())
    assert fit.predict({"x": X[:2], "t": torch.zeros(2)}, draws=5)["x"].shape == (5, 2)


def test_a_factor_that_holds_data_is_an_observation() -> None:
    over = torch.tensor([False, True, False, True, False])
    fit = pg.fit(censored, {"x": X, "over": over}, SVI(steps=3), seed=0)
    drawn = fit.sample(2000)["x"]  # z and the noise have variance 1 each
    assert abs(float(drawn.std()) - math.sqrt(2.0)) < 4 * math.sqrt(2.0 / (2 * 2000))
    assert pg.prior_predictive(censored, {"x": X, "over": over}, draws=3)["x"].shape == (3, 5)
