"""The report: one file that needs nothing beside it, says what happened, and is drawn from the right numbers."""

from __future__ import annotations

import base64
import os
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from importlib import resources

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import ppl_gen as pg
from ppl_gen.inference import SVI
from ppl_gen.report.draws import Scalar, distinct, global_scalars, replicates
from ppl_gen.report.html import page
from ppl_gen.report.plots import bins, draw_predictive, smoothed


def plane(x):
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 10.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    pyro.deterministic("twice", 2 * scale)
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)


class Broken(SVI):
    def run(self, run):
        raise RuntimeError("<gave up> & left")


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def comparison():
    x = torch.randn(60, 2, generator=torch.Generator().manual_seed(0)) + 1
    algorithms = {"<good>": SVI(steps=300, lr=0.05), "short": SVI(steps=3), "broken": Broken(), "wild": SVI(lr=1e30)}
    return pg.compare(plane, x, algorithms)


@pytest.fixture(scope="module")
def html(comparison):
    return page(comparison)


def test_the_file_needs_nothing_beside_it(html) -> None:
    parsed = Page(html)
    names = {"src", "href", "srcset", "data", "action", "poster", "xlink:href"}
    references = [value for _, attributes in parsed.tags for name, value in attributes.items() if name in names]
    assert references and all(value.startswith("data:image/svg+xml;base64,") for value in references)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in parsed.tags}
    assert "http" not in html and "url(" not in html and "@import" not in html


def test_pictures_are_sound_and_described(html) -> None:
    images = Page(html).all("img")
    # Held-out values; curves of the two fits that went well and of none that did not; loc[0], loc[1] and the scale
    # (its double is left out); replicates of two fits.
    assert len(images) == 1 + 2 + 3 + 2
    for image in images:
        assert len(image["alt"]) > 20, image["alt"]
        root = ET.fromstring(base64.b64decode(image["src"].split(",", 1)[1]))
        assert root.tag.endswith("svg")
        links = [v for e in root.iter() for k, v in e.attrib.items() if k.endswith("href")]
        assert all(link.startswith(("#", "data:")) for link in links)


def test_the_page_has_a_sound_outline(html) -> None:
    parsed = Page(html)
    levels = [int(tag[1]) for tag, _ in parsed.tags if tag in ("h1", "h2", "h3")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
    assert parsed.all("html")[0]["lang"] == "en"
    assert any(meta.get("name") == "viewport" for meta in parsed.all("meta"))
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert all(section["aria-labelledby"] in ids for section in parsed.all("section"))


def test_it_says_what_was_found(html, comparison) -> None:
    parsed = Page(html)
    assert "<good> predicts best" in parsed.text
    table = comparison.table()
    assert f"{table['heldout'][0]:.4f}".replace("-", "\N{MINUS SIGN}") in parsed.text
    assert table["verdict"][1].split(": ", 1)[1][1:] in parsed.text
    assert "RuntimeError: <gave up> & left" in parsed.text and "not finite" in parsed.text
    for name in (
        "torch",
        "pyro-ppl",
        "arviz",
        "Python",
        "ppl_gen 0",
        "48 rows to train on, 12 held out",
        "pg.compare(",
    ):
        assert name in parsed.text
    assert len(parsed.all("tr")) >= 5 and "Traceback" in parsed.text


def test_text_of_the_user_is_escaped(html) -> None:
    assert "<good>" not in html and "<gave up>" not in html and "&lt;good&gt;" in html


def test_report_writes_in_one_step(comparison, tmp_path, monkeypatch) -> None:
    path = comparison.report(tmp_path / "deep" / "r.html")
    assert path.is_absolute() and path.read_text().startswith("<!DOCTYPE html>")
    kept = path.read_text()

    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk is full"):
        comparison.report(path)
    assert path.read_text() == kept and [p.name for p in path.parent.iterdir()] == ["r.html"]


def test_pictures_leave_matplotlib_alone(comparison) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    before, backend = dict(matplotlib.rcParams), matplotlib.get_backend()
    figure = comparison.plot()
    page(comparison)
    assert isinstance(figure, Figure) and len(figure.axes) == 3, "held-out values and two curves"
    assert dict(matplotlib.rcParams) == before and matplotlib.get_backend() == backend
    import matplotlib.pyplot

    assert matplotlib.pyplot.get_fignums() == []


def test_a_picture_that_fails_becomes_text(comparison, monkeypatch) -> None:
    def fail(*_, **__):
        raise RuntimeError("no replicates today")

    monkeypatch.setattr("ppl_gen.report.html.replicates", fail)
    monkeypatch.setattr("ppl_gen.report.html.global_scalars", fail)
    text = Page(page(comparison)).text
    assert "short: no replicates (RuntimeError: no replicates today)" in text
    assert "short: no draws of the global sites" in text


def test_a_report_of_nothing_but_failures() -> None:
    comparison = pg.compare(plane, torch.zeros(20, 2), {"broken": Broken()})
    parsed = Page(page(comparison))
    assert "No algorithm gave a value that could be compared." in parsed.text and not parsed.all("img")
    assert len(comparison.plot().axes) == 1


def test_in_sample_is_said_at_the_top() -> None:
    comparison = pg.compare(plane, torch.randn(20, 2), {"a": SVI(steps=3), "b": SVI(steps=4)}, holdout=0)
    text = page(comparison)
    assert "In-sample values favour maximum likelihood by construction" in text[: text.index("</header>")]


def test_the_template_travels_with_the_package() -> None:
    assert resources.files("ppl_gen.report").joinpath("template.html.j2").is_file()


# Numbers behind the pictures.


def test_scalars_are_draws_of_the_posterior(comparison) -> None:
    fit = comparison["<good>"]
    scalars = global_scalars(fit, 2000)
    assert list(scalars) == ["twice", "loc[0]", "loc[1]", "scale"], "in the user's units first"
    expected = fit.posterior(draws=2000)
    # Two samples of 2000 draws: the means differ by less than 5 sd * sqrt(2 / 2000), a false alarm in 2 million.
    for name, values in (("loc[1]", expected["loc"][:, 1]), ("twice", 2 * expected["scale"])):
        assert abs(scalars[name].mean() - float(values.mean())) < 5 * float(values.std()) * (2 / 2000) ** 0.5
    assert np.allclose(scalars["twice"], 2 * scalars["scale"])


def test_a_point_estimate_is_one_draw() -> None:
    def model(x):
        loc = pyro.param("loc", torch.zeros(()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    fit = pg.fit(model, torch.ones(10), SVI(steps=3))
    scalars = global_scalars(fit)
    assert list(scalars) == ["loc"] and scalars["loc"].tolist() == [pytest.approx(float(fit.params["loc"]))]


def test_distinct_keeps_what_is_no_function_of_another() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 200))
    scalars = [Scalar("a", {"x": a}), Scalar("-exp a", {"x": -np.exp(a)}), Scalar("b", {"x": b})]
    shown, left = distinct(scalars)
    assert [s.name for s in shown] == ["a", "b"] and [s.name for s in left] == ["-exp a"]


def test_smoothed_density_is_near_the_density() -> None:
    values = np.random.default_rng(0).normal(size=4000)
    where, density = smoothed(values)
    exact = np.exp(-0.5 * where**2) / np.sqrt(2 * np.pi)
    # Silverman's width 0.9 n^(-1/5) = 0.17: bias at most width^2 / 2 * |f''| < 0.006, sd at most
    # sqrt(f / (2 sqrt(pi) n width)) < 0.013; 0.006 + 5 * 0.013 bounds both.
    assert np.abs(density - exact).max() < 0.071
    uniform = np.random.default_rng(0).uniform(size=4000)
    assert smoothed(uniform)[1][0] > 0.8, "a bound keeps its mass; without reflection it would be 0.5"


def test_bins_of_classes_hold_one_class_each() -> None:
    crabs = pg.load_data("crabs").numpy()
    edges = bins(crabs)
    assert len(edges) == 30 and np.allclose(edges, np.linspace(0.5795, 0.6955, 30))
    assert np.histogram(crabs, edges)[0][16] == 84, "class 17 holds 84 crabs"
    assert len(bins(np.random.default_rng(0).normal(size=400))) <= 40


@pytest.mark.parametrize("columns", [1, 2, 5])
def test_replicates_of_any_width_are_drawn(columns) -> None:
    from matplotlib.figure import Figure

    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).expand([columns]).to_event(1), obs=x)

    x = torch.randn(30, columns, generator=torch.Generator().manual_seed(0))
    (shown,) = replicates(pg.fit(model, x, SVI(steps=50, lr=0.05)), 7)
    assert shown.observed.shape == (30, columns) and shown.drawn.shape == (7, 30, columns) and shown.given is None
    assert np.allclose(shown.observed, x.numpy())
    axes = Figure().add_subplot()
    draw_predictive(axes, shown, "#0072B2")
    assert ("principal direction 1" in axes.get_xlabel()) == (columns == 5)
    assert axes.get_ylabel() == ("rows" if columns == 1 else axes.get_ylabel())
    assert axes.has_data()


def test_a_regression_is_drawn_over_its_input() -> None:
    from matplotlib.figure import Figure

    def model(t, y=None):
        slope = pyro.sample("slope", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(t)):
            pyro.sample("y", dist.Normal(slope * t[:, 0], 0.1), obs=y)

    t = torch.linspace(1, 0, 30)[:, None]
    (shown,) = replicates(pg.fit(model, {"t": t, "y": 3 * t[:, 0]}, SVI(steps=300, lr=0.05)), 50)
    assert shown.given[0] == "t" and np.allclose(shown.given[1], t[:, 0])
    axes = Figure().add_subplot()
    draw_predictive(axes, shown, "#0072B2")
    (line,) = axes.lines
    assert axes.get_xlabel() == "t" and (np.diff(line.get_xdata()) > 0).all(), "in the order of the input"
    assert np.abs(line.get_ydata() - 3 * line.get_xdata()).max() < 0.3
