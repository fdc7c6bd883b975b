"""CAVI: exact where the mean field is exact, below the exact evidence elsewhere, and at scikit-learn's fixed point.

Float64. A bound of some tens of rows is a sum of log-gamma functions and quadratic forms of order 1e2: rounding stays
below 1e-11, and 1e-8 is generous.
"""

from __future__ import annotations

import dataclasses
import itertools
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate

import ppl_gen as pg
from ppl_gen.data.crabs import crab_ratios
from ppl_gen.errors import IncompatibleError, NonFiniteError
from ppl_gen.inference.cavi import CAVI
from ppl_gen.models import gaussian_mixture
from ppl_gen.program.extensions import CAVIUpdates
from ppl_gen.workspace.isolation import isolated

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")  # chains and guides are short on purpose

KINDS = [("full", 0), ("spherical", 2), ("diagonal", 2), ("full", 2)]
STRENGTH, DEGREES, SPREAD = 0.3, 4.5, 0.8


@pytest.fixture(autouse=True)
def float64_and_seed():
    with isolated(7, dtype=torch.float64):
        yield


def rows(dims, count=30):
    shift = torch.where(torch.arange(count) < count // 3, -2.0, 1.0)
    if dims == 0:
        return shift + 0.8 * torch.randn(count)
    return shift.unsqueeze(-1) + torch.randn(count, dims) @ (torch.eye(dims) + 0.3 * torch.ones(dims, dims))


def standardised(x, kind):
    """What the recipe promises: zero mean; unit variance of each column, or on average over columns if spherical."""
    variance = x.var(0, correction=0)
    unit = (variance.mean() if kind == "spherical" else variance).sqrt()
    return ((x - x.mean(0)) / unit).reshape(len(x), -1), float(
        unit.log().expand(1 if x.dim() == 1 else x.shape[1]).sum()
    )


def recipe(components, kind, **settings):
    prior = {"strength": STRENGTH, "degrees": DEGREES, "spread": SPREAD}
    return gaussian_mixture(components=components, covariance=kind, **prior, **settings)


def predictive_evidence(y, kind):
    """log p(y) of one component as a product of Student t predictive densities (Murphy 2007), row after row.

    Independent dimensions factorise; a spherical component of d dimensions is one scalar update per row and dimension.
    """
    from scipy.stats import multivariate_t, t

    y, total, size = np.asarray(y), 0.0, y.shape[1]
    if kind == "diagonal" or size == 1:
        for column in y.T:
            kappa, mean, a, b = STRENGTH, 0.0, DEGREES / 2, SPREAD / 2
            for value in column:
                total += t.logpdf(value, 2 * a, mean, (b * (kappa + 1) / (a * kappa)) ** 0.5)
                b += kappa * (value - mean) ** 2 / (2 * (kappa + 1))
                mean, kappa, a = (kappa * mean + value) / (kappa + 1), kappa + 1, a + 0.5
        return total
    if kind == "spherical":
        kappa, mean, a, b = STRENGTH, np.zeros(size), DEGREES / 2, SPREAD / 2
        for row in y:
            shape = np.eye(size) * b * (kappa + 1) / (a * kappa)
            total += multivariate_t.logpdf(row, mean, shape, 2 * a)
            b += kappa * ((row - mean) ** 2).sum() / (2 * (kappa + 1))
            mean, kappa, a = (kappa * mean + row) / (kappa + 1), kappa + 1, a + size / 2
        return total
    kappa, mean, nu, psi = STRENGTH, np.zeros(size), DEGREES, SPREAD * np.eye(size)
    for row in y:
        free = nu - size + 1
        total += multivariate_t.logpdf(row, mean, psi * (kappa + 1) / (kappa * free), free)
        psi = psi + kappa / (kappa + 1) * np.outer(row - mean, row - mean)
        mean, kappa, nu = (kappa * mean + row) / (kappa + 1), kappa + 1, nu + 1
    return total


@pytest.mark.parametrize(("kind", "dims"), [*KINDS, ("full", 3)])
def test_the_bound_of_one_component_is_the_exact_evidence(kind, dims):
    x = rows(dims)
    y, log_unit = standardised(x, kind)
    exact = predictive_evidence(y, kind) - len(x) * log_unit
    fit = pg.fit(recipe(1, kind), x, CAVI(), seed=0)
    assert abs(float(fit.history["elbo"][-1]) - exact) < 1e-8
    assert fit.status == "converged" and len(fit.history["elbo"]) <= 3


@pytest.mark.parametrize(("kind", "dims"), KINDS)
def test_the_bound_lies_below_the_evidence_summed_over_all_assignments(kind, dims):
    x = torch.cat([rows(dims, 6) * 3, torch.zeros_like(rows(dims, 1))])
    y, log_unit = standardised(x, kind)
    terms = []
    for assignment in itertools.product([0, 1], repeat=len(x)):
        which = torch.tensor(assignment)
        counts = torch.bincount(which, minlength=2).double()
        prior = (counts + 2).lgamma().sum() + torch.tensor(4.0).lgamma() - (counts.sum() + 4).lgamma()
        parts = [predictive_evidence(y[which == k], kind) for k in (0, 1) if bool((which == k).any())]
        terms.append(float(prior) + sum(parts))
    exact = float(torch.tensor(terms).logsumexp(0)) - len(x) * log_unit
    bound = float(pg.fit(recipe(2, kind), x, CAVI(), seed=0).history["elbo"][-1])
    assert bound < exact
    # The bound sees one of two orders of the components, log 2, and a mean field on seven rows loses some more.
    assert bound > exact - 6


@pytest.mark.parametrize(("kind", "dims"), KINDS)
@pytest.mark.parametrize("weights", ["free", "equal"])
def test_the_bound_never_falls(kind, dims, weights):
    fit = pg.fit(recipe(3, kind, weights=weights), rows(dims, 120), CAVI(steps=300, tolerance=0.0), seed=1)
    elbo = torch.as_tensor(fit.history["elbo"].values)
    assert elbo[-1] - elbo[0] > 1
    assert bool((elbo.diff() >= -1e-10 * elbo.abs().max()).all())
    assert fit.status == "finished" and len(elbo) == 300


@pytest.mark.parametrize("dims", [0, 2, 3])
def test_the_fixed_point_is_scikit_learns(dims):
    from sklearn.mixture import BayesianGaussianMixture

    x = rows(dims, 60)
    y, _ = standardised(x, "full")
    theirs = BayesianGaussianMixture(
        n_components=2,
        weight_concentration_prior_type="dirichlet_distribution",
        weight_concentration_prior=2.0,
        mean_precision_prior=STRENGTH,
        mean_prior=np.zeros(y.shape[1]),
        degrees_of_freedom_prior=DEGREES,
        covariance_prior=SPREAD * np.eye(y.shape[1]),
        reg_covar=0.0,
        tol=0.0,
        max_iter=1000,
        random_state=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tol=0 runs all iterations
        theirs.fit(y.numpy())
    fit = pg.fit(recipe(2, "full"), x, CAVI(steps=1000, tolerance=0.0), seed=0)
    ours = fit.params
    order = ours["loc_mean"].reshape(2, -1)[:, 0].argsort()
    their_order = theirs.means_[:, 0].argsort()
    scatter = (
        2 * ours["precision_rate"].reshape(2, 1, 1)
        if dims == 0
        else ours["covariance_scatter_tril"] @ ours["covariance_scatter_tril"].mT
    )
    degrees = 2 * ours["precision_shape"] if dims == 0 else ours["covariance_degrees"]
    pairs = (
        (ours["weights_concentration"], theirs.weight_concentration_),
        (ours["loc_mean"].reshape(2, -1), theirs.means_),
        (ours["loc_strength"], theirs.mean_precision_),
        (degrees, theirs.degrees_of_freedom_),
        (scatter / degrees.reshape(2, 1, 1), theirs.covariances_),
    )
    for mine, other in pairs:
        # Both run until rounding stops them; a convergence rate of 0.99 magnifies 1e-14 a hundredfold.
        torch.testing.assert_close(mine[order], torch.as_tensor(other)[their_order], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("kind", "dims"), KINDS)
def test_the_bound_is_below_that_of_the_same_guide_with_the_assignments_summed_out(kind, dims):
    """Summing z out is a tighter bound than a factor q(z); here by little, so that a wrong constant would show."""
    x = rows(dims, 60)
    fit = pg.fit(recipe(2, kind), x, CAVI(), seed=0)
    bound = float(fit.history["elbo"][-1])
    with fit.bound(seed=3):
        elbo = TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False)
        model = config_enumerate(fit.program.model)
        draws = torch.tensor([-elbo.loss(model, fit.guide, x) for _ in range(100)])
    mean, error = float(draws.mean()), float(draws.std() / len(draws) ** 0.5)
    assert mean > bound - 6 * error  # false alarms: 4 * 1e-9
    assert mean < bound + 3 + 6 * error


def test_the_crabs_are_two_species_here_too():
    x = crab_ratios()
    one = pg.fit(gaussian_mixture(components=1), x, CAVI(), seed=0)
    two = pg.fit(gaussian_mixture(components=2), x, CAVI(), seed=0)
    assert one.status == two.status == "converged"
    assert two.history["elbo"][0] < two.history["elbo"][-1] - 0.01
    assert float(two.history["elbo"][-1] - one.history["elbo"][-1]) > 10
    # Different starts, one optimum: a sweep below 2.5e-7 nats at rate 0.99 leaves less than 1e-4.
    other = pg.fit(gaussian_mixture(components=2), x, CAVI(), seed=1)
    assert abs(float(other.history["elbo"][-1] - two.history["elbo"][-1])) < 1e-3
    draws = two.posterior(draws=50)
    assert draws["loc"].shape == (50, 2) and draws["assignment"].shape == (50, 1000)
    assert abs(float(draws["loc"].mean()) - float(x.mean())) < 0.02


def test_same_seed_same_fit_and_a_fit_can_be_continued():
    x = rows(2, 60)
    short = pg.fit(recipe(2, "full"), x, CAVI(steps=4), seed=5)
    again = pg.fit(recipe(2, "full"), x, CAVI(steps=4), seed=5)
    for name, value in short.params.items():
        assert torch.equal(value, again.params[name])
    whole = pg.fit(recipe(2, "full"), x, CAVI(steps=8), seed=5)
    rest = pg.fit(recipe(2, "full"), x, CAVI(steps=4), seed=5, start=short)
    # Parameters pass through logarithms on the way: a rounding error or two.
    assert np.allclose(rest.history["elbo"], whole.history["elbo"][4:], rtol=1e-12)
    assert whole.history["elbo"][4] != whole.history["elbo"][0]


def test_a_program_without_updates_is_refused_with_both_sides():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    with pytest.raises(IncompatibleError, match="CAVI needs: +CAVI updates\n.*model offers") as caught:
        pg.fit(model, torch.zeros(3), CAVI(), seed=0)
    assert "gaussian_mixture" in str(caught.value)


def broken(change):
    """A sound program whose updates are spoilt."""

    def build(x):
        program = recipe(2, "full")(x)
        sound = program.cavi

        def step(parameters, x):
            return change(*sound.step(parameters, x))

        return dataclasses.replace(program, cavi=CAVIUpdates(sound.init, step, sound.guide, sound.constraints))

    return pg.Recipe(build)


def test_updates_that_lower_the_bound_are_an_error():
    values = iter([-3.0, -2.0, -2.5])
    with pytest.raises(ArithmeticError, match="the ELBO fell from -2 to -2.5 at step 3"):
        pg.fit(broken(lambda p, e: (p, torch.tensor(next(values)))), rows(2), CAVI(), seed=0)


def test_updates_that_are_not_finite_keep_the_last_finite_fit():
    values = iter([-3.0, -2.0, float("nan")])
    with pytest.raises(NonFiniteError, match="not finite at step 3") as caught:
        pg.fit(broken(lambda p, e: (p, torch.tensor(next(values)))), rows(2), CAVI(), seed=0)
    kept = caught.value.fit
    assert kept is not None and all(bool(value.isfinite().all()) for value in kept.params.values())
    assert len(kept.history["elbo"]) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps: expected a whole number of at least 1, got 0"),
        ({"tolerance": -1e-3}, "tolerance: expected a number from 0 up to 1, got -0.001"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CAVI(**settings)


@pytest.mark.slow
def test_advice_for_a_converged_fit_is_another_guide_and_not_more_steps() -> None:
    """The factors of the crabs' mixture are several times too narrow, however long the sweeps go on."""
    said = pg.fit(gaussian_mixture(components=2), pg.load_data("crabs"), CAVI(), seed=0).verdict
    assert not said.trusted and "richer guide" in said.advice and "more steps" not in said.advice
