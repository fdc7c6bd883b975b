"""Outcomes observed in part (`obs_mask`), and other latent sites that nothing depends on, against closed forms."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import ppl_gen as pg
from ppl_gen.inference import EM, NUTS, SVI

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")  # chains and guides are short on purpose

N = 20
X = torch.randn(N, generator=torch.Generator().manual_seed(0))
OK = torch.arange(N) % 3 > 0
Y = torch.where(OK, 1.0 + 0.7 * X + 0.3 * torch.randn(N, generator=torch.Generator().manual_seed(1)), 0.0)
DATA = {"x": X, "ok": OK, "y": Y}
SHORT_NUTS = NUTS(draws=300, warmup=150, chains=2, processes=1)
DRAWS = 600  # of these chains in all; 150 effective ones at worst: an error of 1 / sqrt(150) deviations


def line(x, ok, y=None):
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    b = pyro.sample("b", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(a + b * x, 0.3), obs=y, obs_mask=ok)


def line_posterior():
    """Mean and covariance of (a, b), and log p(y), from the observed rows alone."""
    design = torch.stack([torch.ones(int(OK.sum())), X[OK]], 1)
    cov = (design.T @ design / 0.09 + torch.eye(2) / 4).inverse()
    mean = cov @ (design.T @ Y[OK] / 0.09)
    marginal = dist.MultivariateNormal(torch.zeros(len(design)), 0.09 * torch.eye(len(design)) + 4 * design @ design.T)
    return mean, cov, float(marginal.log_prob(Y[OK]))


def check_line(p):
    mean, cov, _ = line_posterior()
    draws = torch.stack([p["a"], p["b"]], -1).to(mean)
    # 5 standard errors of 150 independent draws: chains give more, and Adam ends within 0.3 deviations of the optimum
    torch.testing.assert_close(draws.mean(0), mean, atol=5 * float(cov.diag().max().sqrt()) / math.sqrt(150), rtol=0)
    torch.testing.assert_close(draws.std(0), cov.diag().sqrt(), rtol=5 / math.sqrt(2 * 150), atol=0)


def check_missing(values):
    mean, cov, _ = line_posterior()
    design = torch.stack([torch.ones(N), X], 1)
    sd = (0.09 + ((design @ cov) * design).sum(-1)).sqrt()
    assert bool((values[:, OK] == Y[OK].to(values)).all())
    gap = ((values.mean(0) - design @ mean) / sd)[~OK]
    assert float(gap.abs().max()) < 5.5 / math.sqrt(150)
    torch.testing.assert_close((values.std(0) / sd)[~OK], torch.ones(7).to(values), rtol=0, atol=5.5 / math.sqrt(300))


def test_chains_and_predictions_of_an_outcome_observed_in_part() -> None:
    fit = pg.fit(line, DATA, SHORT_NUTS, seed=0)
    assert set(fit.learned.draws) == {"a", "b"}
    assert not bool(fit.learned.stats["diverging"].any())
    p = fit.posterior(draws=DRAWS)
    check_line(p)
    check_missing(p["y"].float())
    assert torch.equal(p["y_unobserved"], p["y"])  # nothing but what was observed, and draws where that is missing
    predicted = fit.predict(draws=DRAWS)
    assert set(predicted) == {"y"}
    check_missing(predicted["y"].float())


def test_a_guide_its_evidence_and_its_export(tmp_path) -> None:
    fit = pg.fit(pg.Program(line, AutoMultivariateNormal), DATA, SVI(steps=1200, lr=0.01), seed=0)
    _, _, marginal = line_posterior()
    check_line(fit.posterior(draws=500))
    assert fit.verdict.grade == "trust"
    # the guide is close to the posterior (k-hat below 0.5), so that weights vary little: error below 0.03 at 2000 draws
    assert abs(fit.marginal_likelihood().mean - marginal) < 0.15
    rows = fit.evidence().values
    assert bool((rows[~OK] == 0).all()) and bool((rows[OK] != 0).all())
    tree = fit.to_arviz(draws=200)
    assert set(tree["posterior_predictive"].data_vars) == {"y"} == set(tree["log_likelihood"].data_vars)
    seen = torch.as_tensor(tree["observed_data"]["y"].values)
    assert torch.equal(seen.isnan(), ~OK) and torch.equal(seen[OK].float(), Y[OK])
    assert tree["log_likelihood"]["y"].shape[-1] == int(OK.sum())  # a row without an observation has no likelihood
    again = pg.load(fit.save(tmp_path / "fit"), program=pg.Program(line, AutoMultivariateNormal))
    assert torch.equal(again.posterior(draws=5, seed=1)["y"], fit.posterior(draws=5, seed=1)["y"])


def test_with_nothing_missing_predictions_are_replicates_and_without_the_outcome_they_are_predictions() -> None:
    whole = {"x": X, "ok": torch.ones(N, dtype=torch.bool), "y": 1 + 0.7 * X}
    fit = pg.fit(line, whole, SVI(steps=5), seed=0)
    for data in (None, {"x": X[:4], "ok": OK[:4]}):
        values = fit.predict(data, draws=5)["y"]
        assert float(values.std(0).min()) > 0.01


def test_minibatches_need_no_guide_of_what_is_missing() -> None:
    fit = pg.fit(line, DATA, SVI(steps=1500, lr=0.01, batch_size=10), seed=0)
    mean, cov, _ = line_posterior()
    p = fit.posterior(draws=1000)
    # Adam on minibatches jitters by about half a posterior deviation at this rate
    assert float(((torch.stack([p["a"].mean(), p["b"].mean()]) - mean) / cov.diag().sqrt()).abs().max()) < 2.5
    # a mean-field guide has the conditional deviations
    torch.testing.assert_close(
        torch.stack([p["a"].std(), p["b"].std()]), cov.inverse().diag().rsqrt(), rtol=0.4, atol=0
    )


def test_events_keep_their_shape() -> None:
    y = torch.randn(N, 2, generator=torch.Generator().manual_seed(2))

    def model(ok, y=None):
        m = pyro.sample("m", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(ok)):
            pyro.sample("y", dist.Normal(m, 1.0).to_event(1), obs=y, obs_mask=ok)

    fit = pg.fit(model, {"ok": OK, "y": y}, SHORT_NUTS, seed=0)
    p = fit.posterior(draws=DRAWS)
    torch.testing.assert_close(p["m"].mean(0).float(), y[OK].sum(0) / 14, atol=5 / math.sqrt(14 * 150), rtol=0)
    torch.testing.assert_close(p["m"].std(0).float(), torch.full((2,), 14**-0.5), rtol=0.29, atol=0)
    values = fit.predict(draws=10)["y"]
    assert values.shape == (10, N, 2) and bool((values[:, OK] == y[OK].to(values)).all())
    seen = torch.as_tensor(fit.to_arviz(draws=10)["observed_data"]["y"].values)
    assert torch.equal(seen.isnan().all(-1), ~OK)


def test_a_finite_outcome_is_not_summed_where_nothing_depends_on_it() -> None:
    y = (torch.arange(N) % 4 == 1).float()

    def model(ok, y=None):
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        with pyro.plate("data", len(ok)):
            pyro.sample("y", dist.Bernoulli(p), obs=y, obs_mask=ok)

    data = {"ok": OK, "y": y}
    k, n = float(y[OK].sum()), int(OK.sum())
    right = dist.Beta(2 + k, 2 + n - k)
    fit = pg.fit(model, data, SHORT_NUTS, seed=0)
    p = fit.posterior(draws=DRAWS)
    torch.testing.assert_close(p["p"].mean().float(), right.mean, atol=5 * float(right.stddev) / math.sqrt(150), rtol=0)
    torch.testing.assert_close(p["p"].std().float(), right.stddev, rtol=0.29, atol=0)
    assert bool((p["y_unobserved"][:, OK] == y[OK].to(p["p"])).all())
    mean = float(p["y"][:, ~OK].mean())  # 7 x 150 draws, tied through p
    assert abs(mean - float(right.mean)) < 5 * (float(right.stddev) + 0.5 / math.sqrt(7)) / math.sqrt(150)


def test_em_of_a_mixture_is_that_of_the_observed_rows() -> None:
    def mixture(ok, x=None):
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        with pyro.plate("components", 2):
            loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(ok)):
            k = pyro.sample("k", dist.Bernoulli(p), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(loc[k.long()], 1.0), obs=x, obs_mask=ok)

    x = torch.where(torch.arange(N) % 2 == 0, -2.0, 3.0) + X
    start = {"p": torch.tensor(0.5), "loc": torch.tensor([-1.0, 1.0])}
    program = pg.Program(mixture, start=lambda: start)
    found = [
        pg.fit(program, {"ok": ok, "x": torch.where(ok, values, 99.0)}, EM(), seed=0).point
        for ok, values in ((OK, x), (torch.ones(int(OK.sum()), dtype=torch.bool), x[OK]))
    ]
    for name in start:
        torch.testing.assert_close(found[0][name], found[1][name], atol=1e-3, rtol=0)


def test_what_depends_on_the_missing_part_informs_it() -> None:
    w = 0.5 + torch.randn(N, generator=torch.Generator().manual_seed(3))

    def model(ok, w, y=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(ok)):
            y = pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=ok)
            pyro.sample("w", dist.Normal(y, 0.5), obs=w)

    fit = pg.fit(model, {"ok": OK, "w": w, "y": Y}, SHORT_NUTS, seed=0)
    precision = 1 + 13 + 7 / 1.25  # missing rows: w ~ Normal(mu, sqrt(1.25))
    mean = (Y[OK].sum() + w[~OK].sum() / 1.25) / precision
    p = fit.posterior(draws=DRAWS)
    torch.testing.assert_close(p["mu"].mean().float(), mean, atol=5 / math.sqrt(precision * 150), rtol=0)
    torch.testing.assert_close(p["mu"].std(), torch.tensor(precision).rsqrt().to(p["mu"]), rtol=0.29, atol=0)
    # y | w, mu has precision 1 + 4 and mean (mu + 4 w) / 5
    sd = math.sqrt(0.2 + 0.04 / precision)
    missing = p["y_unobserved"][:, ~OK].float()
    torch.testing.assert_close(missing.mean(0), (mean + 4 * w[~OK]) / 5, atol=5.5 * sd / math.sqrt(150), rtol=0)
    assert torch.equal(p["y_unobserved"], p["y"]) and not bool(fit.learned.stats["diverging"].any())


def test_a_finite_missing_part_is_summed_once_in_each_row() -> None:
    c, w = (torch.arange(N) % 2).float(), torch.linspace(-2, 4, N)

    def model(ok, w, c=None):
        p = pyro.param("p", torch.tensor(0.3), constraint=dist.constraints.unit_interval)
        with pyro.plate("data", len(ok)):
            c = pyro.sample("c", dist.Bernoulli(p), obs=c, obs_mask=ok)
            pyro.sample("w", dist.Normal(2 * c, 1.0), obs=w)

    fit = pg.fit(model, {"ok": OK, "w": w, "c": c}, SVI(steps=1, lr=1e-9), seed=0)
    each = torch.stack([math.log(q) + dist.Normal(2.0 * v, 1.0).log_prob(w) for v, q in ((0, 0.7), (1, 0.3))])
    right = torch.where(OK, each.gather(0, c.long()[None])[0], each.logsumexp(0))
    torch.testing.assert_close(fit.evidence().values.float(), right, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_local_latents_of_rows_without_an_outcome_follow_their_prior() -> None:
    def model(ok, y=None):
        with pyro.plate("data", len(ok)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y, obs_mask=ok)

    fit = pg.fit(pg.Program(model, AutoNormal), {"ok": OK, "y": Y}, SVI(steps=1500, lr=0.02), seed=0)
    p = fit.posterior(draws=2000)
    right = torch.where(OK, 0.8 * Y, 0.0), torch.where(OK, 0.2**0.5, 1.0)
    torch.testing.assert_close(p["z"].mean(0), right[0], atol=0.5, rtol=0)  # Adam jitters by about 0.1
    torch.testing.assert_close(p["z"].std(0), right[1], rtol=0.4, atol=0)
    new = fit.predict({"ok": OK[:6], "y": Y[:6] + 1}, draws=500)["y"]
    assert bool((new[:, OK[:6]] == (Y[:6] + 1)[OK[:6]]).all())
    torch.testing.assert_close(new[:, ~OK[:6]].std(0), torch.full((2,), 1.25**0.5), rtol=0.18, atol=0)  # 5.5 errors


# -------------------------------------------------------------------------------------------------- other predictions
def forecast(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    new = pyro.sample("new", dist.Normal(mu, 1.0))
    pyro.sample("later", dist.Gamma(2.0, new.exp()))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def test_a_site_that_only_predicts_is_drawn_and_not_learned() -> None:
    fit = pg.fit(forecast, X, SHORT_NUTS, seed=0)
    assert set(fit.learned.draws) == {"mu"} and fit.info.predicted == ["new", "later"]
    p = fit.posterior(draws=DRAWS)
    sd = math.sqrt(1 + 1 / (N + 1))
    assert abs(float(p["new"].mean() - X.sum() / (N + 1))) < 5 * sd / math.sqrt(150)
    assert abs(float(p["new"].std()) / sd - 1) < 5 / math.sqrt(300)
    assert float(((p["new"] - p["mu"]).std() - 1).abs()) < 5 / math.sqrt(2 * 600)  # given the same draw of mu
    assert float(p["later"].min()) > 0


def test_a_guide_may_draw_a_prediction_or_leave_it_out() -> None:
    def short(x):
        pyro.sample("mu", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 0.2))

    def long(x):
        short(x)
        pyro.sample("new", dist.Normal(5.0, 0.01))
        pyro.sample("later", dist.Gamma(2.0, 1.0))

    for guide, near in ((short, 0.0), (long, 5.0)):
        fit = pg.fit(pg.Program(forecast, guide), X, SVI(steps=5), seed=0)
        assert abs(float(fit.posterior(draws=400)["new"].mean()) - near) < 0.5
        assert fit.info.predicted == ([] if guide is long else ["new", "later"])


@pytest.mark.parametrize("far", [torch.relu, lambda z: 1.0 * (z > 0)])
def test_a_density_that_is_level_where_it_was_tried_is_still_read(far) -> None:
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(far(z - 50.0), 1.0), obs=x)

    assert pg.check(model, X).sites["z"].kind == "latent"


def test_the_zoo_learns_all_of_its_latent_sites() -> None:
    from ppl_gen.models.catalogue import CATALOGUE

    for name, entry in CATALOGUE.items():
        assert pg.check(entry.recipe(), entry.data()).predicted == [], name
