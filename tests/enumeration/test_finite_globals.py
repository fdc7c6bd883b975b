"""Finite latents outside the data plate, against exact sums: every draw of the globals carries theirs, given the data."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import cache

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import ppl_gen as pg
from ppl_gen.data import batching
from ppl_gen.errors import IncompatibleError
from ppl_gen.fitting.posteriors.points import PointPosterior
from ppl_gen.inference import EM, NUTS, SVI

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")  # chains and guides are short on purpose

STILL = SVI(steps=1, lr=1e-12)  # the guide as it was written
F64 = {"dtype": torch.float64}
X = torch.tensor([[1.0, 0.8], [-0.5, -0.9], [0.3, 0.6], [-1.2, -0.7], [0.6, 0.2]], **F64)
Y = torch.tensor([0.9, -0.2, 0.4, -1.1, 0.1], **F64)
STATES = torch.tensor(list(itertools.product((0.0, 1.0), repeat=2)), **F64)


def still() -> Tensor:
    """Something to learn, which a step of 1e-12 leaves at zero."""
    return pyro.param("still", torch.zeros((), **F64))


# ------------------------------------------------------------- two indicators of correlated predictors, one slope each
def spike(x: Tensor, y: Tensor | None = None) -> None:
    """y_i ~ N(sum_j g_j b_j x_ij, 0.5^2): each coefficient is in or out, before all rows."""
    g = [pyro.sample(f"g{j}", dist.Bernoulli(torch.tensor(p, **F64))) for j, p in enumerate((0.4, 0.5))]
    b = pyro.sample("b", dist.Normal(torch.zeros(2, **F64), 1.0).to_event(1))
    pyro.deterministic("coefficient", torch.stack(torch.broadcast_tensors(*g), -1) * b)
    with pyro.plate("data", len(x)):
        loc = g[0] * b[0] * x[:, 0] + g[1] * b[1] * x[:, 1]
        pyro.sample("y", dist.Normal(loc, 0.5), obs=y)


@cache
def spike_exact() -> tuple[Tensor, Tensor, Tensor, float]:
    """p(g | data) of the four states, mean and covariance of b given each, and log p(data)."""
    x, y, logs, means, covariances = X, Y, [], [], []
    for state in STATES:
        a = x * state
        marginal = dist.MultivariateNormal(torch.zeros(len(x), **F64), a @ a.T + 0.25 * torch.eye(len(x), **F64))
        prior = dist.Bernoulli(torch.tensor([0.4, 0.5], **F64)).log_prob(state).sum()
        logs.append(prior + marginal.log_prob(y))
        covariances.append(torch.linalg.inv(a.T @ a / 0.25 + torch.eye(2, **F64)))
        means.append(covariances[-1] @ a.T @ y / 0.25)
    logs = torch.stack(logs)
    return torch.softmax(logs, 0), torch.stack(means), torch.stack(covariances), float(torch.logsumexp(logs, 0))


def spike_guide(x: Tensor, y: Tensor | None = None) -> None:
    """The exact posterior of b, the indicators summed out."""
    weights, means, covariances, _ = spike_exact()
    parts = dist.MultivariateNormal(means + still(), covariances)
    pyro.sample("b", dist.MixtureSameFamily(dist.Categorical(weights), parts))


@pytest.fixture(scope="module")
def spiked() -> pg.Fit:
    return pg.fit(pg.Program(spike, spike_guide), {"x": X, "y": Y}, STILL)


def states(draws: dict[str, Tensor]) -> Tensor:
    return (2 * draws["g0"] + draws["g1"]).long()


def shares(values: Tensor) -> Tensor:
    return torch.bincount(values.flatten(), minlength=4) / values.numel()


def test_the_oracle_is_uncertain_and_far_from_the_prior() -> None:
    weights = spike_exact()[0]
    prior = torch.tensor([0.3, 0.3, 0.2, 0.2], **F64)
    assert float(weights.max()) < 0.8 and float((weights - prior).abs().max()) > 0.2


def test_posterior_and_export_hold_the_indicators_with_their_exact_joint_probabilities(spiked: pg.Fit) -> None:
    exact = spike_exact()[0]
    # A share of 2000 draws has an sd of at most 0.0112; 5 of them.
    assert float((shares(states(spiked.posterior(draws=2000, seed=1))) - exact).abs().max()) < 0.056
    group = spiked.to_arviz(draws=2000, seed=1)["posterior"]
    drawn = {name: torch.as_tensor(np.asarray(group[name])) for name in ("g0", "g1", "b", "coefficient")}
    assert drawn["g0"].shape == (1, 2000)
    assert float((shares(states(drawn)) - exact).abs().max()) < 0.056
    both = torch.stack([drawn["g0"], drawn["g1"]], -1)
    assert torch.equal(drawn["coefficient"], both * drawn["b"]), "what is derived follows the drawn indicators"


def test_the_indicators_go_with_the_slopes_they_were_drawn_for(spiked: pg.Fit) -> None:
    _, means, covariances, _ = spike_exact()
    draws = spiked.posterior(draws=3000, seed=2)
    for k in range(4):
        mine = draws["b"][states(draws) == k]
        # Means of n draws of known sd: 5 standard errors.
        error = 5 * (covariances[k].diagonal() / len(mine)).sqrt()
        assert bool(((mine.mean(0) - means[k]).abs() < error).all()), k


@pytest.mark.slow
def test_predictions_and_samples_of_new_rows_follow_the_training_rows(spiked: pg.Fit) -> None:
    weights, means, covariances, _ = spike_exact()
    at = torch.tensor([[1.0, 1.0]], **F64)
    loc = ((STATES * means) @ at[0] * weights).sum()
    spread = torch.stack([(s * at[0]) @ c @ (s * at[0]) for s, c in zip(STATES, covariances, strict=True)])
    variance = (weights * (spread + 0.25 + ((STATES * means) @ at[0] - loc) ** 2)).sum()
    drawn = spiked.predict({"x": at}, draws=3000, seed=3)["y"]
    prior = 0.0
    assert abs(float(loc) - prior) > 0.5
    assert abs(float(drawn.mean() - loc)) < 5 * math.sqrt(float(variance) / 3000)
    assert float(drawn.var()) == pytest.approx(float(variance), rel=0.2)  # fourth moments below 4 sd^4: 5 * 0.03
    one = [spiked.sample(1, given={"x": at}, seed=seed) for seed in range(150)]
    found = shares(torch.stack([states(sample) for sample in one]))
    assert float((found - weights).abs().max()) < 5 * 0.5 / math.sqrt(150)


def test_evidence_is_the_posterior_predictive_density_with_the_indicators_of_the_training_rows(spiked: pg.Fit) -> None:
    weights, means, covariances, _ = spike_exact()
    x, y = torch.tensor([[1.0, 0.5], [-1.0, 1.0]], **F64), torch.tensor([0.7, 0.2], **F64)
    exact = []
    for row, value in zip(x, y, strict=True):
        parts = [
            dist.Normal((s * row) @ m, ((s * row) @ c @ (s * row) + 0.25).sqrt()).log_prob(value)
            for s, m, c in zip(STATES, means, covariances, strict=True)
        ]
        exact.append(torch.logsumexp(weights.log() + torch.stack(parts), 0))
    exact = torch.stack(exact)
    found = spiked.evidence({"x": x, "y": y}, draws=4000)
    # A normal density of sd 0.5 is at most 0.8 and here at least 0.3 on average: relative sd below 1, 5 / sqrt(4000).
    assert float((found.values - exact).abs().max()) < 0.08
    assert not found.exact and found.kind.startswith("averaged over 4000 posterior draws") and found.mc_stderr > 0


def test_marginal_likelihood_sums_the_indicators_jointly_over_all_rows(spiked: pg.Fit) -> None:
    found = spiked.marginal_likelihood(draws=50)
    assert found.mean == pytest.approx(spike_exact()[3], abs=1e-9), "an exact guide has equal weights"
    frame = spiked.diagnose(draws=200)
    assert {"g0", "g1", "b[0]"} <= set(frame.index) and frame.attrs["pareto_k"] < 0.5
    stats = spiked.to_arviz(draws=60)["sample_stats"]
    log_p, log_q = np.asarray(stats["log_p"])[0], np.asarray(stats["log_q"])[0]
    assert np.allclose(log_p - log_q, spike_exact()[3], atol=1e-9)


def test_the_pointwise_log_likelihood_is_that_of_the_drawn_indicators(spiked: pg.Fit) -> None:
    tree = spiked.to_arviz(draws=40)
    draws = {name: torch.as_tensor(np.asarray(tree["posterior"][name]))[0] for name in ("g0", "g1", "b")}
    loc = (torch.stack([draws["g0"], draws["g1"]], -1) * draws["b"]) @ X.T
    found = np.asarray(tree["log_likelihood"]["y"])[0]
    assert np.allclose(found, dist.Normal(loc, 0.5).log_prob(Y).numpy(), atol=1e-12)


def test_all_rows_speak_though_globals_are_drawn_from_a_guide_on_a_slice(
    spiked: pg.Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "LARGE", 1)
    monkeypatch.setattr(batching, "FEW", 3)
    one = [spiked.sample(1, given={"x": X[:1]}, seed=seed) for seed in range(150)]
    found = shares(torch.stack([states(sample) for sample in one]))
    assert float((found - spike_exact()[0]).abs().max()) < 5 * 0.5 / math.sqrt(150)


def test_the_same_seed_gives_the_same_draws(spiked: pg.Fit) -> None:
    first, second = (spiked.predict({"x": X[:2]}, draws=20, seed=4)["y"] for _ in range(2))
    assert torch.equal(first, second)


def test_chains_carry_the_indicators_too() -> None:
    fit = pg.fit(spike, {"x": X, "y": Y}, NUTS(draws=600, warmup=200, chains=2, processes=1), seed=0)
    group = fit.to_arviz(draws=100)["posterior"]
    found = states({name: torch.as_tensor(np.asarray(group[name])) for name in ("g0", "g1")})
    assert found.shape == (2, 600)
    # P(g | b) averaged over chains with an effective sample size above 200: sd below 0.5 / sqrt 200 = 0.035.
    assert float((shares(found) - spike_exact()[0]).abs().max()) < 0.16
    assert {"g0", "g1"} <= set(fit.diagnose().index)
    again = fit.to_arviz(draws=100)["posterior"]
    assert np.array_equal(np.asarray(group["g0"]), np.asarray(again["g0"]))
    predicted = fit.predict({"x": torch.tensor([[1.0, 1.0]], **F64)}, draws=600)["y"]
    assert float(predicted.mean()) > 0.5


# ------------------------------------------------------------------------------------------------- a change point
COUNTS = torch.tensor([4.0, 6.0, 5.0, 3.0, 6.0, 1.0, 0.0, 2.0, 1.0, 1.0], **F64)


def change_point(t: Tensor, y: Tensor | None = None) -> None:
    """y_t ~ Poisson(rate 0 before tau, rate 1 from tau on)."""
    tau = pyro.sample("tau", dist.Categorical(torch.full((10,), 0.1, **F64)))
    rates = pyro.sample("rates", dist.Gamma(torch.tensor([2.0, 2.0], **F64), 1.0).to_event(1))
    with pyro.plate("data", len(t)):
        pyro.sample("y", dist.Poisson(torch.where(t < tau, rates[..., 0], rates[..., 1])), obs=y)


@cache
def change_point_exact() -> tuple[Tensor, Tensor, Tensor, float]:
    """p(tau | data), shapes and rates of the Gamma posteriors given tau, log p(data): conjugate, tau by tau."""
    t = torch.arange(10.0, **F64)
    before = t[None] < t[:, None]
    sides = torch.stack([before, ~before], -1).to(COUNTS)
    total, rows = (COUNTS[None, :, None] * sides).sum(1), sides.sum(1)
    a, b = 2.0 + total, 1.0 + rows
    logs = (torch.lgamma(a) - torch.lgamma(torch.tensor(2.0, **F64)) - a * b.log()).sum(-1)
    logs = logs - torch.lgamma(COUNTS + 1).sum() - math.log(10)
    return torch.softmax(logs, 0), a, b, float(torch.logsumexp(logs, 0))


def change_point_guide(t: Tensor, y: Tensor | None = None) -> None:
    weights, a, b, _ = change_point_exact()
    parts = dist.Gamma(a + still(), b).to_event(1)
    pyro.sample("rates", dist.MixtureSameFamily(dist.Categorical(weights), parts))


def test_a_change_point_has_its_exact_posterior_and_predictions() -> None:
    t = torch.arange(10.0, **F64)
    fit = pg.fit(pg.Program(change_point, change_point_guide), {"t": t, "y": COUNTS}, STILL)
    weights, a, b, total = change_point_exact()
    assert float(weights.max()) < 0.9
    assert fit.marginal_likelihood(draws=40).mean == pytest.approx(total, abs=1e-9)
    tau = fit.to_arviz(draws=2000)["posterior"]["tau"]
    found = torch.bincount(torch.as_tensor(np.asarray(tau)).flatten().long(), minlength=10) / 2000
    assert float((found - weights).abs().max()) < 5 * 0.0112
    at = torch.tensor([4.0], **F64)  # is the fifth count still on the high level?
    mean = torch.where(4.0 < torch.arange(10.0, **F64), a[:, 0] / b[:, 0], a[:, 1] / b[:, 1])
    exact = float((weights * mean).sum())
    drawn = fit.predict({"t": at}, draws=3000)["y"]
    assert abs(float(drawn.mean()) - exact) < 5 * math.sqrt(8.0 / 3000)  # mean and variance of a count are below 8


# --------------------------------------------------------------------------- global and local finite latents together
def groups(y: Tensor) -> None:
    """One group of rows at 0, or two at -1 and 1: the number of groups is global, the assignments are local."""
    two = pyro.sample("two", dist.Bernoulli(torch.tensor(0.5, **F64)))
    shift = pyro.sample("shift", dist.Normal(torch.zeros((), **F64), 0.5))
    with pyro.plate("data", len(y)):
        side = pyro.sample("side", dist.Bernoulli(torch.tensor(0.5, **F64)))
        pyro.sample("y", dist.Normal(shift + two * (2.0 * side - 1.0), 0.6), obs=y)


ROWS = torch.tensor([-1.0, 0.9, 1.3, -0.6], **F64)


@cache
def groups_exact() -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """All 2 x 2^4 assignments: whether two, weights, mean and sd of the shift given each, log p(data)."""
    rows = []
    for two, *sides in itertools.product((0.0, 1.0), repeat=5):
        rest = ROWS - two * (2 * torch.tensor(sides, **F64) - 1)
        cover = 0.25 * torch.ones(4, 4, **F64) + 0.36 * torch.eye(4, **F64)
        log = dist.MultivariateNormal(torch.zeros(4, **F64), cover).log_prob(rest) + 5 * math.log(0.5)
        precision = 4.0 + 4 / 0.36
        rows.append((two, float(log), float(rest.sum() / 0.36 / precision), precision**-0.5))
    two, logs, mean, sd = torch.tensor(rows, **F64).T
    return two, torch.softmax(logs, 0), mean, sd, float(torch.logsumexp(logs, 0))


def groups_guide(y: Tensor) -> None:
    _, weights, mean, sd, _ = groups_exact()
    pyro.sample("shift", dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(mean + still(), sd)))


def test_a_global_and_local_finite_latents_are_summed_together() -> None:
    fit = pg.fit(pg.Program(groups, groups_guide), ROWS, STILL)
    two, weights, mean, sd, total = groups_exact()
    probability = float((two * weights).sum())
    assert 0.6 < probability < 0.99
    assert fit.marginal_likelihood(draws=40).mean == pytest.approx(total, abs=1e-9)
    drawn = fit.to_arviz(draws=2000)["posterior"]
    assert abs(float(drawn["two"].mean()) - probability) < 5 * 0.5 / math.sqrt(2000)
    held = torch.tensor([1.5, 0.0], **F64)
    spread = (sd**2 + 0.36).sqrt()
    density = [
        0.5 * sum(dist.Normal(mean + two * s, spread).log_prob(v).exp() for s in (-1.0, 1.0)) @ weights for v in held
    ]
    found = fit.evidence(held, draws=2000)
    # Relative sd of the density over draws is below 1: 5 / sqrt(2000).
    assert float((found.values - torch.stack(density).log()).abs().max()) < 0.112
    own = fit.posterior(draws=300)
    assert abs(float(own["two"].mean()) - probability) < 5 * 0.5 / math.sqrt(300) and own["side"].shape == (300, 4)


def test_maximum_likelihood_sums_a_global_finite_latent_over_all_rows_and_then_draws_it() -> None:
    def program(y: Tensor) -> None:
        two = pyro.sample("two", dist.Bernoulli(torch.tensor(0.5, **F64)))
        shift = pyro.param("shift", torch.zeros((), **F64))
        with pyro.plate("data", len(y)):
            side = pyro.sample("side", dist.Bernoulli(torch.tensor(0.5, **F64)))
            pyro.sample("y", dist.Normal(shift + two * (2.0 * side - 1.0), 0.6), obs=y)

    def total(shift: Tensor, two: float) -> Tensor:
        sides = [dist.Normal(shift + two * s, 0.6).log_prob(ROWS[:, None]) for s in (-1.0, 1.0)]
        return (torch.logaddexp(*sides) + math.log(0.5)).sum(0) + math.log(0.5)

    grid = torch.linspace(-2, 2, 40001, **F64)
    logs = torch.stack([total(grid, 0.0), total(grid, 1.0)])
    best = int(torch.logsumexp(logs, 0).argmax())
    fit = pg.fit(program, ROWS, EM(steps=500))
    assert float(fit.params["shift"]) == pytest.approx(float(grid[best]), abs=1e-3)
    probability = float(torch.softmax(logs[:, best], 0)[1])
    drawn = fit.predict(draws=1000)
    assert drawn["y"].shape == (1000, 4)
    found = [float(fit.sample(2, seed=seed)["two"]) for seed in range(200)]
    assert abs(sum(found) / 200 - probability) < 5 * 0.5 / math.sqrt(200)
    held = torch.tensor([1.5], **F64)
    parts = [dist.Normal(grid[best] + two * s, 0.6).log_prob(held).exp() for two in (0.0, 1.0) for s in (-1.0, 1.0)]
    exact = math.log(float((1 - probability) * (parts[0] + parts[1]) / 2 + probability * (parts[2] + parts[3]) / 2))
    assert abs(fit.evidence(held, draws=2000).mean - exact) < 5 / math.sqrt(2000)


# ------------------------------------------------------------------------------------------------ latents of the rows
def offsets(y: Tensor) -> None:
    """g chooses the spread of the rows' own offsets."""
    g = pyro.sample("g", dist.Bernoulli(torch.tensor(0.5, **F64)))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(torch.zeros((), **F64), 0.3 + 1.2 * g))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def offsets_guide(y: Tensor) -> None:
    """z_i given y_i and g = 1: exact for one of the two models, a proposal for the other."""
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Normal(0.9 * y + still(), 0.47434))


def test_continuous_latents_of_the_rows_are_taken_at_their_joint_draw() -> None:
    y = torch.tensor([1.2, -1.6, 0.8], **F64)
    fit = pg.fit(pg.Program(offsets, offsets_guide), y, STILL)
    spread = [math.sqrt(0.3**2 + 0.25), math.sqrt(1.5**2 + 0.25)]
    total = torch.logsumexp(torch.stack([dist.Normal(0.0, s).log_prob(y).sum() + math.log(0.5) for s in spread]), 0)
    found = fit.marginal_likelihood(draws=40, particles=2000)
    # g = 0, whose weights are uneven, is 4 % of the sum; g = 1 has nearly equal weights.
    assert found.mean == pytest.approx(float(total), abs=0.02)
    given = fit.posterior(draws=400, seed=1)
    odds = sum(dist.Normal(0.0, s).log_prob(given["z"]).sum(-1) * w for s, w in ((1.5, 1.0), (0.3, -1.0)))
    probability = torch.sigmoid(odds)
    error = 5 * float((probability * (1 - probability)).sum().sqrt()) / 400
    assert abs(float(given["g"].mean() - probability.mean())) < error + 1e-9
    assert 0.0 < fit.diagnose(draws=100).loc["g", "mean"] <= 1.0
    new = fit.evidence(torch.tensor([0.5], **F64), draws=200, particles=200)
    assert math.isfinite(new.mean)


def test_finite_globals_without_draws_of_the_rows_latents_are_refused_by_name() -> None:
    fit = pg.fit(pg.Program(offsets, offsets_guide), torch.tensor([1.2, -1.6, 0.8], **F64), STILL)
    without = replace(fit, learned=PointPosterior({}))
    with pytest.raises(IncompatibleError, match="g of 'offsets' follow from the training rows given their latent z"):
        without.sample(2)


# ------------------------------------------------------------------------------------- a plate of finite globals
def test_rows_that_depend_on_a_whole_plate_of_finite_sites_are_refused() -> None:
    """Enumerated in parallel, the members of a plate all take the same value: the sum would hold 2 states for 16."""

    def program(x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("coef", 2):
            b = pyro.sample("b", dist.Normal(torch.zeros((), **F64), 1.0))
            g = pyro.sample("g", dist.Bernoulli(torch.tensor(0.5, **F64)))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((g * b) @ x.T, 0.5), obs=y)

    def firsts(x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("coef", 2):
            b = pyro.sample("b", dist.Normal(torch.zeros((), **F64), 1.0))
            g = pyro.sample("g", dist.Bernoulli(torch.tensor(0.5, **F64)))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(g[..., :1] * b[:1] * x[:, 0], 0.5), obs=y)

    for model in (program, firsts):
        for algorithm in (SVI(steps=2), NUTS(draws=5, warmup=5, chains=1)):
            with pytest.raises((ValueError, IncompatibleError), match="'y' depends on the 2 discrete values 'g'"):
                pg.fit(model, {"x": X, "y": Y}, algorithm)
