"""The cost of a density is counted in numbers, and bounds how often a judgement asks for it."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

import ppl_gen as pg
from ppl_gen.inference import SVI
from ppl_gen.weights import densities
from ppl_gen.weights.work import FLOPS, OPERATIONS, density_work

ROWS, WIDTH = 300, 700


def straight(x, y):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)


class Heavy:
    """What it multiplies is held outside of its arguments, and far larger than they are."""

    def __init__(self) -> None:
        self.features = torch.linspace(-1.0, 1.0, ROWS * WIDTH).reshape(ROWS, WIDTH)
        self.weights = torch.full((WIDTH, WIDTH), 1e-3)

    def __call__(self, y):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        if slope.detach() > 1e6:  # Python that depends on a value: one draw at a time
            slope = slope / 2
        hidden = (self.features @ self.weights).mean(1)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(slope * hidden, 1.0), obs=y)


def fitted(model, *data) -> pg.Fit:
    return pg.fit(model, data, SVI(steps=5), seed=0)


def test_the_work_of_a_simple_density_is_that_of_its_data() -> None:
    small, large = (fitted(straight, torch.ones(n), torch.ones(n)) for n in (500, 50_000))
    assert density_work(small).numbers <= 2 * 500
    assert density_work(large).numbers == pytest.approx(
        100 * density_work(small).numbers, rel=0.05
    )  # counted on 1000 rows


def test_products_count_wherever_their_numbers_are_held() -> None:
    work = density_work(fitted(Heavy(), torch.zeros(ROWS))).numbers
    product = 2 * ROWS * WIDTH * WIDTH / FLOPS + ROWS * WIDTH / OPERATIONS
    assert work == pytest.approx(product, rel=0.05)


def test_a_verdict_asks_for_fewer_of_dear_densities(monkeypatch) -> None:
    fit = fitted(Heavy(), torch.zeros(ROWS))
    asked, once = [], densities._enumerated
    monkeypatch.setattr(densities, "_enumerated", lambda *args: asked.append(1) or once(*args))
    assert "no short chains were run" in fit.verdict.reason
    assert 100 <= len(asked) < 150  # a hundred draws at least; 4000 without a bound


class Long:
    """Many operations on few numbers, one draw at a time."""

    def __call__(self, y):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        if slope.detach() > 1e6:
            slope = slope / 2
        for _ in range(1500):
            slope = slope + 0.0
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(slope, 1.0), obs=y)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")
def test_long_programs_are_drawn_and_judged_less_often(monkeypatch, tmp_path) -> None:
    fit = fitted(Long(), torch.zeros(4))
    assert 1500 < density_work(fit).operations < 1700
    asked, once = [], densities._enumerated
    monkeypatch.setattr(densities, "_enumerated", lambda *args: asked.append(1) or once(*args))
    assert fit.verdict.reason and 290 < len(asked) < 400  # 500 000 operations; 4000 draws without a bound
    fit.save(tmp_path / "fit")
    assert 290 < pg.load(tmp_path / "fit").to_arviz().posterior["slope"].size < 340
