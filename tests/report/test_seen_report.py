"""The section on what networks see: which networks are shown, and what stands in their pictures."""

from __future__ import annotations

import base64
import io
import sys

import pytest
import torch
from matplotlib.image import imread
from test_report import Page

import ppl_gen as pg
from ppl_gen.inference import EM, SVI, Adversarial
from ppl_gen.models import classifier, gan, ppca, vae
from ppl_gen.report.html import page
from ppl_gen.report.seen_section import seen

X = torch.rand(40, 1, 6, 6, generator=torch.Generator().manual_seed(0))
LABELLED = {"x": X, "y": torch.arange(40) % 2}
SHORT = SVI(steps=5)


@pytest.fixture(scope="module")
def fit() -> pg.Fit:
    return pg.fit(classifier(hidden=(3, 4)), LABELLED, SHORT, seed=0)


def test_a_convolutional_network_gets_all_three_kinds(fit) -> None:
    groups, problems = seen({"a": fit}, {"x": X[:10], "y": LABELLED["y"][:10]})
    assert [group.title for group in groups] == ["Filters", "Activation maps", "Saliency"] and not problems
    assert [len(group.pictures) for group in groups] == [1, 1, 1]
    assert groups[0].pictures[0].alt == "a: 3 filters of the first layer, each 5 x 5 pixels"
    for group in groups:
        image = imread(io.BytesIO(base64.b64decode(group.pictures[0].source.split(",")[1])))
        assert image[..., :3].std() > 0.02, "there is something to see"


def test_networks_that_read_pixels_in_a_row_are_shown_and_those_that_read_codes_are_not() -> None:
    rows = (X > 0.5).float().flatten(1)
    coded = pg.fit(vae(latent=2, hidden=(8,)), rows, SHORT, seed=0)
    groups, problems = seen({"vae": coded}, None)
    assert [group.title for group in groups] == ["Filters", "Saliency"] and not problems
    assert [picture.caption for picture in groups[0].pictures] == ["vae, encoder"], "the decoder reads codes"
    assert "8 filters of the first layer, each 6 x 6 pixels" in groups[0].pictures[0].alt


def test_fits_without_images_or_without_networks_have_no_such_section() -> None:
    rows = torch.randn(40, 4)
    fits = {"table": pg.fit(classifier(), {"x": rows, "y": LABELLED["y"]}, SHORT, seed=0)}
    fits["linear"] = pg.fit(ppca(latent=1), rows, EM(steps=2), seed=0)
    assert seen(fits, None) == ([], [])
    ring = pg.fit(gan(latent=2, hidden=(4,)), torch.randn(40, 2), SVI(Adversarial(), steps=3), seed=0)
    assert seen({"gan": ring}, None) == ([], [])


def test_the_page_has_the_section_and_does_without_captum(fit, monkeypatch) -> None:
    comparison = pg.compare(classifier(hidden=(3, 4)), LABELLED, {"a": SHORT}, progress=False)
    text = page(comparison)
    assert "What the network sees" in Page(text).text and text.count("filters of the first layer") == 1
    monkeypatch.setitem(sys.modules, "captum", None)
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    groups, problems = seen({"a": fit, "b": fit}, None)
    assert [group.title for group in groups] == ["Filters", "Activation maps"]
    assert problems == [
        'Saliency: saliency, deconvnets and occlusion are computed by captum: pip install "ppl_gen[looking]"'
    ]


def test_what_cannot_be_drawn_does_not_cost_the_report(fit, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr("ppl_gen.report.seen_section.saliency", fail)
    groups, problems = seen({"a": fit}, None)
    assert len(groups) == 2 and problems == ["a, saliency: RuntimeError: no ink"]
