"""Posteriors of a class of one's own, whose draws have no density, and algorithms that say nothing of their end."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

import ppl_gen as pg
from ppl_gen.extending import Outcome, PointPosterior, Posterior, ProgramInfo, Run
from ppl_gen.inference import NUTS, SVI, Algorithm, Iterative

X = torch.linspace(2.0, 4.0, 20, dtype=torch.float64)
MEAN, SD = float(X.sum()) / 20.01, 20.01**-0.5  # of the posterior of `normal_mean`


def normal_mean(x: torch.Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


class Kept(Posterior):
    """Particles, picked evenly from first to last: a single draw is always the first."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values, self.asked = values, list[int]()

    def draw(self, count: int, batch: Any) -> list[dict[str, torch.Tensor]]:
        self.asked.append(count)
        places = torch.linspace(0, len(self.values) - 1, count).round().long()
        return [{"loc": self.values[i]} for i in places]


@dataclass(frozen=True)
class Particles(Algorithm):
    """Quantiles of the posterior of `normal_mean`, ``wider`` than it by so many times and off by so many of its sds."""

    wider: float = 1.0
    off: float = 0.0
    needs = (("data plate",),)

    def run(self, run: Run) -> Outcome:
        u = (torch.arange(2000, dtype=run.dtype) + 0.5) / 2000
        return Outcome(Kept(MEAN + SD * (self.off + self.wider * dist.Normal(0.0, 1.0).icdf(u))))


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pg.FitWarning)
        yield


def test_own_draws_are_summarised_from_all_of_them_asked_for_at_once() -> None:
    fit = pg.fit(normal_mean, X, Particles())
    table = fit.diagnose(draws=800)
    asked = fit.learned.asked
    assert 800 in asked and sum(asked) < 800 + 500, f"draws one at a time are all the same here: {asked}"
    assert table.loc["loc", "mean"] == pytest.approx(MEAN, abs=0.01 * SD)
    assert table.loc["loc", "sd"] == pytest.approx(SD, rel=0.02)
    posterior = fit.to_arviz(draws=200)["posterior"]["loc"]
    assert posterior.shape == (1, 200) and float(posterior.std()) == pytest.approx(SD, rel=0.05)


def test_a_verdict_on_own_draws_says_what_cannot_be_judged() -> None:
    """Means of 200 chains are known to 0.07 sd, sds to 5 %: the limits of 0.35 sd and 1.35 times are 5 of that away."""
    found = pg.fit(normal_mean, X, Particles()).verdict
    assert found.grade == "doubtful" and "no k-hat" in found.reason and "200 short chains from them" in found.reason
    assert "apart from that, no problem was found" in found.reason


@pytest.mark.parametrize(
    ("algorithm", "grade", "words"),
    [
        (Particles(wider=3.0), "do not trust", "its sd of loc is "),
        (Particles(wider=0.0), "do not trust", "times the posterior's"),
        (Particles(off=2.0), "do not trust", "its mean of loc is "),
    ],
)
def test_wrong_draws_are_found_by_short_chains(algorithm: Particles, grade: str, words: str) -> None:
    found = pg.fit(normal_mean, X, algorithm).verdict
    assert found.grade == grade and words in found.reason, found


def test_draws_of_a_program_without_density_are_not_judged() -> None:
    def simulator(x: torch.Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            noise = pyro.sample("noise", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Delta(loc + noise), obs=x)

    found = pg.fit(simulator, X, Particles()).verdict
    assert found.grade == "doubtful" and "not judged" in found.reason and "no density" in found.reason


def test_own_draws_are_compared_with_chains() -> None:
    algorithms = {"own": Particles(wider=3.0), "NUTS": NUTS(draws=300, warmup=200, chains=2, processes=1)}
    own = pg.compare(normal_mean, X, algorithms, holdout=0).table().set_index("algorithm").loc["own"]
    # 600 draws of NUTS, at worst 150 effective: its mean is known to 0.08 sd, its sd to 6 %.
    assert abs(own["shift_sd"]) < 0.45 and 2.3 < own["sd_ratio"] < 4.0 and own["verdict"].startswith("do not trust")


def test_own_draws_are_saved(tmp_path: Any) -> None:
    fit = pg.fit(normal_mean, X, Particles())
    with pytest.warns(UserWarning, match="the posterior of this fit is a Kept"):
        fit.save(tmp_path / "own")
    drawn = pg.load(tmp_path / "own").to_arviz()["posterior"]["loc"]
    assert drawn.shape == (1, 1000) and float(drawn.std()) == pytest.approx(SD, rel=0.02)


@dataclass(frozen=True)
class Mean(Iterative):
    """Half way to the mean at each step."""

    steps: int = 5
    needs = (("data plate",),)

    def init(self, run: Run) -> torch.Tensor:
        assert isinstance(run.info, ProgramInfo)
        return torch.zeros((), dtype=run.dtype)

    def step(self, state: torch.Tensor, source: Any) -> Any:
        state = (state + source.next().args[0].mean()) / 2
        return state, {"mean": state}

    def limit(self, run: Run) -> int:
        return self.steps

    def outcome(self, state: torch.Tensor, run: Run) -> Outcome:
        return Outcome(PointPosterior({"loc": state}))


@dataclass(frozen=True)
class MeanWithARule(Mean):
    def stop(self, history: Any) -> str | None:
        last = history["mean"][-2:]
        return "it moved by less than 1e-6" if len(last) == 2 and abs(float(last[1] - last[0])) < 1e-6 else None


def learned_scale(x: torch.Tensor) -> None:
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, scale), obs=x)


def test_only_who_has_a_criterion_is_told_that_it_was_not_met(tmp_path: Any) -> None:
    without, unmet = pg.fit(normal_mean, X, Mean()), pg.fit(normal_mean, X, MeanWithARule())
    assert "criterion" not in str(without.verdict) and "nothing shows whether" in without.verdict.reason
    assert "before its own criterion of convergence was met" in unmet.verdict.reason
    assert pg.fit(normal_mean, X, MeanWithARule(steps=50)).verdict.trusted
    assert "so few steps" in pg.fit(learned_scale, X, SVI(steps=5)).verdict.reason
    for name, fit in (("without", without), ("unmet", unmet)):
        fit.save(tmp_path / name)
        assert pg.load(tmp_path / name, program=normal_mean).verdict == fit.verdict
