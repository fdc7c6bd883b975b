"""Names and labels of the axes of what a fit is exported with."""

from __future__ import annotations

import numpy as np
import pandas
import pyro
import pyro.distributions as dist
import pytest
import torch

import ppl_gen as pg
from ppl_gen.bridge import group
from ppl_gen.inference import NUTS, SVI

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")

SHORT = SVI(steps=5)


def series(y):
    """Three steps of four series: the rows of the data are steps, so that no plate runs over them."""
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("series", y.shape[1]):
        at = torch.zeros(())
        for t in pyro.markov(range(len(y))):
            at = pyro.sample(f"x_{t}", dist.Normal(at, 1.0))
            pyro.deterministic(f"d_{t}", 2 * at)
            pyro.sample(f"y_{t}", dist.Normal(at, scale), obs=y[t])


def grid(y):
    """Two crossed plates, and derived values that are not spread over both of them."""
    rows, columns = pyro.plate("data", y.shape[0], dim=-2), pyro.plate("item", y.shape[1], dim=-1)
    with rows:
        row = pyro.sample("row", dist.Normal(0.0, 1.0))
    with columns:
        column = pyro.sample("column", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.deterministic("length", column.norm(dim=-1))
        pyro.deterministic("number", torch.zeros(()))
    with rows, columns:
        pyro.sample("y", dist.Normal(row + column[..., 0], 1.0), obs=y)


def axes(tree, name):
    found = group(tree, name)
    return {str(key): value.dims for key, value in found.data_vars.items()}


def test_sites_of_one_plate_have_one_dimension_in_every_group():
    tree = pg.fit(series, torch.randn(4, 4)[:3], SHORT, seed=0).to_arviz(draws=20)
    drawn = ("chain", "draw", "series")
    for name in ("posterior", "prior"):
        found = axes(tree, name)
        assert found.pop("scale") == ("chain", "draw")
        assert found == {f"{letter}_{t}": drawn for letter in "xd" for t in range(3)}, name
    for name in ("posterior_predictive", "prior_predictive"):
        assert axes(tree, name) == {f"y_{t}": drawn for t in range(3)}, name
    assert axes(tree, "observed_data") == {f"y_{t}": ("series",) for t in range(3)}
    assert axes(tree, "log_likelihood") == {"y_0_y_1_y_2": ("chain", "draw", "row")}
    assert np.array_equal(tree["prior"]["d_1"], 2 * tree["prior"]["x_1"]), "derived from the very draw"


def test_a_long_series_has_a_short_name_for_its_joint_likelihood():
    tree = pg.fit(series, torch.randn(9, 4), SHORT, seed=0).to_arviz(draws=5)
    assert list(tree["log_likelihood"].data_vars) == ["y_0_to_y_8"]
    assert "y_4" in tree.attrs["log_likelihood"]


def test_crossed_plates_name_their_own_axes():
    fit = pg.fit(grid, torch.randn(5, 3), SHORT, seed=0)
    tree = fit.to_arviz(draws=20)
    found = axes(tree, "posterior")
    assert found["row"][2:] == ("data", "row_dim_1") and found["column"][2:] == ("item", "column_dim_1")
    assert found["length"][2:] == ("item",) and found["number"][2:] == ()
    assert axes(tree, "posterior_predictive")["y"][2:] == ("data", "item")


def test_draws_of_the_prior_predict_what_the_prior_says():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    tree = pg.fit(model, torch.zeros(4), SHORT, seed=0).to_arviz(draws=500)
    loc, x = tree["prior"]["loc"].values[0], tree["prior_predictive"]["x"].values[0]
    assert x.shape == (500, 4)
    # x - loc is standard normal: the mean of 2000 of them has sd 0.022, and 6 sd are 0.13; sd^2 of loc is 100, +-40 at 6
    assert abs((x - loc[:, None]).mean()) < 0.13 and 60 < x.var() < 140


def test_coords_and_dims_are_those_asked_for():
    fit = pg.fit(grid, torch.randn(5, 3), SHORT, seed=0)
    items = ["a", "b", "c"]
    asked = {"column": ["item", "axis"], "y": ["person", "item"]}
    tree = fit.to_arviz(draws=20, dims=asked, coords={"item": items, "axis": ["u", "v"], "person": range(10, 15)})
    posterior, likelihood = tree["posterior"], tree["log_likelihood"]
    assert posterior["column"].dims[2:] == ("item", "axis") and list(posterior["axis"].values) == ["u", "v"]
    assert list(posterior["length"]["item"].values) == items, "derived sites of the plate too"
    assert likelihood["y"].dims[2:] == ("person",) and list(likelihood["person"].values) == [10, 11, 12, 13, 14]
    plain = fit.to_arviz(draws=20)["posterior"]["column"].values
    assert np.array_equal(posterior["column"].sel(axis="v").values, plain[..., 1])


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"dims": {"colunm": ["item"]}}, ValueError, "dims: no site or entry of the data is called 'colunm'"),
        ({"dims": {"column": ["item"]}}, ValueError, r"dims\['column'\]: expected 2 name\(s\)"),
        ({"dims": {"column": ["a", "a"]}}, ValueError, r"dims\['column'\]: two axes have the same name"),
        ({"dims": {"column": "item"}}, TypeError, r"dims\['column'\]: expected a list of names"),
        ({"dims": ["item"]}, TypeError, "dims: expected a mapping"),
        ({"coords": {"item": ["a", "b"]}}, ValueError, r"coords\['item'\]: expected 3 labels"),
        ({"coords": {"itme": ["a", "b", "c"]}}, ValueError, "coords: no axis is called"),
        ({"coords": {"item": "abc"}}, TypeError, r"coords\['item'\]: expected a list of labels"),
        ({"coords": 3}, TypeError, "coords: expected a mapping"),
    ],
)
def test_what_names_no_axis_is_refused(given, error, said):
    fit = pg.fit(grid, torch.randn(5, 3), SHORT, seed=0)
    with pytest.raises(error, match=said):
        fit.to_arviz(draws=5, **given)


def regression(x, y):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        mean = pyro.deterministic("mean", x @ weight)
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


TOWNS = ["Bern", "Rome", "Oslo"]
TABLE = pandas.DataFrame({"height": [1.0, 2.0, 3.0], "width": [0.0, 1.0, 0.0]}, index=TOWNS)
LABELLED = {"x": TABLE, "y": pandas.Series([1.0, 2.0, 3.0], index=TOWNS)}


def test_index_and_columns_of_pandas_label_the_axes(tmp_path):
    fit = pg.fit(regression, LABELLED, NUTS(draws=20, warmup=10, chains=1), seed=0)
    tree = fit.to_arviz(draws=20, dims={"weight": ["x_column"]})
    for name in ("posterior_predictive", "log_likelihood", "observed_data", "prior_predictive"):
        assert list(tree[name]["y"]["data"].values) == TOWNS, name
    assert list(tree["constant_data"]["x"]["x_column"].values) == ["height", "width"]
    assert list(tree["posterior"]["x_column"].values) == ["height", "width"]
    fit.save(tmp_path / "fit")
    saved = pg.load(tmp_path / "fit").to_arviz()
    assert list(saved["observed_data"]["data"].values) == TOWNS
    assert saved["constant_data"]["x"].dims == ("data", "x_column") == tree["constant_data"]["x"].dims


def test_the_labels_of_a_plate_that_was_renamed_everywhere_are_left_out():
    """The index labels the plate; where each axis of the plate has another name, there is nothing to label."""

    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    fit = pg.fit(model, LABELLED["y"].rename("x"), SHORT, seed=0)
    tree = fit.to_arviz(draws=20, dims={"x": ["town"]}, coords={"town": [1, 2, 3]})
    for name in ("posterior_predictive", "log_likelihood", "observed_data"):
        assert tree[name]["x"].dims[-1] == "town" and list(tree[name]["town"].values) == [1, 2, 3], name


def test_frames_whose_rows_disagree_give_no_labels():
    other = {"x": TABLE, "y": LABELLED["y"].set_axis(["a", "b", "c"])}
    tree = pg.fit(regression, other, SHORT, seed=0).to_arviz(draws=5)
    assert list(tree["observed_data"]["data"].values) == [0, 1, 2]


def test_a_masked_row_keeps_the_labels_of_the_others():
    def model(x, seen):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=seen):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    data = {"x": pandas.Series([1.0, 2.0, 3.0], index=TOWNS), "seen": torch.tensor([True, False, True])}
    tree = pg.fit(model, data, SHORT, seed=0).to_arviz(draws=5)
    assert list(tree["log_likelihood"]["data"].values) == ["Bern", "Oslo"]


@pytest.mark.parametrize("name", ["chain", "draw"])
def test_names_of_the_draws_are_refused_when_a_program_is_checked(name):
    def model(x):
        loc = pyro.sample(name, dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    with pytest.raises(ValueError, match=f"the site '{name}' has a name that ArviZ reserves for the draws"):
        pg.check(model, torch.zeros(3))


def test_replicates_and_predictions_keep_the_shape_of_derived_sites():
    fit = pg.fit(regression, LABELLED, SHORT, seed=0)
    drawn = fit.sample(3)
    assert drawn["mean"].shape == (3,) and fit.predict(draws=4)["y"].shape == (4, 3)
