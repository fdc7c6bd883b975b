"""A guide from a vector: its draws and densities beside Pyro's own, and an algorithm that is written with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal

import ppl_gen as pg
from ppl_gen.data.batching import as_dataset
from ppl_gen.extending import GuidePosterior, Outcome, Unconstrained, guide_from_vector
from ppl_gen.inference import Algorithm

X = torch.linspace(0.5, 3.0, 6)
SIZE = 1 + 2 + 6  # a scale, two free numbers of three shares, a number for each row
LOC = torch.linspace(-0.5, 0.5, SIZE)
FACTOR = torch.eye(SIZE) * 0.4 + torch.tril(torch.full((SIZE, SIZE), 0.05), -1)


def program(x):
    """A positive site, a simplex, local latents, and a finite site that is summed out."""
    scale = pyro.sample("scale", dist.Gamma(2.0, 1.0))
    shares = pyro.sample("shares", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("data", len(x)):
        kind = pyro.sample("kind", dist.Categorical(shares))
        z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + kind, scale), obs=x)


@dataclass(frozen=True)
class Given(Algorithm):
    """A normal at the numbers given, or another distribution of the vector."""

    made: Any = None
    needs = (("density",),)

    def run(self, run):
        def vector():
            loc = pyro.param("loc", LOC.clone())
            return dist.MultivariateNormal(loc, scale_tril=pyro.param("factor", FACTOR.clone()))

        guide = guide_from_vector(run, self.made or vector)
        return Outcome(GuidePosterior(guide), state=run.workspace.snapshot())

    def outline(self, run):
        return self.run(run)


def test_draws_and_densities_are_those_of_pyros_normal_with_equal_parameters():
    fit = pg.fit(program, X, Given(), seed=0)
    theirs = AutoMultivariateNormal(poutine.block(program, hide=["kind"]), init_scale=1.0)
    with fit.bound(), pyro.get_param_store().scope():
        theirs(X)
        scale = FACTOR.diagonal()
        theirs.loc.data.copy_(LOC)
        theirs.scale = scale  # Pyro keeps the factor as scale times one of unit diagonal
        theirs.scale_tril = FACTOR / scale[:, None]
        for seed in range(5):
            pyro.set_rng_seed(seed)
            expected = poutine.trace(theirs).get_trace(X)
            with fit.bound(seed):
                found = poutine.trace(fit.guide).get_trace(X)
            for name in ("scale", "shares", "z"):
                assert torch.allclose(found.nodes[name]["value"], expected.nodes[name]["value"], rtol=1e-5), name
                jacobians = [t.nodes[name]["fn"].log_prob(t.nodes[name]["value"]).sum() for t in (found, expected)]
                assert torch.isclose(*jacobians, rtol=1e-5), name
            # A sum of terms of about ten nats in float32, which may nearly cancel.
            assert torch.isclose(found.log_prob_sum(), expected.log_prob_sum(), rtol=1e-5, atol=1e-4)


def test_the_density_of_a_draw_is_that_of_the_vector_less_the_jacobian_of_its_sites():
    fit = pg.fit(program, X, Given(), seed=0)
    with fit.bound():
        density = Unconstrained(fit.joint, fit.data.batch(), fit.info)
        trace = poutine.trace(fit.guide).get_trace(X)
        (u,) = [node["value"] for name, node in trace.nodes.items() if node.get("infer", {}).get("is_auxiliary")]
        placed = density._placed(u)
        log_q = dist.MultivariateNormal(LOC, scale_tril=FACTOR).log_prob(u) - placed.log_det
        assert torch.isclose(trace.log_prob_sum(), log_q, rtol=1e-5, atol=1e-4)
        assert all(torch.allclose(value, trace.nodes[name]["value"]) for name, value in placed.values.items())


@pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")
def test_a_fit_with_it_answers_every_question_and_comes_back(tmp_path):
    fit = pg.fit(program, X, Given(), seed=0)
    assert "pareto_k" in fit.diagnose(draws=100).attrs and fit.evidence(particles=5, draws=5).rows == 6
    tree = fit.to_arviz(draws=20)
    assert tree["posterior"]["z"].dims == ("chain", "draw", "data") and "log_q" in tree["sample_stats"]
    assert fit.posterior(draws=3)["kind"].shape == (3, 6), "the finite site is drawn given the others"
    back = pg.load(fit.save(tmp_path / "fit"), program=program, algorithm=Given())
    ours, theirs = fit.posterior(draws=5), back.posterior(draws=5)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")
def test_the_evidence_of_a_guide_at_the_posterior_is_exact():
    """theta ~ N(0, 1), x | theta ~ N(theta, 1): theta | x is N(sum / 7, 1 / 7), and the weights are all p(x)."""

    def conjugate(x):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(theta, 1.0), obs=x)

    fit = pg.fit(conjugate, X, Given(lambda: dist.Normal((X.sum() / 7).reshape(1), 7**-0.5).to_event(1)), seed=0)
    exact = dist.MultivariateNormal(torch.zeros(6), torch.eye(6) + 1.0).log_prob(X)
    assert abs(fit.marginal_likelihood(draws=50).mean - float(exact)) < 1e-4  # float32 rounding of 10 nats


def test_what_is_no_distribution_of_the_vector_is_refused():
    with pytest.raises(ValueError, match=r"expected draws of event shape \(9,\), for scale, shares, z, got"):
        pg.fit(program, X, Given(lambda: dist.Normal(torch.zeros(3), 1.0).to_event(1)))
    with pytest.raises(ValueError, match=r"got batch \[9\] and event \[\]"):
        pg.fit(program, X, Given(lambda: dist.Normal(torch.zeros(9), 1.0)))


def test_a_support_that_another_site_moves_is_refused():
    def moving(x):
        top = pyro.sample("top", dist.LogNormal(0.0, 1.0))
        low = pyro.sample("low", dist.Uniform(torch.zeros(()), top))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(low, 1.0), obs=x)

    with pytest.raises(pg.IncompatibleError, match="the support of low depends on top in 'moving'"):
        pg.fit(moving, X, Given(lambda: dist.Normal(torch.zeros(2), 1.0).to_event(1)))


def test_potentials_of_many_points_at_once_are_those_of_each():
    """By `torch.func.vmap`, slopes too; a finite site is summed out, the support of two others is bounded."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        points = torch.randn(20, SIZE)
    density = Unconstrained(program, as_dataset(X, program).batch(), pg.check(program, X))
    slopes, values = torch.func.vmap(torch.func.grad_and_value(density.potential))(points)
    for point, slope, value in zip(points, slopes, values, strict=True):
        alone, its = density.potential_and_gradient(point)
        assert torch.allclose(value, alone, rtol=1e-5) and torch.allclose(slope, its, rtol=1e-3, atol=1e-3)
    assert float(values.std()) > 1.0, "the points differ"
