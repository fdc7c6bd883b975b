"""NaN that `obs_mask` hides is never read: the same fits as with any filler; what reads it is named."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import ppl_gen as pg
from ppl_gen.handlers.obs_masks import hidden_outcomes_unread
from ppl_gen.inference import IWAE, NUTS, SVI

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")

N = 20
OK = torch.arange(N) % 3 > 0
X = torch.randn(N, generator=torch.Generator().manual_seed(0))
Y = X.exp()
HIDDEN = torch.where(OK, Y, torch.nan)
SUPPORTS = {
    "lognormal": (lambda s: dist.LogNormal(0.0, s), 1.0),
    "uniform": (lambda s: dist.Uniform(-s, 20 * s), 1.0),
    "poisson": (lambda s: dist.Poisson(s), 2.0),
    "bernoulli": (lambda s: dist.Bernoulli(s / 9), 1.0),
    "simplex": (lambda s: dist.Dirichlet(s * torch.ones(3)), torch.tensor([0.2, 0.3, 0.5])),
    "mixture": (lambda s: dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Gamma(s, torch.ones(2))), 1.0),
}


def line(x, ok, y=None):
    a, b = (pyro.sample(name, dist.Normal(0.0, 2.0)) for name in "ab")
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.LogNormal(a + b * x, 0.3), obs=y, obs_mask=ok)


def unlabelled(y):
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(a, 1.0), obs=y, obs_mask=~y.isnan())


@pytest.mark.parametrize("kind", SUPPORTS)
@pytest.mark.parametrize("hidden", [torch.nan, -50.0])
def test_densities_and_gradients_are_those_of_what_is_seen(kind, hidden) -> None:
    make, value = SUPPORTS[kind]
    scale = torch.tensor(1.5, requires_grad=True)
    seen = torch.as_tensor(value).expand(4, *torch.as_tensor(value).shape)
    mask = torch.tensor([True, False, True, False])
    obs = torch.where(mask.reshape(4, *[1] * (seen.dim() - 1)), seen, hidden)

    def model():
        with pyro.plate("data", 4):
            pyro.sample("y", make(scale), obs=obs, obs_mask=mask)

    with hidden_outcomes_unread():
        trace = pyro.poutine.trace(model).get_trace()
        trace.compute_log_prob()
    total = trace.nodes["y_observed"]["log_prob_sum"]
    right = 2 * make(scale).log_prob(seen[0]).sum()
    torch.testing.assert_close(total, right)
    one, other = (torch.autograd.grad(t, scale)[0] for t in (total, right))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("algorithm", [SVI(steps=30), NUTS(draws=30, warmup=30, chains=1, processes=1)])
def test_a_fit_is_that_with_a_filler(algorithm, tmp_path) -> None:
    fits = [pg.fit(line, {"x": X, "ok": OK, "y": y}, algorithm, seed=0) for y in (HIDDEN, torch.where(OK, Y, 1.0))]
    nan, filled = fits
    for name, value in filled.posterior(draws=5, seed=1).items():
        assert torch.equal(nan.posterior(draws=5, seed=1)[name], value) and bool(value.isfinite().all())
    assert nan.evidence(seed=1).mean == filled.evidence(seed=1).mean
    rows = {"x": X[:6], "ok": OK[:6], "y": HIDDEN[:6]}
    assert nan.evidence(rows, seed=1).mean == filled.evidence({**rows, "y": Y[:6]}, seed=1).mean
    drawn = nan.predict(rows, draws=4, seed=1)["y"]
    assert bool(drawn.isfinite().all()) and torch.equal(
        drawn, filled.predict({**rows, "y": Y[:6]}, draws=4, seed=1)["y"]
    )
    assert nan.data.same_rows(nan.dataset({"x": X, "ok": OK, "y": HIDDEN}))
    again = pg.load(nan.save(tmp_path / "fit"), program=line)
    assert torch.equal(again.posterior(draws=5, seed=1)["a"], nan.posterior(draws=5, seed=1)["a"])
    assert nan.to_arviz(draws=5) is not None


def test_a_mask_made_of_the_nan_themselves_in_minibatches_and_comparisons() -> None:
    y = torch.where(OK, X, torch.nan)
    fit = pg.fit(unlabelled, y, SVI(steps=1500, lr=0.02, batch_size=10), seed=0)
    n, total = int(OK.sum()), float(X[OK].sum())
    draws = fit.posterior(draws=500, seed=0)["a"]
    assert abs(float(draws.mean()) - total / (n + 0.25)) < 2.5 * (n + 0.25) ** -0.5  # Adam on minibatches jitters
    table = pg.compare(unlabelled, y, {"iwae": SVI(IWAE(particles=3), steps=5)}, holdout=0.3, progress=False).table()
    assert len(table) == 1


def guide_reads(y):
    net = pyro.module("net", nn.Linear(1, 1))
    pyro.sample("a", dist.Normal(net(y.mean().reshape(1))[0], 1.0))


def masked(y):
    with pyro.plate("data", len(y)), pyro.poutine.mask(mask=~y.isnan()):
        pyro.sample("y", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0), obs=y)


def centred(y):
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(pyro.param("m", torch.tensor(0.0)) + y.mean(), 1.0), obs=y, obs_mask=~y.isnan())


@pytest.mark.parametrize("model", [masked, centred])
def test_what_reads_them_is_named(model) -> None:
    y = torch.where(OK, X, torch.nan)
    for ask in (lambda: pg.check(model, y), lambda: pg.fit(model, y, SVI(steps=2))):
        with pytest.raises(ValueError, match=r"7 value\(s\) are NaN[\s\S]*obs_mask[\s\S]*reads them at site 'y'"):
            ask()
    fit = pg.fit(model, X, SVI(steps=2))
    with pytest.raises(ValueError, match="reads them at site 'y'"):
        fit.evidence(y)
    with pytest.raises(ValueError, match="infinite"):
        pg.check(unlabelled, torch.where(OK, X, torch.inf))


def test_a_guide_that_reads_them_is_refused() -> None:
    with pytest.raises((ValueError, pg.NonFiniteError)):
        pg.fit(pg.Program(unlabelled, guide_reads), torch.where(OK, X, torch.nan), SVI(steps=2))
