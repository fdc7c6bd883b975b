"""Kinds of posterior that the package does not know go through every question by the methods of `Posterior` alone."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

import ppl_gen as pg
from ppl_gen.extending import ChainPosterior, DrawsPosterior, Outcome, Posterior, Run
from ppl_gen.fitting.posteriors.kinds import held_whole, kind_named
from ppl_gen.inference import NUTS, Algorithm

X = torch.linspace(2.0, 4.0, 20, dtype=torch.float64)
MEAN, SD = float(X.sum()) / 20.01, 20.01**-0.5  # of the posterior of `normal_mean`


def normal_mean(x: torch.Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


class ClosedForm(Posterior):
    """A normal distribution, given by two numbers: it has a density, and so weights."""

    kind, noun, independent = "closed_form", "closed form", True
    parts = ("normal",)

    def __init__(self, loc: torch.Tensor, scale: torch.Tensor) -> None:
        self.loc, self.scale = loc, scale

    def draw(self, count: int, batch: Any) -> list[dict[str, torch.Tensor]]:
        return [{"loc": dist.Normal(self.loc, self.scale).sample()} for _ in range(count)]

    @property
    def proposal(self) -> Any:
        return self.guide

    def guide(self, *args: Any, **kwargs: Any) -> None:
        pyro.sample("loc", dist.Normal(self.loc, self.scale))

    def tensors(self) -> Any:
        return {"normal": {"loc": self.loc, "scale": self.scale}}

    @classmethod
    def rebuilt(cls, parts: Any, guide: Any) -> ClosedForm:
        return cls(**parts["normal"])


class Grid(Posterior):
    """Nodes and their probabilities: draws of which there is no density."""

    kind, noun = "grid", "nodes"
    parts = ("grid",)

    def __init__(self, nodes: torch.Tensor, weights: torch.Tensor) -> None:
        self.nodes, self.weights = nodes, weights

    def draw(self, count: int, batch: Any) -> list[dict[str, torch.Tensor]]:
        return [{"loc": self.nodes[i]} for i in torch.multinomial(self.weights, count, replacement=True)]

    def tensors(self) -> Any:
        return {"grid": {"nodes": self.nodes, "weights": self.weights}}

    @classmethod
    def rebuilt(cls, parts: Any, guide: Any) -> Grid:
        return cls(parts["grid"]["nodes"], parts["grid"]["weights"])


class Ensemble(Posterior):
    """Walkers, each a chain, that say how often they moved."""

    kind, noun = "ensemble", "walkers"
    parts = ("walkers", "moves")

    def __init__(self, walkers: torch.Tensor, moves: torch.Tensor) -> None:
        self.walkers, self.stats = walkers, {"accepted": moves}

    def draw(self, count: int, batch: Any) -> list[dict[str, torch.Tensor]]:
        flat = self.walkers.flatten(0, 1)
        return [{"loc": flat[i]} for i in torch.linspace(0, len(flat) - 1, min(count, len(flat))).round().long()]

    def by_chain(self) -> Any:
        return {"loc": self.walkers}

    @property
    def judged_by(self) -> Any:
        return "chains"

    def tensors(self) -> Any:
        return {"walkers": {"loc": self.walkers}, "moves": self.stats}

    @classmethod
    def rebuilt(cls, parts: Any, guide: Any) -> Ensemble:
        return cls(parts["walkers"]["loc"], parts["moves"]["accepted"])


@dataclass(frozen=True)
class Exact(Algorithm):
    """The exact posterior of `normal_mean`, ``wider`` than it by so many times, as one kind or another."""

    kind: str
    wider: float = 1.0
    needs = (("data plate",),)

    def run(self, run: Run) -> Outcome:
        loc, sd = torch.tensor(MEAN, dtype=run.dtype), torch.tensor(SD * self.wider, dtype=run.dtype)
        if self.kind == "closed_form":
            return Outcome(ClosedForm(loc, sd))
        if self.kind == "grid":
            nodes = loc + sd * torch.linspace(-4.0, 4.0, 801, dtype=run.dtype)
            return Outcome(Grid(nodes, dist.Normal(loc, sd).log_prob(nodes).exp()))
        walkers = loc + sd * torch.randn(4, 500, dtype=run.dtype)
        return Outcome(Ensemble(walkers, torch.ones(4, 500)))


KINDS = ("closed_form", "grid", "ensemble")
FITS: dict[str, pg.Fit] = {}


def fitted(kind: str) -> pg.Fit:
    if kind not in FITS:
        FITS[kind] = pg.fit(normal_mean, X, Exact(kind), seed=0, progress=False)
    return FITS[kind]


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
    again = pg.load(back.save(tmp_path / "again"), program=normal_mean)
    assert torch.equal(again.posterior(draws=20)["loc"], fit.posterior(draws=20)["loc"])
    alone = pg.load(path)
    assert alone.to_arviz()["posterior"]["loc"].size >= 1000


def test_chains_without_a_diagnosis_are_diagnosed_without_their_program(tmp_path: Path) -> None:
    fit = pg.fit(normal_mean, X, Exact("ensemble"), progress=False)
    frame = pg.load(fit.save(tmp_path / "kept")).diagnose()
    assert "r_hat" in frame.columns and frame.attrs["verdict"].startswith("trust: 4 chains agree")


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
