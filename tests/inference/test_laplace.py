"""Laplace approximations against closed forms and scipy, and where there is none to take."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from posteriordb_programs import POSTERIORS
from scipy.optimize import minimize
from scipy.special import expit, gammaln

import ppl_gen as pg
from ppl_gen.inference import Laplace

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")

G = torch.Generator().manual_seed(3)
INPUTS = torch.randn(60, 3, generator=G, dtype=torch.float64) * torch.tensor([1.0, 30.0, 0.02], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, -0.02, 20.0], dtype=torch.float64)


def linear(x, y):
    b = pyro.sample("b", dist.Normal(x.new_zeros(3), x.new_tensor([2.0, 1.0, 50.0])).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ b, 0.7), obs=y)


def exact_linear(x, y):
    """Mean and covariance of b: the normal equations."""
    precision = x.T @ x / 0.49 + torch.diag(x.new_tensor([2.0, 1.0, 50.0]) ** -2)
    covariance = torch.linalg.inv(precision)
    return covariance @ (x.T @ y) / 0.49, covariance


LINEAR = {"x": INPUTS, "y": INPUTS @ WEIGHTS + 0.7 * torch.randn(60, generator=G, dtype=torch.float64)}


def test_a_normal_posterior_is_exact() -> None:
    """Newton's last step leaves errors of rounding, 1e-16 times the spread of the units."""
    fit = pg.fit(linear, LINEAR, Laplace())
    mean, covariance = exact_linear(**LINEAR)
    loc, found = fit.guide.moments()
    sd = covariance.diagonal().sqrt()
    assert float(((loc - mean) / sd).abs().max()) < 1e-8
    assert torch.allclose(found / sd / sd[:, None], covariance / sd / sd[:, None], rtol=0, atol=1e-9)
    assert fit.status is pg.Status.CONVERGED and fit.verdict.grade == "trust"
    # log p(y): the importance weights of an exact guide are all equal
    joint = torch.distributions.MultivariateNormal(
        LINEAR["y"].new_zeros(60),
        0.49 * torch.eye(60, dtype=torch.float64)
        + (INPUTS * INPUTS.new_tensor([2.0, 1.0, 50.0])) @ (INPUTS * INPUTS.new_tensor([2.0, 1.0, 50.0])).T,
    )
    assert fit.marginal_likelihood().mean == pytest.approx(float(joint.log_prob(LINEAR["y"])), abs=1e-6)


def test_the_history_rises_and_the_first_point_is_not_the_maximum() -> None:
    fit = pg.fit(linear, LINEAR, Laplace())
    values = np.asarray(fit.records["log_density"])
    assert (np.diff(values) >= -1e-9).all() and values[-1] > values[0] + 1.0


@pytest.mark.parametrize("family", ["bernoulli", "poisson"])
def test_generalised_linear_models_agree_with_scipy(family: str) -> None:
    """Both find the maximum to 1e-6 sd; the Hessian is X' diag(w) X plus the prior's, in closed form."""
    rng = np.random.default_rng(0)
    x = np.column_stack([np.ones(80), rng.normal(size=80), rng.normal(size=80)])
    eta = x @ [0.3, -0.8, 0.5]
    y = (rng.random(80) < expit(eta)).astype(float) if family == "bernoulli" else rng.poisson(np.exp(eta)).astype(float)

    def model(x, y):
        b = pyro.sample("b", dist.Normal(x.new_zeros(3), 2.0).to_event(1))
        with pyro.plate("data", len(x)):
            known = dist.Bernoulli(logits=x @ b) if family == "bernoulli" else dist.Poisson((x @ b).exp())
            pyro.sample("y", known, obs=y)

    def potential(b):
        e = x @ b
        likelihood = y * e - np.logaddexp(0, e) if family == "bernoulli" else y * e - np.exp(e) - gammaln(y + 1)
        return -likelihood.sum() + (b @ b) / 8

    def slope(b):
        e = x @ b
        return -x.T @ (y - (expit(e) if family == "bernoulli" else np.exp(e))) + b / 4

    theirs = minimize(potential, np.zeros(3), jac=slope, method="BFGS", options={"gtol": 1e-10}).x
    e = x @ theirs
    weight = expit(e) * (1 - expit(e)) if family == "bernoulli" else np.exp(e)
    covariance = np.linalg.inv(x.T @ (weight[:, None] * x) + np.eye(3) / 4)
    fit = pg.fit(model, {"x": torch.tensor(x), "y": torch.tensor(y)}, Laplace())
    loc, found = (value.numpy() for value in fit.guide.moments())
    sd = np.sqrt(np.diag(covariance))
    assert np.abs((loc - theirs) / sd).max() < 1e-6
    assert np.abs(found - covariance).max() < 1e-6 * sd.max() ** 2


def test_a_constrained_site_has_the_curvature_of_its_logarithm() -> None:
    """Gamma(a, b) by u = log z: the maximum at z = a / b, the curvature a, both exact."""
    x = torch.tensor([3.0, 5.0, 2.0, 4.0])

    def counts(x):
        rate = pyro.sample("rate", dist.Gamma(2.0, 0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Poisson(rate), obs=x)

    fit = pg.fit(counts, x, Laplace())
    loc, covariance = fit.guide.moments()
    a, b = 2.0 + float(x.sum()), 0.5 + len(x)
    assert float(loc) == pytest.approx(math.log(a / b), abs=1e-9) and float(covariance) == pytest.approx(
        1 / a, rel=1e-9
    )


@pytest.mark.parametrize(
    "name", ["kidiq-kidscore_momhsiq", pytest.param("low_dim_gauss_mix-low_dim_gauss_mix", marks=pytest.mark.slow)]
)
def test_means_of_posteriordb(name: str) -> None:
    """Posteriors of many rows: within 0.3 sd. The mode is 0.14 and 0.07 off; 4000 draws add 0.016 a standard error."""
    posterior = POSTERIORS[name]
    fit = pg.fit(posterior.program, posterior.data, Laplace(), seed=0)
    draws = {site: value[None] for site, value in fit.posterior(draws=4000, seed=1).items()}
    draws = draws if posterior.program.relabel is None else dict(posterior.program.relabel(draws))
    for parameter, value in posterior.draws(draws).items():
        reference = posterior.reference[parameter]
        assert abs(float(value.mean()) - reference["mean"]) < 0.3 * reference["sd"]
        assert 0.8 < float(value.std()) / reference["sd"] < 1.2
    assert fit.diagnose().attrs["pareto_k"] < 0.7


def funnel(y):
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    x = pyro.sample("x", dist.Normal(torch.zeros(9), (v / 2).exp()).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x.sum(), 100.0), obs=y)


def two_modes(y):
    w = pyro.sample("w", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(w.square(), 0.1), obs=y)


SQUARES = torch.ones(40, dtype=torch.float64)


def test_a_funnel_is_not_trusted() -> None:
    """Its maximum lies at v = -40, where no posterior mass is."""
    fit = pg.fit(funnel, torch.zeros(2), Laplace())
    assert fit.verdict.grade != "trust"


def test_one_of_two_modes_is_not_trusted() -> None:
    fit = pg.fit(two_modes, SQUARES, Laplace())
    assert fit.status is pg.Status.CONVERGED, "each mode is a maximum"
    assert fit.verdict.grade != "trust"


def test_a_ridge_without_a_maximum_is_no_normal() -> None:
    """A circle around 0, of which only the radius is known: along it the density is constant."""

    def ridge(y):
        a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(a.square().sum(), 0.1), obs=y)

    fit = pg.fit(ridge, torch.tensor([1.0, 2.0]), Laplace())
    assert fit.status is pg.Status.FAILED and "not that of a maximum" in fit.message
    assert fit.learned.kind == "point" and fit.verdict.grade == "do not trust"
    assert "found no posterior" in fit.verdict.reason


def test_it_is_saved_and_comes_back_without_its_algorithm(tmp_path) -> None:
    fit = pg.fit(linear, LINEAR, Laplace())
    fit.save(tmp_path / "fit")
    back = pg.load(tmp_path / "fit", program=linear)
    assert torch.equal(back.posterior(draws=5)["b"], fit.posterior(draws=5)["b"])
    assert back.evidence(seed=1).mean == fit.evidence(seed=1).mean


def test_a_support_that_moves_is_refused() -> None:
    def model(x):
        top = pyro.sample("top", dist.Exponential(1.0))
        z = pyro.sample("z", dist.Uniform(0.0, top))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(pg.IncompatibleError, match="support of z"):
        pg.fit(model, torch.zeros(3), Laplace())


def test_many_latent_numbers_are_refused() -> None:
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(pg.IncompatibleError, match="up to 2000 of them"):
        pg.fit(model, torch.zeros(2001), Laplace())


def test_no_start_names_the_site() -> None:
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc / 0.0, 1.0), obs=x)

    with pytest.raises(ValueError, match="no starting point has a finite"):
        pg.fit(model, torch.zeros(3), Laplace())


@pytest.mark.parametrize("compile, replayed", [("auto", True), (False, False)])
def test_compile_says_whether_the_density_is_replayed(compile, replayed) -> None:
    runs = []

    def model(x, y):
        runs.append(1)
        linear(x, y)

    found = pg.fit(model, LINEAR, Laplace(), compile=compile)
    asked = len(runs)
    other = pg.fit(model, LINEAR, Laplace(tolerance=1e-300, steps=40), compile=compile)
    assert (len(runs) - asked == asked) is replayed, "a replay runs the program for its checks alone"
    assert torch.allclose(found.guide.moments()[0], other.guide.moments()[0], rtol=1e-6)
