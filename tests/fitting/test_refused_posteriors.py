"""Posteriors whose answers do not go together, that lack what rows share, or whose class is not there."""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from own_kinds import ClosedForm, Ensemble, Exact, Grid, X, fitted, normal_mean

import ppl_gen as pg
from ppl_gen.extending import ChainPosterior, DrawsPosterior, Outcome, Posterior, Run
from ppl_gen.fitting.posteriors.kinds import held_whole, kind_named
from ppl_gen.inference import Algorithm


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pg.FitWarning)
        yield


def test_a_kind_that_is_not_loaded_is_refused_by_name(tmp_path: Path) -> None:
    class Strange(Grid):
        kind = "strange"

    fit = pg.fit(normal_mean, X, Exact("grid"), progress=False)
    object.__setattr__(fit, "learned", Strange(fit.learned.nodes, fit.learned.weights))
    path = fit.save(tmp_path / "kept")
    Strange.kind = "stranger"  # as if the class were not there
    with pytest.raises(ValueError, match="a posterior of the kind 'strange'.*import the module that defines it"):
        pg.load(path, program=normal_mean)
    assert "loc" in pg.load(path).to_arviz()["posterior"]
    Strange.kind = "strange"
    assert type(pg.load(path, program=normal_mean).learned) is Strange


def test_one_word_means_one_class(tmp_path: Path) -> None:
    """A class that takes the word of another is not held whole: what came back could be of either."""

    class Rival(Grid):
        kind = "grid_of_two"

    class Twin(Grid):
        kind = "grid_of_two"

    class Chains(Grid):
        kind = "chains"

    assert kind_named("grid_of_two") is None and not held_whole(Rival) and not held_whole(Twin)
    assert not held_whole(Chains) and kind_named("chains") is not Chains
    fit = pg.fit(normal_mean, X, Exact("grid"), progress=False)
    object.__setattr__(fit, "learned", Rival(fit.learned.nodes, fit.learned.weights))
    with pytest.warns(UserWarning, match="a Rival, which is code"):
        fit.save(tmp_path / "kept")


def test_tensors_of_another_kind_are_refused(tmp_path: Path) -> None:
    fit = fitted("ensemble")
    path = fit.save(tmp_path / "kept")
    file = path / "fit.json"
    outer = json.loads(file.read_text())
    meta = json.loads(outer["fit"])
    assert meta["kind"] == "ensemble" and meta["judged_by"] == "chains"
    meta["kind"] = "grid"
    text = json.dumps(meta)
    file.write_text(json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "fit": text}))
    with pytest.raises(ValueError, match="a tensor is named '(walkers/loc|moves/accepted)'"):
        pg.load(path, program=normal_mean)


class Silent(Grid):
    """It does not say what sites it has values of, but its draws do."""


@pytest.mark.parametrize(
    "posterior",
    [
        ChainPosterior({"loc": torch.zeros(2, 5)}),
        DrawsPosterior({"loc": torch.zeros(5)}),
        Silent(torch.zeros(5), torch.ones(5)),
    ],
    ids=["chains", "draws", "own"],
)
def test_draws_of_a_part_of_what_rows_share_are_refused(posterior: Posterior) -> None:
    """The rest was drawn from the prior by `fit.sample` and in the deterministic sites of `fit.diagnose()`."""

    @dataclass(frozen=True)
    class Half(Algorithm):
        needs = ()

        def run(self, run: Run) -> Outcome:
            return Outcome(posterior)

    def scaled(x: torch.Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, scale), obs=x)

    with pytest.raises(pg.IncompatibleError, match="Half learned no posterior of scale.*its draws are of loc"):
        pg.fit(scaled, X, Half())
    assert pg.fit(normal_mean, X, Half(), progress=False).posterior(draws=3)["loc"].shape == (3,)


@pytest.mark.parametrize("draws", [{}, {"loc": torch.zeros(2, 0)}, {"loc": torch.zeros(2, 3), "b": torch.zeros(3, 2)}])
def test_draws_that_do_not_belong_together_are_refused(draws: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="draws: expected chains x draws x shape"):
        ChainPosterior(draws)
    with pytest.raises(ValueError, match="draws: expected draws x shape"):
        DrawsPosterior({name: value[0] for name, value in draws.items()})


class Odd(Ensemble):
    judged_by = property(lambda self: "eye")


class Empty(Ensemble):
    def by_chain(self) -> Any:
        return None


@pytest.mark.parametrize(
    ("learned", "error", "match"),
    [
        (lambda: {"loc": X[0]}, TypeError, r"expected what was learned, such as PointPosterior.*got dict"),
        (lambda: ClosedForm, TypeError, "got ClosedForm, a class"),
        (lambda: Odd(X[None], X[None]), ValueError, "Odd.judged_by has to be 'weights', .*got 'eye'"),
        (lambda: Empty(X[None], X[None]), ValueError, r"Empty is judged by chains, and its by_chain\(\) gives none"),
        (
            lambda: Ensemble(X[None], X[None, :5]),
            ValueError,
            r"Ensemble.by_chain\(\) and its stats .*\(1, 5\), \(1, 20\)",
        ),
        (lambda: Ensemble(X, X), ValueError, r"Ensemble.by_chain\(\) .*\(20,\)"),
    ],
    ids=["dict", "class", "unknown judge", "no chains", "unequal", "no dimension of chains"],
)
def test_answers_that_do_not_go_together_are_refused(learned: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=f"posterior: .*{match}"):
        Outcome(learned())
