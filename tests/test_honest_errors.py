"""Errors of evidence against what repetitions and closed forms show."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal

import ppl_gen as pg
from ppl_gen.diagnostics.averaging import Average, normaliser
from ppl_gen.inference import SVI


def densities(draws: int, rows: torch.Tensor, sd: float, noise: torch.Generator) -> torch.Tensor:
    """log N(x_i | theta_s, 1) for theta_s ~ N(0, sd^2)."""
    theta = torch.randn(draws, 1, rows.shape[1], generator=noise, dtype=torch.float64) * sd
    return -0.5 * ((rows - theta) ** 2).sum(-1)


@pytest.mark.parametrize(("count", "columns", "sd"), [(3, 1, 1.0), (30, 1, 0.3), (100, 5, 0.5), (500, 2, 0.2)])
@pytest.mark.parametrize("draws", [20, 100])
def test_the_error_of_few_parameter_draws_is_that_of_repetitions(
    count: int, columns: int, sd: float, draws: int
) -> None:
    noise = torch.Generator().manual_seed(0)
    rows = torch.randn(count, columns, generator=noise, dtype=torch.float64) * 1.5
    means, errors = [], []
    for _ in range(150):
        logs = densities(draws, rows, sd, noise)
        average = Average(draws)
        for part in logs.split(64, 1):
            average.add(part)
        means.append(float((torch.logsumexp(logs, 0) - math.log(draws)).mean()))
        errors.append(average.error() ** 2)
    # An sd of 150 repetitions is known to 6 %: five of these below. The jackknife errs upwards, by at most 0.3.
    ratio = math.sqrt(sum(errors) / len(errors)) / float(torch.tensor(means).std())
    assert 0.7 < ratio < 1.6


def test_leaving_out_a_draw_that_carries_a_row_is_exact() -> None:
    logs = torch.tensor([[0.0, -3.0], [-900.0, -1.0], [-901.0, -2.0]], dtype=torch.float64)
    average = Average(3)
    average.add(logs)
    left = [torch.logsumexp(torch.cat([logs[:s], logs[s + 1 :]]), 0).mean() - math.log(2) for s in range(3)]
    m = torch.stack(left)
    assert average.error() == pytest.approx(float(((m - m.mean()) ** 2).sum() * 2 / 3) ** 0.5, rel=1e-12)


def test_weighing_turns_a_guide_that_is_too_wide_into_the_posterior() -> None:
    """Draws of N(0, 1) weighed to be of N(0, 0.6^2): the predictive density is N(0, 1 + 0.36) and not N(0, 2)."""
    noise = torch.Generator().manual_seed(1)
    theta = torch.randn(4000, 1, generator=noise, dtype=torch.float64)
    logs = 0.5 * theta[:, 0] ** 2 * (1 - 1 / 0.36)
    rows = torch.tensor([0.0, 1.0, -2.5], dtype=torch.float64)
    average = Average(4000, logs - torch.logsumexp(logs, 0))
    average.add(-0.5 * (rows - theta) ** 2)
    gap, error = average.gap() or (math.nan, math.nan)
    exact = dist.Normal(0.0, 1.36**0.5).log_prob(rows).mean() - dist.Normal(0.0, 2**0.5).log_prob(rows).mean()
    assert abs(gap - float(exact)) < 5 * error < 0.3 * abs(gap)
    equal = Average(50, torch.full((50,), -math.log(50), dtype=torch.float64))
    equal.add(densities(50, rows[:, None], 1.0, noise))
    assert equal.gap() == pytest.approx((0.0, 0.0), abs=1e-12)


@pytest.mark.parametrize(("variance", "columns"), [(1.2, 20), (1.5, 1)])
def test_the_error_of_a_normaliser_covers_zero_or_is_infinite(variance: float, columns: int) -> None:
    noise = torch.Generator().manual_seed(2)
    misses = []
    for _ in range(40):
        z = torch.randn(2000, columns, generator=noise, dtype=torch.float64)
        logs = (-0.5 * z**2 / variance - 0.5 * math.log(variance) + 0.5 * z**2).sum(1)
        found = normaliser(logs)
        misses.append(abs(found.value) / found.stderr)
    assert max(misses) < 5
    assert normaliser(torch.zeros(100)).stderr == pytest.approx(0.0, abs=1e-12)
    assert math.isnan(normaliser(torch.zeros(1)).stderr) and math.isinf(normaliser(torch.full((60,), -math.inf)).stderr)


def columns(first: float, last: float) -> dict[str, torch.Tensor]:
    x = torch.stack([torch.ones(30), torch.linspace(first, last, 30)], 1)
    return {"x": x, "y": x @ torch.tensor([1.0, -0.5]) + 0.8 * torch.sin(torch.arange(30) * 1.7)}


def line(x: torch.Tensor, y: torch.Tensor) -> None:
    a = pyro.sample("a", dist.Normal(0.0, 3.0))
    b = pyro.sample("b", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ torch.stack([a, b]), 1.0), obs=y)


@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal])
@pytest.mark.filterwarnings("ignore:marginal_likelihood")
def test_a_marginal_likelihood_is_covered_by_its_error_or_flagged(guide: type) -> None:
    data = columns(3.0, 4.0) if guide is AutoNormal else columns(-1.0, 2.0)
    x, y = data["x"].double(), data["y"].double()
    exact = float(dist.MultivariateNormal(torch.zeros(30).double(), torch.eye(30).double() + 9 * x @ x.T).log_prob(y))
    fit = pg.fit(pg.Program(line, guide), data, SVI(steps=500, lr=0.03), seed=0)
    found = [fit.marginal_likelihood(draws=1000, seed=seed) for seed in range(20)]
    flagged = [one for one in found if math.isinf(one.mc_stderr)]
    if guide is AutoNormal:  # the exact posterior correlates a and b at -0.99; k-hat of 1000 draws misses that at times
        assert len(flagged) > 10 and "amount unknown" in flagged[0].kind and "error unknown" in repr(flagged[0])
        return
    # Those left are good to k-hat 0.67: five errors, and the rounding of 32 bits.
    assert all(abs(one.mean - exact) < 5 * one.mc_stderr + 1e-3 for one in found)
