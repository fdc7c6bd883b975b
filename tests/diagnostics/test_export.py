"""From every kind of fit to ArviZ, with honest diagnostics."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import (
    both,
    both_guide,
    conjugate,
    conjugate_guide,
    conjugate_posterior,
    eight_schools,
    local,
    local_exact_guide,
    local_guide,
    no_plate,
)
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal

import ppl_gen as pg
from ppl_gen.bridge import group, group_names
from ppl_gen.inference import CAVI, EM, NUTS, SVI, Adversarial
from ppl_gen.models import gan, gaussian_mixture

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")  # chains and guides are short on purpose

X = torch.linspace(-1.0, 2.0, 12)
SCHOOLS = {
    "sigma": torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18]),
    "y": torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12]),
}


def test_chains_keep_their_dimensions_and_statistics():
    fit = pg.fit(eight_schools, SCHOOLS, NUTS(draws=50, warmup=50, chains=2, processes=1), seed=0)
    tree = fit.to_arviz(draws=40)
    wanted = {"posterior", "posterior_predictive", "log_likelihood", "prior", "observed_data", "sample_stats"}
    assert wanted <= set(group_names(tree))
    assert dict(tree.posterior.sizes) == {"chain": 2, "draw": 50, "data": 8}
    assert tree.posterior["offset"].dims == ("chain", "draw", "data")
    assert tree.log_likelihood["y"].dims[-1] == "data" and tree.log_likelihood.sizes["chain"] == 2
    assert 30 <= tree.log_likelihood.sizes["chain"] * tree.log_likelihood.sizes["draw"] <= 60, "thinned to about 40"
    assert "diverging" in tree.sample_stats
    assert np.allclose(tree.observed_data["y"], SCHOOLS["y"]) and np.allclose(
        tree.constant_data["sigma"], SCHOOLS["sigma"]
    )
    assert "r_hat" in fit.diagnose().columns and math.isnan(fit.diagnose().attrs["pareto_k"])


def test_pointwise_log_likelihood_is_that_of_each_draw():
    fit = pg.fit(pg.Program(conjugate, conjugate_guide), X, SVI(steps=5), seed=0)
    tree = fit.to_arviz(draws=30)
    theta = torch.as_tensor(tree.posterior["theta"].values[0])
    expected = dist.Normal(theta[:, None], 1.0).log_prob(X)
    assert np.abs(tree.log_likelihood["x"].values[0] - expected.numpy()).max() < 1e-5  # float32 rounding of ~2 nats


def test_log_p_and_log_q_are_those_of_the_draws():
    fit = pg.fit(pg.Program(conjugate, conjugate_guide), X, SVI(steps=5), seed=0)
    tree = fit.to_arviz(draws=30, seed=9)
    theta = torch.as_tensor(tree.posterior["theta"].values[0])
    with fit.bound():
        site = pyro.poutine.trace(conjugate_guide).get_trace(X).nodes["theta"]["fn"]
        log_q = site.log_prob(theta)
    log_p = dist.Normal(0.0, 1.0).log_prob(theta) + dist.Normal(theta[:, None], 1.0).log_prob(X).sum(-1)
    assert np.abs(tree.sample_stats["log_q"].values[0] - log_q.numpy()).max() < 1e-4
    assert np.abs(tree.sample_stats["log_p"].values[0] - log_p.numpy()).max() < 1e-4


def test_a_guide_at_the_posterior_is_trusted_and_a_narrow_one_is_not():
    exact = conjugate_posterior(X)

    def guide_of(scale):
        def guide(x):
            mean = pyro.param("mean", exact.mean)
            pyro.sample("theta", dist.Normal(mean, scale * exact.stddev))

        return guide

    tiny = SVI(steps=1, lr=1e-9)
    exact_fit = pg.fit(pg.Program(conjugate, guide_of(1.0)), X, tiny, seed=0)
    good = exact_fit.diagnose()
    assert str(exact_fit.verdict) == good.attrs["verdict"] and exact_fit.verdict is exact_fit.verdict
    assert good.attrs["pareto_k"] < 0.3 and good.attrs["verdict"].startswith("trust")
    # The ratio of a normal to one of a fifth of its width has a tail of shape k = 1 - 1/25 (proposal variance ratio).
    bad = pg.fit(pg.Program(conjugate, guide_of(0.2)), X, tiny, seed=0).diagnose()
    assert bad.attrs["pareto_k"] > bad.attrs["pareto_k_threshold"] and not bad.attrs["verdict"].startswith("trust")


def test_local_latents_are_judged_row_by_row():
    exact = pg.fit(pg.Program(local, local_exact_guide), X, SVI(steps=1, lr=1e-9), seed=0) if _learns() else None
    amortised = pg.fit(pg.Program(local, local_guide), X, SVI(steps=5), seed=0)
    for fit in filter(None, (exact, amortised)):
        frame = fit.diagnose(draws=200)
        assert frame.attrs["pareto_k_rows"].shape == (12,)
        assert math.isnan(frame.attrs["pareto_k"]), "there are no globals to judge jointly"
    fit = pg.fit(pg.Program(both, both_guide), X, SVI(steps=5), seed=0)
    assert fit.diagnose(draws=25).attrs["pareto_k_rows"].shape == (12,), "the fewest draws that k-hat takes"
    mixed = fit.diagnose(draws=200)
    assert math.isfinite(mixed.attrs["pareto_k"]) and mixed.attrs["pareto_k_rows"].shape == (12,)


def _learns() -> bool:
    """Whether the exact guide has a parameter for SVI to move."""
    with pyro.get_param_store().scope():
        return any(n["type"] == "param" for n in pyro.poutine.trace(local_exact_guide).get_trace(X).nodes.values())


def test_variational_draws_are_no_chains():
    fit = pg.fit(pg.Program(eight_schools, AutoMultivariateNormal), SCHOOLS, SVI(steps=20), seed=0)
    frame = fit.diagnose(draws=100)
    assert "r_hat" not in frame.columns and "ess_bulk" not in frame.columns
    assert math.isfinite(frame.attrs["pareto_k"])


@pytest.mark.parametrize("algorithm", [EM(steps=5), CAVI(steps=5), SVI(steps=5)], ids=lambda a: a.label)
def test_summed_out_sites_do_not_crowd_the_posterior(algorithm):
    fit = pg.fit(gaussian_mixture(components=2), X, algorithm, seed=0)
    tree = fit.to_arviz(draws=30)
    assert "assignment" not in tree.posterior and "loc" in tree.posterior
    assert tree.log_likelihood["x"].dims[-1] == "data"
    total = tree.log_likelihood["x"].values.sum(-1)
    if fit.learned.kind == "point":
        last = fit.records["log_likelihood"][-1]
        assert np.abs(total - last).max() < 0.5 and np.ptp(total) < 1e-9, "every draw is the point"
    assert fit.posterior(draws=3)["assignment"].shape == (3, 12), "fit.posterior draws them"


def test_a_point_guide_is_called_a_point():
    fit = pg.fit(pg.Program(conjugate, AutoDelta), X, SVI(steps=30, lr=0.05), seed=0)
    verdict = fit.diagnose().attrs["verdict"]
    assert "point" in verdict or "criterion" in verdict or "loss" in verdict
    assert math.isnan(fit.diagnose().attrs["pareto_k"])


def test_an_implicit_program_gives_what_it_has_and_says_what_it_lacks():
    rows = torch.randn(30, 2)
    fit = pg.fit(gan(2, latent=2, hidden=(8,)), rows, SVI(objective=Adversarial(), steps=3, batch_size=10), seed=0)
    tree = fit.to_arviz(draws=20)
    assert "posterior_predictive" in group_names(tree) and group(tree, "posterior") is None
    assert "log_likelihood: the program has no density" in tree.attrs["lacks"]
    assert not fit.diagnose().attrs["verdict"].startswith("trust")


def test_a_program_without_a_plate_has_one_row():
    fit = pg.fit(no_plate, X, SVI(steps=5), seed=0)
    tree = fit.to_arviz(draws=20)
    assert group(tree, "log_likelihood") is not None
    assert tree.log_likelihood[next(iter(tree.log_likelihood.data_vars))].shape[:2] == (1, 20)


def test_arviz_takes_it_from_there():
    import arviz

    fit = pg.fit(pg.Program(conjugate, conjugate_guide), X, SVI(steps=300, lr=0.02), seed=0)
    loo = arviz.loo(fit.to_arviz(draws=500))
    # Leave-one-out by its closed form: the prior counts as a row, theta | rest ~ N(sum of rest / n, 1 / n).
    n = len(X)
    rest = (X.sum() - X) / n
    exact = float(dist.Normal(rest, math.sqrt(1 + 1 / n)).log_prob(X).sum())
    value = float(loo.elpd_loo if hasattr(loo, "elpd_loo") else loo.elpd)
    assert abs(value - exact) < 0.3  # 500 draws: a Monte Carlo error of about 0.05, a guide within 0.1 sd


def test_rows_inside_a_dict_are_as_many_as_their_plate_has():
    """An argument that is a dict has no rows of its own; their number was taken for one, and the export failed."""

    def line(batch):
        slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(batch["x"])):
            pyro.sample("y", dist.Normal(slope * batch["x"], 0.5), obs=batch["y"])

    x = torch.linspace(-1.0, 1.0, 7)
    rows = ({"x": x, "y": 2 * x},)
    fit = pg.fit(line, rows, SVI(steps=5), seed=0)
    assert fit.to_arviz(draws=4)["log_likelihood"]["y"].shape[-1] == 7
    assert fit.evidence(draws=4).rows == 7
    assert "None" not in str(pg.check(line, rows)).splitlines()[0]
