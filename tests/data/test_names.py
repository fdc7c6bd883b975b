"""Entries of the data that nothing reads: listed in the notes, and refused where one is a misspelt argument."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import ppl_gen as pg
from ppl_gen.data import Rows
from ppl_gen.inference import SVI

X = torch.linspace(-1.0, 1.0, 10)
STEP = SVI(steps=1)


def model(x: Tensor, sigma: Tensor | None = None, group_labels: Tensor | None = None, y: Tensor | None = None) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(loc, 1.0 if sigma is None else sigma), obs=y)


MISSPELT = {
    "sigm": "sigma",
    "Sigma": "sigma",
    "sigmas": "sigma",
    "simga": "sigma",
    "SIGMA_": "sigma",
    "Y": "y",
    "ys": "y",
    "group_label": "group_labels",
    "grouplabels": "group_labels",
    "groups_labels": "group_labels",
}


@pytest.mark.parametrize("entry", MISSPELT)
def test_a_misspelt_entry_is_refused_with_the_argument_that_was_meant(entry: str) -> None:
    said = rf"data '{entry}': neither model nor recipe reads it; did you mean the argument '{MISSPELT[entry]}'"
    data = {"x": X, entry: X.abs() + 1}
    if MISSPELT[entry] != "y":
        data["y"] = X
    fit = pg.fit(model, {"x": X, "y": X}, STEP)
    calls = {
        "check": lambda: pg.check(model, data),
        "fit": lambda: pg.fit(model, data, STEP),
        "compare": lambda: pg.compare(model, data, {"a": STEP}),
        "predict": lambda: fit.predict(data, draws=2),
        "posterior": lambda: fit.posterior(data, draws=2),
        "evidence": lambda: fit.evidence(data),
        "validation": lambda: pg.fit(model, {"x": X, "y": X}, STEP, validation=data),
        "prior": lambda: pg.prior_predictive(model, data, draws=2),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=said):
            call()
            pytest.fail(name)


@pytest.mark.parametrize("entry", ["zz", "weights", "z", "x2", "label", "sig"])
def test_what_nothing_reads_is_in_the_notes(entry: str) -> None:
    data = {"x": X, "y": X, entry: X}
    fit = pg.fit(model, data, STEP)
    assert fit.notes["left out"] == f"{entry}: neither model nor recipe reads them"
    assert fit.predict({"x": X, entry: X}, draws=2)["y"].shape == (2, 10)
    assert "left out" not in pg.fit(model, {"x": X, "y": X}, STEP).notes


def test_an_argument_that_has_its_entry_is_not_meant_by_another() -> None:
    def two(feature_1: Tensor, sigma: Tensor) -> None:
        model(feature_1, sigma, y=feature_1)

    fit = pg.fit(two, {"feature_1": X, "feature_2": X, "sigma": X.abs() + 1, "sigmas": X}, STEP)
    assert fit.notes["left out"].startswith("feature_2, sigmas:")


READS = {
    "item": lambda data: data["labels"],
    "get": lambda data: data.get("labels"),
    "in": lambda data: "labels" in data,
    "items": lambda data: [value for _, value in data.items()],
    "values": lambda data: list(data.values()),
    "copy": dict,
    "unpacked": lambda data: {**data},
    "star": lambda data: (lambda **entries: entries)(**data),
}


@pytest.mark.parametrize("how", READS)
def test_what_a_recipe_reads_is_not_left_out(how: str) -> None:
    def build(data: Mapping[str, Any]) -> pg.Program:
        READS[how](data)

        def inner(x: Tensor, label: Tensor | None = None) -> None:
            model(x, y=x)

        return pg.Program(inner)

    recipe, data = pg.Recipe(build), {"x": X, "labels": (X > 0).long()}
    fit = pg.fit(recipe, data, STEP)
    assert "left out" not in fit.notes
    assert fit.evidence(data).rows == 10, "and of new rows neither"
    assert pg.compare(recipe, data, {"a": STEP})["a"].info.rows == 8
    assert pg.fit(recipe, data, STEP, start=fit).info.rows == 10


def test_rows_may_hold_what_nothing_reads() -> None:
    fit = pg.fit(lambda x: model(x, y=x), Rows({"x": X, "labels": (X > 0).long()}), STEP)
    assert fit.info.rows == 10


def test_an_open_signature_reads_every_entry() -> None:
    def open_ended(x: Tensor, **more: Any) -> None:
        model(x, y=x)

    assert "left out" not in pg.fit(open_ended, {"x": X, "zz": X}, STEP).notes
