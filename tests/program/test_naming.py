"""Names that cannot be exported are refused by the dry run; columns that make inference hard are in the notes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import ppl_gen as pg
from ppl_gen.inference import SVI

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")  # columns are odd on purpose

X = torch.linspace(-1.0, 1.0, 6)


def named(names: list[str], event: bool) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        for name in names:
            pyro.sample(name, dist.Normal(torch.zeros(2), 1.0).to_event(1) if event else dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(0.0, 1.0), obs=x)

    return model


def with_plate(name: str) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate(name, 3):
            pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(0.0, 1.0), obs=x)

    return model


def draw_argument(x: Tensor, draw: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(loc * draw, 1.0), obs=x)


@pytest.mark.parametrize(
    ("model", "data", "said"),
    [
        (named(["chain"], False), X, "the site 'chain' has a name that ArviZ reserves"),
        (named(["draw"], True), X, "the site 'draw' has a name that ArviZ reserves"),
        (with_plate("chain"), X, "the plate 'chain' has a name that ArviZ reserves"),
        (draw_argument, {"x": X, "draw": X}, "the entry 'draw' has a name that ArviZ reserves"),
        (named(["a/b", "a.b"], False), X, "the sites 'a/b' and 'a.b' become one name in a file"),
        (named(["z", "z_dim_0"], True), X, "the site 'z_dim_0' has the name that an axis of 'z' gets"),
        (named([""], False), X, "the site '' has no name"),
        (named(["."], False), X, r"the site '\.' has no name"),
        (named(["a\0b"], True), X, "has no name that a fit can be saved under"),
    ],
)
def test_names_that_cannot_be_exported_are_refused_by_the_dry_run(
    model: Callable[..., None], data: object, said: str
) -> None:
    for call in (lambda: pg.check(model, data), lambda: pg.fit(model, data, SVI(steps=1))):
        with pytest.raises(ValueError, match=said):
            call()


@pytest.mark.parametrize("names", [["a/b", "a.c"], ["z", "z_dim_1"], ["x"], ["a b", "é", "1x"], ["step", "log_p"]])
@pytest.mark.parametrize("event", [False, True])
def test_what_is_not_refused_is_exported_and_saved(names: list[str], event: bool, tmp_path: Path) -> None:
    model = named(names, event)
    fit = pg.fit(model, X, SVI(steps=1))
    fit.to_arviz(draws=3)
    loaded = pg.load(fit.save(tmp_path / "fit"), program=model, data=X)
    assert set(loaded.posterior(draws=2)) == set(names)


# ------------------------------------------------------------------------------------------------- columns
def regression(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[-1]), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


ROWS = torch.arange(8.0)
PLAIN = torch.stack([ROWS - 3.5, (ROWS - 3.5) ** 2], 1)


@pytest.mark.parametrize(
    ("column", "kind", "said"),
    [
        (3 * torch.ones(8), "constant", r"x\[:, 2\] \(all 3\); .*leave them out"),
        (torch.zeros(8), "constant", r"x\[:, 2\] \(all 0\)"),
        (5000.0 * ROWS, "unscaled", r"x\[:, 2\] \(mean 1.8e\+04, sd 1.2e\+04\); standardise"),
        (1e-5 * ROWS, "unscaled", r"x\[:, 2\] \(mean 3.5e-05, sd 2.4e-05\)"),
        (1e6 + ROWS, "unscaled", r"x\[:, 2\] \(mean 1e\+06, sd 2.4\)"),
    ],
)
def test_columns_that_make_inference_hard_are_named(column: Tensor, kind: str, said: str) -> None:
    x = torch.cat([PLAIN, column[:, None]], 1)
    notes = pg.fit(regression, {"x": x, "y": ROWS}, SVI(steps=1)).notes
    assert re.search(said, notes[f"{kind} columns"]), notes
    assert not [name for name in notes if "columns" in name and name != f"{kind} columns"]


@pytest.mark.parametrize(
    "data",
    [
        {"x": PLAIN, "y": ROWS},
        {"x": torch.cat([torch.ones(8, 1), PLAIN], 1), "y": ROWS},  # an intercept
        {"x": PLAIN, "y": (5000 * ROWS).long()},  # counts
        {"x": PLAIN, "y": 3 * torch.ones(8)},
        {"x": 100 * PLAIN[:, :1], "y": ROWS},
    ],
)
def test_other_columns_are_not(data: dict[str, Tensor]) -> None:
    assert not [name for name in pg.fit(regression, data, SVI(steps=1)).notes if "columns" in name]


def test_recipes_scale_for_themselves() -> None:
    data = {"x": 1e6 * PLAIN, "y": ROWS}
    assert "unscaled columns" in pg.fit(regression, data, SVI(steps=1)).notes
    assert "unscaled columns" not in pg.fit(pg.Recipe(lambda data: pg.Program(regression)), data, SVI(steps=1)).notes
