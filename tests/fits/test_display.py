"""What notebooks show: well-formed HTML, every name escaped, and something to show however a fit ended."""

from __future__ import annotations

import math
from html.parser import HTMLParser

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import ppl_gen as pg
from ppl_gen.fits.display import _curve
from ppl_gen.inference import CAVI, EM, NUTS, SVI
from ppl_gen.models import gan, gaussian_mixture

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")  # chains and guides are short on purpose

BAD = "<script>alert('x')</script>"
_VOID = {"br", "img", "hr", "polyline"}


class Reader(HTMLParser):
    """Collects tags, attributes and text, and fails where a tag is not closed by its own."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes what it did not open"

    def handle_data(self, data: str) -> None:
        self.text += data


def read(thing: object) -> Reader:
    reader = Reader()
    reader.feed(thing._repr_html_())
    reader.close()
    assert not reader.open, f"left open: {reader.open}"
    assert "script" not in reader.tags, "a name became markup"
    assert not [name for name, _ in reader.attributes if name in ("src", "href") or name.startswith("on")]
    assert "url(" not in thing._repr_html_(), "nothing is fetched"
    return reader


def normal(x: torch.Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def named(x: torch.Tensor) -> None:
    loc = pyro.sample(f"loc{BAD}", dist.Normal(0.0, 10.0))
    pyro.param(f"weight{BAD}", torch.ones(2))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


ROWS = torch.linspace(-1.0, 1.0, 12)


def test_the_reader_notices_what_it_is_there_for() -> None:
    class Broken:
        def _repr_html_(self) -> str:
            return "<b><i></b>"

    class Loud:
        def _repr_html_(self) -> str:
            return BAD

    for thing in (Broken(), Loud()):
        with pytest.raises(AssertionError):
            read(thing)


def test_a_program_shows_what_it_declares_and_what_not() -> None:
    plain = read(pg.Program(normal, guide=AutoNormal))
    assert "Program normal" in plain.text and "guide (AutoNormal)" in plain.text
    assert "declares" in plain.text and "nothing beyond its model" in plain.text
    assert "density" not in plain.text, "what only the data show is not claimed"
    mixture = read(gaussian_mixture(components=2)(torch.randn(30)))
    declared, _, lacking = mixture.text.partition("does not declare")
    assert "EM steps" in declared and "CAVI updates" in declared
    assert "energy" in lacking and "EM steps" not in lacking


def test_a_check_shows_sites_and_what_is_missing() -> None:
    shown = read(pg.check(normal, ROWS))
    assert "data plate 'data' over 12 rows" in shown.text and "Normal" in shown.text
    offers, _, lacks = shown.text.partition("lacks")
    assert "density" in offers and "EM steps" in lacks and "density" not in lacks


@pytest.mark.parametrize(
    ("program", "algorithm", "expected"),
    [
        (gaussian_mixture(components=2), EM(steps=5), ("log_likelihood", "loc_standard", "M-step")),
        (gaussian_mixture(components=2), CAVI(steps=5), ("elbo", "loc_mean", "spread")),
        (gaussian_mixture(components=2), NUTS(draws=8, warmup=8, chains=1), ("none was kept", "mean ± sd", "weights")),
        (gaussian_mixture(components=2), SVI(steps=5), ("program_loss", "AutoNormal.locs", "gradients")),
        (gan(1, latent=2, hidden=(4,)), SVI(objective=pg.inference.Adversarial(), steps=3), ("critic", "generator$$$")),
    ],
    ids=["point", "coordinate ascent", "chains", "guide", "implicit"],
)
def test_every_kind_of_fit_is_shown(program: pg.Recipe, algorithm: object, expected: tuple[str, ...]) -> None:
    rows = ROWS.unsqueeze(-1) if program.name == "gan" else ROWS.double()
    fit = pg.fit(program, rows, algorithm, seed=3)
    shown = read(fit)
    assert f"Fit of {program.name}" in shown.text and "seed 3" in shown.text and str(fit.status) in shown.text
    assert fit.message in shown.text and " s" in shown.text
    for word in expected:
        assert word in shown.text, word
    assert ("svg" in shown.tags) == bool(fit.records), "a history is drawn where there is one"


def test_names_are_escaped_everywhere() -> None:
    program = pg.Program(named, name=f"mine{BAD}")
    fit = pg.fit(program, ROWS, SVI(steps=2), seed=0)
    comparison = pg.compare(program, ROWS, {f"short{BAD}": SVI(steps=2)}, holdout=0.25)
    for thing in (program, pg.check(program, ROWS), fit, comparison):
        shown = read(thing)
        assert BAD in shown.text, f"{type(thing).__name__} shows the name as text"
        assert BAD not in thing._repr_html_()


def test_a_partial_fit_is_shown() -> None:
    def interrupt(step: int, info: object) -> None:
        if step == 3:
            raise KeyboardInterrupt

    fit = pg.fit(normal, ROWS, SVI(steps=100), seed=0, callbacks=[interrupt])
    assert fit.status is pg.Status.INTERRUPTED
    shown = read(fit)
    assert "interrupted" in shown.text and "after 3 steps" in shown.text


def test_a_diverged_fit_is_shown() -> None:
    factor = {"loc": 1.0}

    def breaks(x: torch.Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc * factor["loc"], 1.0), obs=x)

    def poison(step: int, info: object) -> None:
        factor["loc"] = math.inf if step == 3 else 1.0

    with pytest.raises(pg.NonFiniteError) as caught:
        pg.fit(breaks, ROWS, SVI(steps=100), seed=0, callbacks=[poison])
    fit = caught.value.fit
    assert fit is not None and fit.status is pg.Status.DIVERGED
    assert "diverged" in read(fit).text


def test_a_saved_fit_is_shown_after_loading(tmp_path) -> None:
    fit = pg.fit(normal, ROWS, SVI(steps=4), seed=0)
    loaded = pg.load(fit.save(tmp_path / "fit"), program=normal)
    assert "program_loss" in read(loaded).text


def test_a_comparison_shows_the_answer_the_table_and_the_verdicts() -> None:
    algorithms = {"good": SVI(steps=600, lr=0.05), "short": SVI(steps=1), "refused": EM()}
    result = pg.compare(normal, ROWS + 4.0, algorithms, holdout=0.25)
    shown = read(result)
    assert "caption" in shown.tags and "held-out rows" in shown.text
    assert "good predicts best" in shown.text
    assert result["good"].diagnose(draws=500).attrs["verdict"].split(":")[0] in shown.text
    assert "does not fit the program" in shown.text, "a refusal says why"
    in_sample = pg.compare(normal, ROWS, {"only": SVI(steps=2)}, holdout=0)
    assert "training rows" in read(in_sample).text


def test_the_curve_leaves_gaps_for_what_is_not_finite() -> None:
    assert _curve("loss", [math.nan, math.inf]) == "" and _curve("loss", [1.0]) == ""
    flat = _curve("loss", [1.0, 1.0, math.nan, 1.0])
    assert flat.count(",") >= 3 and "nan" not in flat
    long = _curve("loss", [float(i) for i in range(100_000)])
    assert len(long) < 4000, "a long history stays small"
    heights = [float(pair.split(",")[1]) for pair in long.split('points="')[1].split('"')[0].split()]
    assert heights == sorted(heights, reverse=True), "a rising history rises"
