"""Evidence of rows that have finite and continuous latents together, and of rows that were measured in part."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import ppl_gen as pg
from ppl_gen.inference import NUTS, SVI

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")  # chains and guides are short on purpose

F64 = {"dtype": torch.float64}
QUICK = SVI(steps=2, lr=1e-3)
HELD = torch.tensor([-2.5, 0.1, 3.4], **F64)


def lg(p: float) -> float:
    return math.log(p)


def normal(value: Tensor, mean: float, variance: float) -> Tensor:
    return dist.Normal(torch.tensor(mean, **F64), math.sqrt(variance)).log_prob(value)


# ------------------------------------------------------------------------------- finite and continuous latents per row
def beside(x: Tensor) -> None:
    """k_i and z_i independent."""
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.6, 0.4], **F64)))
        z = pyro.sample("z", dist.Normal(torch.zeros((), **F64), 0.8))
        pyro.sample("x", dist.Normal(torch.tensor([-3.0, 3.0], **F64)[k] + z, 0.5), obs=x)


def beside_exact(x: Tensor) -> Tensor:
    return torch.logaddexp(normal(x, -3.0, 0.89) + lg(0.6), normal(x, 3.0, 0.89) + lg(0.4))


def z_after_k(x: Tensor) -> None:
    """z_i ~ N(2 k_i, 0.7^2), x_i ~ N(z_i, 0.6^2)."""
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.3, **F64)))
        z = pyro.sample("z", dist.Normal(2.0 * k, 0.7))
        pyro.sample("x", dist.Normal(z, 0.6), obs=x)


def z_after_k_exact(x: Tensor) -> Tensor:
    return torch.logaddexp(normal(x, 0.0, 0.85) + lg(0.7), normal(x, 2.0, 0.85) + lg(0.3))


def k_after_z(x: Tensor) -> None:
    """k_i ~ Bernoulli(logit z_i), x_i ~ N(z_i + k_i, 0.6^2)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros((), **F64), 1.0))
        k = pyro.sample("k", dist.Bernoulli(logits=2.0 * z))
        pyro.sample("x", dist.Normal(z + k, 0.6), obs=x)


def k_after_z_exact(x: Tensor) -> Tensor:
    z = torch.linspace(-9, 9, 4001, **F64)
    p = dist.Normal(0.0, 1.0).log_prob(z)[:, None] + lg(18 / 4000)
    rows = [
        p
        + dist.Bernoulli(logits=2 * z).log_prob(torch.tensor(k, **F64))[:, None]
        + dist.Normal(z[:, None] + k, 0.6).log_prob(x)
        for k in (0.0, 1.0)
    ]
    return torch.logsumexp(torch.logaddexp(*rows), 0)


def two_finite(x: Tensor) -> None:
    """Two finite latents and one continuous: the second finite one follows the first."""
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Bernoulli(torch.tensor(0.4, **F64)))
        b = pyro.sample("b", dist.Bernoulli(0.2 + 0.6 * a))
        z = pyro.sample("z", dist.Normal(torch.zeros((), **F64), 0.5))
        pyro.sample("x", dist.Normal(2.0 * a - 2.0 * b + z, 0.6), obs=x)


def two_finite_exact(x: Tensor) -> Tensor:
    states = {(0, 0): 0.6 * 0.8, (0, 1): 0.6 * 0.2, (1, 0): 0.4 * 0.2, (1, 1): 0.4 * 0.8}
    return torch.logsumexp(torch.stack([normal(x, 2.0 * a - 2.0 * b, 0.61) + lg(p) for (a, b), p in states.items()]), 0)


CASES = [(beside, beside_exact), (z_after_k, z_after_k_exact), (k_after_z, k_after_z_exact)]
CASES += [(two_finite, two_finite_exact)]


@pytest.mark.parametrize(("model", "exact"), CASES, ids=[model.__name__ for model, _ in CASES])
def test_rows_with_finite_and_continuous_latents_have_their_exact_density(
    model: Callable[..., None], exact: Callable[[Tensor], Tensor]
) -> None:
    fit = pg.fit(model, HELD, QUICK)
    found = fit.evidence(HELD, particles=3000)
    # Relative weights under the prior, finite latents summed, have a variance below 8 here: 5 sqrt(8 / 3000).
    assert float((found.values - exact(HELD)).abs().max()) < 0.26
    assert abs(found.mean - float(exact(HELD).mean())) < 6 * found.mc_stderr
    assert 0 < found.mc_stderr < 0.05 and "particles" in found.kind


def test_code_that_takes_no_further_dimension_is_run_particle_by_particle() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.3, **F64)))
            z = pyro.sample("z", dist.Normal(torch.zeros((), **F64), 0.7))
            scale = 0.6 if z.dim() == 1 else float("nan")  # right for one particle only
            pyro.sample("x", dist.Normal(2.0 * k + z, scale), obs=x)

    found = pg.fit(model, HELD, QUICK).evidence(HELD, particles=400)
    assert abs(found.mean - float(z_after_k_exact(HELD).mean())) < 6 * found.mc_stderr < 0.9


@pytest.mark.slow
def test_chains_and_a_comparison_have_that_evidence_too() -> None:
    x = torch.cat([HELD, -HELD, HELD + 0.5])

    def model(x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(torch.tensor([-3.0, 3.0], **F64), 1e-3).to_event(1))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.6, 0.4], **F64)))
            z = pyro.sample("z", dist.Normal(torch.zeros((), **F64), 0.8))
            pyro.sample("x", dist.Normal(m[..., k] + z, 0.5), obs=x)

    chains = NUTS(draws=20, warmup=40, chains=1, processes=1)
    found = pg.fit(model, x, chains).evidence(HELD, draws=4, particles=200)
    assert abs(found.mean - float(beside_exact(HELD).mean())) < 6 * found.mc_stderr < 0.9
    table = pg.compare(beside, x, {"a": QUICK}, seeds=[0]).table()
    assert bool(table.notna()["heldout"].all())


# ----------------------------------------------------------------------------------------------- partly measured rows
def columns(x: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> None:
    """b follows a: without b, a stands alone; without a, b has a wider spread."""
    with pyro.plate("data", len(x)):
        first = pyro.sample("a", dist.Normal(x, 0.8), obs=a)
        pyro.sample("b", dist.Normal(first, 0.6), obs=b)
        pyro.factor("nothing", torch.zeros(len(x), **F64))
    pyro.sample("idle", dist.Normal(torch.zeros((), **F64), 1.0))


@pytest.fixture(scope="module")
def measured() -> pg.Fit:
    x = torch.linspace(-1, 1, 6, **F64)
    return pg.fit(columns, {"x": x, "a": x + 0.1, "b": x - 0.2}, QUICK)


def test_an_unmeasured_leaf_integrates_to_one(measured: pg.Fit) -> None:
    x, a = torch.tensor([0.0, 0.5], **F64), torch.tensor([0.3, -0.4], **F64)
    found = measured.evidence({"x": x, "a": a}, draws=10)
    assert torch.allclose(found.values, dist.Normal(x, 0.8).log_prob(a), atol=1e-12)
    assert "without b, not measured" in found.kind and found.mc_stderr < 1e-12


def behind(x: Tensor, y: Tensor | None = None) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros((), **F64), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def behind_two(x: Tensor, y: Tensor | None = None) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros((), **F64), 0.8))
        side = pyro.sample("side", dist.Bernoulli(torch.tensor(0.5, **F64)))
        pyro.sample("x", dist.Normal(z + 1.2 * side - 0.6, 1.0), obs=x)
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def amortised(x: Tensor, y: Tensor | None = None) -> None:
    slope = pyro.param("slope", torch.tensor(0.5, **F64))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x, 0.8))


@pytest.mark.parametrize("guide", [None, amortised], ids=["prior", "guide"])
@pytest.mark.parametrize("model", [behind, behind_two], ids=["latent", "latent and finite"])
def test_an_unmeasured_leaf_beside_a_latent_of_rows_integrates_to_one(model: Any, guide: Any) -> None:
    """The density of one draw of it was counted: 1.5 nats a row."""
    x = torch.tensor([0.3, -1.4, 2.0], **F64)
    fit = pg.fit(pg.Program(model, guide), {"x": x, "y": 0.5 * x}, SVI(steps=1, lr=1e-9), seed=0)
    if model is behind:
        exact = dist.Normal(0.0, math.sqrt(2.0)).log_prob(x)
    else:
        sides = [dist.Normal(middle, math.sqrt(1.64)).log_prob(x) for middle in (-0.6, 0.6)]
        exact = torch.logaddexp(*sides) - math.log(2.0)
    found = fit.evidence({"x": x}, particles=4000)
    # Weights from the prior have a relative variance below 1.6 at x = 2, those of the guide less: 5 sqrt(1.6 / 4000).
    assert float((found.values - exact).abs().max()) < 0.1
    assert "without y, not measured" in found.kind


def test_what_an_observation_depends_on_is_integrated_out(measured: pg.Fit) -> None:
    x, b = torch.tensor([0.0, 0.5], **F64), torch.tensor([0.3, -0.4], **F64)
    found = measured.evidence({"x": x, "b": b}, draws=40, particles=200)
    # 8000 particles, relative variance of their weights below 3: 5 sqrt(3 / 8000).
    assert float((found.values - dist.Normal(x, 1.0).log_prob(b)).abs().max()) < 0.1
    assert "particles" in found.kind and "without a, not measured" in found.kind and not found.exact


def test_an_unmeasured_finite_column_is_summed_out_exactly() -> None:
    def model(x: Tensor, label: Tensor | None = None, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(x)):
            label = pyro.sample("label", dist.Bernoulli(torch.tensor(0.3, **F64)), obs=label)
            z = pyro.sample("side", dist.Bernoulli(torch.tensor(0.5, **F64)))
            pyro.sample("y", dist.Normal(x + 2.0 * label + z, 0.5), obs=y)
        idle = pyro.sample("idle", dist.Normal(torch.zeros((), **F64), 1.0))
        pyro.sample("seen", dist.Normal(idle, 1.0), obs=torch.zeros((), **F64))  # or there were nothing to learn

    x, y = torch.tensor([0.0, 0.5], **F64), torch.tensor([0.3, 2.4], **F64)
    fit = pg.fit(model, {"x": x, "label": torch.tensor([0.0, 1.0], **F64), "y": y}, QUICK)
    parts = [
        dist.Normal(x + 2.0 * label + side, 0.5).log_prob(y) + lg((0.7, 0.3)[label] * 0.5)
        for label in (0, 1)
        for side in (0, 1)
    ]
    found = fit.evidence({"x": x, "y": y}, draws=5)
    assert torch.allclose(found.values, torch.logsumexp(torch.stack(parts), 0), atol=1e-12)
    only = fit.evidence({"x": x, "label": torch.tensor([0.0, 1.0], **F64)}, draws=5)
    assert torch.allclose(only.values, torch.tensor([0.7, 0.3], **F64).log(), atol=1e-12), "y is a leaf here"
