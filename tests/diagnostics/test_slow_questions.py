"""Questions that took long: asked all at once, of fewer draws where dear, with the answers they had."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import ks_2samp

import ppl_gen as pg
from ppl_gen.diagnostics.row_weights import weigh_rows
from ppl_gen.draws import replicates
from ppl_gen.enumeration import enumerated_trace as enumerated
from ppl_gen.enumeration.marginals import enumerated_trace, row_log_density
from ppl_gen.inference import SVI
from ppl_gen.weights import densities
from ppl_gen.weights.weighed import COST
from ppl_gen.weights.work import density_work

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")

TOPICS, WORDS = 3, 7
DOCUMENTS = torch.randint(WORDS, (5, 4), generator=torch.Generator().manual_seed(0))


def rows_one_by_one(y):
    level, scale = pyro.sample("level", dist.Normal(0.0, 1.0)), pyro.sample("scale", dist.Gamma(2.0, 2.0))
    for i in pyro.plate("rows", len(y)):
        pyro.sample(f"y_{i}", dist.Normal(level, scale), obs=y[i])


@pytest.fixture(scope="module")
def sequential():
    return pg.fit(rows_one_by_one, torch.linspace(-1.0, 2.0, 6), SVI(steps=300, lr=0.05), seed=0)


@pytest.mark.slow
def test_draws_together_are_distributed_as_draws_one_by_one(sequential, monkeypatch) -> None:
    runs, once = [], replicates.run
    monkeypatch.setattr(replicates, "run", lambda *a, **k: runs.append(1) or once(*a, **k))
    together = sequential.to_arviz(seed=1)
    assert len(runs) < 10  # 1001 before
    monkeypatch.setattr(replicates, "many", lambda *_: None)
    alone = sequential.to_arviz(seed=1)
    assert len(runs) > 1000
    for group in ("posterior_predictive", "prior_predictive", "prior"):
        assert list(together[group].data_vars) == list(alone[group].data_vars)
        for name, drawn in together[group].data_vars.items():
            assert drawn.shape == alone[group][name].shape
            assert len(np.unique(drawn.values)) == drawn.size, "no draw stands for two"
            # 14 comparisons: one false alarm in 1e5 runs
            assert ks_2samp(drawn.values.ravel(), alone[group][name].values.ravel()).pvalue > 1e-6, name


def test_replicates_follow_their_own_draw(sequential) -> None:
    with sequential.bound(3):
        draws = [{"level": torch.tensor(100.0 * k), "scale": torch.tensor(1e-3)} for k in range(50)]
        found = replicates.replicated(sequential, sequential.data.batch(), draws)
    assert torch.allclose(found["y_3"], 100.0 * torch.arange(50.0), atol=0.1)


def test_programs_that_look_at_what_they_draw_are_run_one_by_one() -> None:
    def looks(y):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(level if float(level.detach()) > 0 else -level, 1e-3), obs=y)

    fit = pg.fit(looks, torch.full((3,), 1.0), SVI(steps=5), seed=0)
    assert (fit.to_arviz(draws=60).prior_predictive["y"].values > -0.01).all()


def topics(words):
    with pyro.plate("topics", TOPICS):
        phi = pyro.sample("phi", dist.Dirichlet(torch.full((WORDS,), 0.5)))
    with pyro.plate("data", len(words), dim=-2):
        theta = pyro.sample("theta", dist.Dirichlet(torch.ones(TOPICS)))
        with pyro.plate("words", words.shape[1], dim=-1):
            topic = pyro.sample("topic", dist.Categorical(theta))
            pyro.sample("word", dist.Categorical(phi[topic]), obs=words)


def at(seed):
    pyro.set_rng_seed(seed)
    seen = pyro.poutine.trace(topics).get_trace(DOCUMENTS)
    return {name: seen.nodes[name]["value"] for name in ("phi", "theta")}


def row_densities(values):
    trace = enumerated_trace(topics, (DOCUMENTS,), discrete=["topic"], values=values, plate_nesting=2)
    return row_log_density(trace, "data")


def test_logarithms_of_a_table_that_a_plate_repeats_are_those_of_each(monkeypatch) -> None:
    values = at(0)
    shared = row_densities(values)
    stacked = {name: torch.stack([value, at(1)[name]]) for name, value in values.items()}
    assert torch.allclose(torch.vmap(row_densities)(stacked)[0], shared, atol=1e-5)
    monkeypatch.setattr(enumerated, "_share_logits", lambda fn: None)
    assert torch.allclose(row_densities(values), shared, atol=1e-5)
    by_hand = torch.log(values["theta"][:, 0] @ values["phi"]).gather(1, DOCUMENTS).sum(1)
    with_prior = by_hand + dist.Dirichlet(torch.ones(TOPICS)).log_prob(values["theta"][:, 0])
    assert torch.allclose(shared, with_prior, atol=1e-4)


@pytest.mark.parametrize("held", [1, 40, 10**9])
def test_however_few_draws_are_taken_at_once_the_evidence_is_the_same(held, monkeypatch) -> None:
    fit = pg.fit(topics, DOCUMENTS, SVI(steps=20), seed=0)
    expected = fit.evidence(seed=2, draws=10, particles=20).values
    monkeypatch.setattr(densities, "HELD", held)
    assert torch.allclose(fit.evidence(seed=2, draws=10, particles=20).values, expected, atol=1e-4)


def each_row(y):
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(level, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def test_the_work_of_a_guide_with_parameters_of_rows_is_counted_beyond_a_thousand_rows() -> None:
    few, many = (density_work(pg.fit(each_row, torch.ones(n), SVI(steps=3), seed=0)) for n in (500, 5000))
    assert few.numbers > 500 and many.operations == few.operations
    assert many.numbers == pytest.approx(10 * few.numbers, rel=0.02)


class Dear:
    """Rows pass through a wide product: their densities cost far more than their data show."""

    def __init__(self) -> None:
        self.wide = torch.full((1, 3000), 1e-3), torch.full((3000, 3000), 1e-7)

    def model(self, y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            first, second = self.wide
            pyro.sample("y", dist.Normal(z + (z[..., None] @ first @ second).mean(-1), 1.0), obs=y)

    def guide(self, y):
        a = pyro.param("a", torch.tensor(0.5))
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(a * y, 0.7))


@pytest.mark.slow
def test_dear_rows_of_a_short_fit_are_weighed_by_fewer_draws() -> None:
    dear = Dear()
    fit = pg.fit(
        pg.Program(dear.model, dear.guide),
        torch.randn(20, generator=torch.Generator().manual_seed(0)),
        SVI(steps=3),
        seed=0,
    )
    once = density_work(fit).numbers
    assert once > COST / 500
    with fit.bound(0):
        assert weigh_rows(fit, 1000).draws == max(100, COST // once)
        steps = math.ceil(1000 * once / (once // 2))
        assert weigh_rows(replace(fit, cost={**fit.cost, "steps": steps}), 600).draws == 600


def test_a_check_does_not_load_symbolic_mathematics() -> None:
    lines = (
        "import sys, torch, pyro, pyro.distributions as dist, ppl_gen as pg",
        "def model(y):",
        "    m = pyro.sample('m', dist.Normal(0.0, 1.0))",
        "    with pyro.plate('data', len(y)):",
        "        pyro.sample('y', dist.Normal(m, 1.0), obs=y)",
        "pg.check(model, torch.zeros(3))",
        "assert 'sympy' not in sys.modules and 'triton' not in sys.modules",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)
