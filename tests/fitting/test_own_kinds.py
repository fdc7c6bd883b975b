"""Kinds of posterior that the package does not know go through every question by the methods of `Posterior` alone."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from own_kinds import KINDS, MEAN, SD, Exact, Grid, X, fitted, normal_mean

import ppl_gen as pg
from ppl_gen.extending import Outcome, Run
from ppl_gen.fitting.posteriors.kinds import held_whole, kind_named
from ppl_gen.inference import NUTS, Algorithm


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pg.FitWarning)
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_draws_predictions_and_new_rows(kind: str) -> None:
    """1000 draws know a mean to sd / 31.6 and an sd to 2.3 %: five times that."""
    fit = fitted(kind)
    drawn = fit.posterior(draws=1000)["loc"]
    assert abs(float(drawn.mean()) - MEAN) < 5 * SD / 31.6 and float(drawn.std()) == pytest.approx(SD, rel=0.12)
    assert fit.point is None
    replicates = fit.predict(draws=1000)["x"]
    assert replicates.shape == (1000, 20) and float(replicates[:, 0].var()) == pytest.approx(1 + SD**2, rel=0.23)
    rows = fit.sample(50)
    assert rows["x"].shape == (50,) and abs(float(rows["x"].mean()) - MEAN) < 5 * (SD**2 + 1 / 50) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_evidence_is_that_of_the_posterior(kind: str) -> None:
    """log N(x_i; m, 1 + s^2) is exact; the mean over rows moves by about (x - m) s / sqrt(1000) for a draw: 1e-2."""
    found = fitted(kind).evidence(draws=1000)
    exact = float(dist.Normal(MEAN, math.sqrt(1 + SD**2)).log_prob(X).mean())
    assert found.mean == pytest.approx(exact, abs=1e-2) and found.mc_stderr < 5e-3
    assert ("weigh" in found.kind or "guide" in found.kind) is False
    assert ("the nodes taken for the posterior" in found.kind) is (kind == "grid"), found.kind
    assert (found.guide_gap is not None) is (kind == "closed_form"), "only what has a density is weighed"


def test_marginal_likelihood_needs_a_density() -> None:
    covariance = torch.eye(20, dtype=torch.float64) + 100.0
    exact = float(torch.distributions.MultivariateNormal(torch.zeros(20).double(), covariance).log_prob(X))
    found = fitted("closed_form").marginal_likelihood()
    assert found.mean == pytest.approx(exact, abs=1e-6), "every weight of the exact posterior is p(x)"
    for kind in ("grid", "ensemble"):
        with pytest.raises(pg.IncompatibleError, match="no density over the globals"):
            fitted(kind).marginal_likelihood()


@pytest.mark.parametrize(
    ("kind", "grade", "said", "not_said"),
    [
        ("closed_form", "trust", "k", "R-hat"),
        (
            "grid",
            "doubtful",
            "the nodes have no density, so there is no k-hat; apart from that, no problem",
            "chains agree",
        ),
        ("ensemble", "trust", "4 chains agree", "k-hat"),
    ],
)
def test_each_is_judged_by_what_can_tell(kind: str, grade: str, said: str, not_said: str) -> None:
    fit = fitted(kind)
    frame = fit.diagnose()
    assert fit.verdict.grade == grade and said in str(fit.verdict) and not_said not in str(fit.verdict)
    assert ("r_hat" in frame.columns) is (kind == "ensemble")
    assert math.isfinite(frame.attrs["pareto_k"]) is (kind == "closed_form")
    assert frame.loc["loc", "mean"] == pytest.approx(MEAN, abs=0.15 * SD)
    assert pg.fit(normal_mean, X, Exact(kind, wider=3.0), progress=False).verdict.grade == (
        "do not trust" if kind != "ensemble" else "trust"
    ), "agreement is all that chains are asked for"


@pytest.mark.parametrize("kind", KINDS)
def test_arviz_gets_what_there_is(kind: str) -> None:
    tree = fitted(kind).to_arviz(draws=200)
    assert tree["posterior"]["loc"].shape == ((4, 500) if kind == "ensemble" else (1, 200))
    stats = set(tree["sample_stats"].data_vars) if hasattr(tree, "sample_stats") else set()
    assert stats == {"closed_form": {"log_p", "log_q"}, "grid": set(), "ensemble": {"accepted"}}[kind]
    assert tree.attrs["kind"] == kind and tree["log_likelihood"]["x"].shape[-1] == 20


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_brings_it_back_without_its_algorithm(kind: str, tmp_path: Path) -> None:
    fit = fitted(kind)
    assert held_whole(type(fit.learned)) and kind_named(kind) is type(fit.learned)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = fit.save(tmp_path / "kept")
        back = pg.load(path, program=normal_mean)
    assert type(back.learned) is type(fit.learned)
    assert torch.equal(back.posterior(draws=20)["loc"], fit.posterior(draws=20)["loc"])
    assert back.evidence(draws=50).mean == fit.evidence(draws=50).mean
    assert back.verdict == fit.verdict
    if kind == "closed_form":
        assert back.marginal_likelihood().mean == fit.marginal_likelihood().mean
    assert back.cost == fit.cost, "words that an algorithm says of its costs come back too"
    again = pg.load(back.save(tmp_path / "again"), program=normal_mean)
    assert torch.equal(again.posterior(draws=20)["loc"], fit.posterior(draws=20)["loc"])
    alone = pg.load(path)
    assert alone.to_arviz()["posterior"]["loc"].size >= 1000


def test_chains_without_a_diagnosis_are_diagnosed_without_their_program(tmp_path: Path) -> None:
    fit = pg.fit(normal_mean, X, Exact("ensemble"), progress=False)
    frame = pg.load(fit.save(tmp_path / "kept")).diagnose()
    assert "r_hat" in frame.columns and frame.attrs["verdict"].startswith("trust: 4 chains agree")


def test_a_point_of_ones_own_is_a_point() -> None:
    class Mode(Grid):
        @property
        def point(self) -> Any:
            return {"loc": self.nodes[self.weights.argmax()]}

    @dataclass(frozen=True)
    class AtTheMode(Algorithm):
        needs = ()

        def run(self, run: Run) -> Outcome:
            nodes = torch.tensor([MEAN - 1.0, MEAN, MEAN + 1.0], dtype=run.dtype)
            return Outcome(Mode(nodes, torch.tensor([0.0, 1.0, 0.0])))

    fit = pg.fit(normal_mean, X, AtTheMode(), progress=False)
    assert fit.point is not None and float(fit.point["loc"]) == pytest.approx(MEAN) and fit.judged_by is None
    found = fit.evidence()
    assert found.exact and "given one value of loc" in found.kind
    assert found.mean == pytest.approx(float(dist.Normal(MEAN, 1.0).log_prob(X).mean()), abs=1e-6)


def test_tables_and_reports_show_them_beside_others(tmp_path: Path) -> None:
    algorithms: dict[str, Algorithm] = {kind: Exact(kind) for kind in KINDS}
    algorithms["NUTS"] = NUTS(draws=200, warmup=200, chains=2, processes=1)
    comparison = pg.compare(normal_mean, X, algorithms, holdout=0, progress=False)
    table = comparison.table().set_index("algorithm")
    assert list(table["status"]) == ["finished"] * 4 and table["in_sample"].notna().all()
    assert table.loc["grid", "verdict"].startswith("doubtful") and table.loc["closed_form", "verdict"].startswith(
        "trust"
    )
    apart = comparison.posteriors(reference="closed_form").set_index("algorithm")
    assert apart.loc["grid", "sd_ratio"] == pytest.approx(1.0, abs=0.25)
    page = comparison.report(tmp_path / "page.html").read_text()
    assert all(kind in page for kind in KINDS) and "he nodes have no density" in page
