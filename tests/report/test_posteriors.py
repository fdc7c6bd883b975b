"""Where posteriors differ: fits of a known Normal posterior, shifted, scaled, collapsed to a point, relabelled."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas
import pyro
import pyro.distributions as dist
import pytest
import torch

import ppl_gen as pg
from ppl_gen.comparison.runner import Line
from ppl_gen.diagnostics.verdicts import Verdict
from ppl_gen.fitting.algorithm import Algorithm
from ppl_gen.fitting.posteriors.chains import ChainPosterior
from ppl_gen.fitting.posteriors.points import PointPosterior
from ppl_gen.fitting.run import Ending, Outcome
from ppl_gen.report.posteriors import apart, posterior_words
from ppl_gen.report.table import answer

DRAWS = 500
#: The law of the draws below is that of a standard normal's quantiles: mean 0 exactly, and this sd.
QUANTILES = dist.Normal(0.0, 1.0).icdf((torch.arange(DRAWS) + 0.5).double() / DRAWS)
SD = float(QUANTILES.std())


def model(x):
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 10.0).to_event(1))
    pyro.deterministic("twice", 2 * loc)
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc.sum(), 1.0), obs=x)


@dataclass(frozen=True)
class Drawn(Algorithm):
    """Chains whose draws are known: components at ``means``, of sds ``scales``."""

    means: tuple[float, float] = (0.0, 5.0)
    scales: tuple[float, float] = (1.0, 1.0)
    needs = ()

    def run(self, run):
        shuffled = torch.stack([QUANTILES[torch.randperm(DRAWS)] for _ in range(2)], -1)
        draws = torch.tensor(self.means).double() + torch.tensor(self.scales).double() * shuffled
        return Outcome(ChainPosterior({"loc": draws[None]}))


@dataclass(frozen=True)
class Point(Algorithm):
    at: tuple[float, float] = (0.0, 5.0)
    needs = ()

    def run(self, run):
        return Outcome(
            PointPosterior({"loc": torch.tensor(self.at).double()}), ending=Ending("converged", "it stands there")
        )


def by_first(draws):
    return {"loc": draws["loc"].sort(-1).values}


def compared(grades=None, relabel=None, **algorithms):
    """A comparison of fits with given grades (trusted unless told otherwise)."""
    x = torch.linspace(4.0, 6.0, 10, dtype=torch.float64)
    program = pg.Program(model, relabel=relabel)
    lines = []
    for label, algorithm in algorithms.items():
        fit = pg.fit(program, x, algorithm, seed=0)
        verdict = Verdict((grades or {}).get(label, "trust"), "told so")
        lines.append(
            Line(label, 0, str(fit.status), fit.message, fit.cost["seconds"], fit, fit.evidence(x, draws=20), verdict)
        )
    return pg.Comparison(tuple(lines), "model")


def test_shift_and_ratio_are_in_sds_of_the_reference() -> None:
    comparison = compared(chains=Drawn(scales=(1.0, 2.0)), other=Drawn(means=(1.5, 5.0), scales=(1.0, 0.5)))
    frame = comparison.posteriors("chains").set_index(["algorithm", "quantity"])
    assert set(frame["reference"]) == {"chains"} and len(frame) == 8
    for quantity, shift, ratio in [("loc[0]", 1.5, 1.0), ("loc[1]", 0.0, 0.25), ("twice[0]", 1.5, 1.0)]:
        row = frame.loc[("other", quantity)]
        # Draws are quantiles in another order: sums differ by rounding.
        assert row["shift_sd"] == pytest.approx(shift / SD, abs=1e-9) and row["sd_ratio"] == pytest.approx(ratio, 1e-9)
    table = comparison.table("chains").set_index("algorithm")
    assert table.loc["other", "shift_sd"] == pytest.approx(1.5 / SD, rel=1e-9)
    assert table.loc["other", "sd_ratio"] == pytest.approx(0.25, rel=1e-9), "the worst of all numbers"
    assert tuple(table.loc["chains", ["shift_sd", "sd_ratio"]]) == (0.0, 1.0)
    backwards = comparison.table("other").set_index("algorithm")
    assert backwards.loc["chains", "sd_ratio"] == pytest.approx(4.0, rel=1e-9)


def test_the_reference_is_the_most_trusted_chains() -> None:
    three = {"first": Drawn(), "second": Drawn(), "point": Point()}
    assert set(compared(**three).posteriors()["reference"]) == {"first"}
    assert set(compared({"first": "doubtful"}, **three).posteriors()["reference"]) == {"second"}
    doubtful = compared({"first": "doubtful", "second": "do not trust"}, first=Drawn(), second=Drawn(means=(9.0, 5.0)))
    assert "compared with first (itself doubtful), second is off by +9.0 sd in" in posterior_words(doubtful)
    none = compared({"first": "do not trust", "second": "do not trust"}, **three)
    assert set(none.posteriors()["reference"]) == {""} and none.posteriors()["sd_ratio"].isna().all()
    assert "No chains can serve as a reference" in answer(none)
    assert none.table()["shift_sd"].isna().all()


def test_the_answer_says_which_posterior_differs_and_how() -> None:
    words = posterior_words(compared(chains=Drawn(), narrow=Drawn(scales=(0.2, 1.0)), wide=Drawn(scales=(1.0, 3.0))))
    assert "narrow is 5.0 times too narrow in" in words and "wide is 3.0 times too wide in" in words
    alike = compared(chains=Drawn(), same=Drawn(means=(0.4, 5.0), scales=(1.5, 0.7)))
    assert posterior_words(alike).startswith("Posteriors agree with chains") and "differ" not in answer(alike)
    assert "Posteriors differ" in answer(compared(chains=Drawn(), off=Drawn(means=(0.0, 4.0))))
    assert "is off by \N{MINUS SIGN}1.0 sd" in answer(compared(chains=Drawn(), off=Drawn(means=(0.0, 4.0))))


def test_a_point_has_a_shift_and_no_ratio() -> None:
    comparison = compared(chains=Drawn(), em=Point((0.0, 7.0)))
    found = apart(comparison)["em", 0]
    assert found.point and found.shift == pytest.approx(2.0 / SD, rel=1e-9) and math.isnan(found.ratio)
    assert "em is off by +2.0 sd" in posterior_words(comparison) and "em is a point" in posterior_words(comparison)
    assert math.isnan(comparison.table().set_index("algorithm").loc["em", "sd_ratio"])
    assert posterior_words(compared(em=Point(), other=Point())) == "", "nothing there has a width"


def test_exchangeable_components_are_brought_into_one_order() -> None:
    apart_as_drawn = compared(chains=Drawn(), swapped=Point((5.0, 0.0)))
    assert apart(apart_as_drawn)["swapped", 0].shift == pytest.approx(5.0 / SD, rel=0.2)
    ordered = compared(relabel=by_first, chains=Drawn(scales=(0.1, 0.1)), swapped=Point((5.0, 0.0)))
    assert abs(apart(ordered)["swapped", 0].shift) < 1e-9


def test_no_praise_without_reserve() -> None:
    both = compared({"b": "doubtful"}, a=Drawn(), b=Drawn())
    assert "only a is trusted" in answer(both) or "a predicts best" in answer(both)
    neither = compared({"a": "doubtful", "b": "doubtful"}, a=Drawn(), b=Drawn())
    assert "none of them is trusted" in answer(neither)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("em", "'em' has no posterior with a width"),
        ("nobody", r"expected one of 'chains', 'em', got 'nobody'"),
    ],
)
def test_refuses_what_is_no_reference(reference, message) -> None:
    comparison = compared(chains=Drawn(), em=Point())
    for question in (comparison.posteriors, comparison.table):
        with pytest.raises(ValueError, match=f"reference: .*{message}"):
            question(reference)


def test_the_report_shows_them(tmp_path) -> None:
    comparison = compared(chains=Drawn(), narrow=Drawn(scales=(0.2, 1.0)))
    page = comparison.report(tmp_path / "report.html").read_text()
    assert "5.0 times too narrow" in page and "Means and sds of posteriors in sds of chains" in page
    assert "Sd ratio" in page and "sd ratio" in repr(comparison)
    assert "sd ratio" in comparison._repr_html_()
    assert isinstance(comparison.posteriors(), pandas.DataFrame)


def test_sentences_fit_a_narrow_terminal(monkeypatch) -> None:
    both = compared(chains=Drawn(), narrow=Drawn(scales=(0.2, 1.0)))
    monkeypatch.setenv("COLUMNS", "80")
    sentences = [line for line in str(both).splitlines() if "  " not in line.strip()]
    assert sentences and max(map(len, sentences)) <= 80
    monkeypatch.setenv("COLUMNS", "300")
    assert max(map(len, str(both).splitlines())) <= 100
