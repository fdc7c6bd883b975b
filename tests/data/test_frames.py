"""Names of rows and columns that pandas objects bring along; rows and columns themselves are taken as they come."""

from __future__ import annotations

import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch

import ppl_gen as pg
from ppl_gen.inference import SVI, Laplace

X = pd.DataFrame({"a": [1.0, 2.0, 3.0, 5.0], "b": [0.0, 1.0, 0.0, 1.0]}, index=list("pqrs"))
Y = pd.Series([1.0, 4.0, 3.0, 7.0], index=list("pqrs"))  # a + 2 b, more or less


def regression(x, y=None):
    weights = pyro.sample("weights", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ weights, 0.1), obs=y)


def test_rows_named_in_another_order_are_refused() -> None:
    """Rows that were shuffled on one side alone went on as if they belonged together."""
    with pytest.raises(ValueError, match=r"data: x and y have the same index in another order"):
        pg.fit(regression, {"x": X, "y": Y[::-1]}, SVI(steps=1))
    with pytest.raises(ValueError, match=r"data: x and y have the same index in another order"):
        pg.fit(regression, (X, Y[::-1]), SVI(steps=1))
    shuffled = X.loc[list("sprq")]
    for data in ({"x": shuffled, "y": Y.loc[shuffled.index]}, {"x": X, "y": Y.to_numpy()}, {"x": X, "y": list(Y)}):
        pg.fit(regression, data, SVI(steps=1))
    pg.fit(regression, {"x": X, "y": Y.reset_index(drop=True)}, SVI(steps=1))  # other names say nothing of the order


def test_columns_named_in_another_order_are_refused() -> None:
    fit = pg.fit(regression, {"x": X, "y": Y}, Laplace(), seed=0)
    new = pd.DataFrame({"b": [1.0], "a": [4.0]})
    with pytest.raises(ValueError, match=r"data: 'x' has the columns b, a, and was fitted to a, b, in this order"):
        fit.predict({"x": new}, draws=5)
    with pytest.raises(ValueError, match=r"data: 'x' has the columns a, c, and was fitted to a, b"):
        fit.evidence({"x": pd.DataFrame({"a": [4.0], "c": [1.0]}), "y": pd.Series([6.0])})
    with pytest.raises(ValueError, match=r"validation: 'x' has the columns b, a"):
        pg.fit(regression, {"x": X, "y": Y}, SVI(steps=2), validation={"x": X[["b", "a"]], "y": Y})
    named = fit.predict({"x": new[["a", "b"]]}, draws=400)["y"].mean()
    # The posterior of the mean is known to 0.1 and less, and so is each draw of y: 0.2 / sqrt(400), five times.
    assert (
        abs(float(named) - float(torch.tensor([4.0, 1.0]).double() @ fit.posterior(draws=400)["weights"].mean(0)))
        < 0.05
    )
    assert fit.predict({"x": new[["a", "b"]].to_numpy()}, draws=5)["y"].shape == (5, 1)
