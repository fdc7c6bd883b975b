"""Probabilistic PCA and factor analysis against closed forms, dense Gaussians and scikit-learn.

Tolerances: closed forms in float64 on a few hundred rows with covariances of condition below 1e3 round to below 1e-11,
so 1e-10. What EM reaches is as near as its last gain allows: a gain of g nats in total leaves errors of order
sqrt(g / N) in the parameters, and errors of order g in the log-likelihood.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from fixtures import float64_under
from pyro import poutine

import ppl_gen as pg
from ppl_gen.inference import EM, NUTS, SVI
from ppl_gen.models import factor_analysis, ppca, principal_components, reconstructions
from ppl_gen.models.linear.program import aligned

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")  # chains and guides are short on purpose

STILL = SVI(steps=1, lr=1e-30)  # one step too small to change anything


float64_and_seed = float64_under(7)


def rows(n=300, d=6, noise=0.7):
    """Two factors, in units far from standard ones."""
    generator = torch.Generator().manual_seed(0)
    w = 2 * torch.randn(d, 2, generator=generator)
    return 5 + torch.randn(n, 2, generator=generator) @ w.T + noise * torch.randn(n, d, generator=generator)


def with_gaps(x, share=0.2):
    """A fifth of the entries missing, with nonsense in their places."""
    seen = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) >= share
    return {"x": torch.where(seen, x, 1e4), "mask": seen}


def covariance(values):
    noise = values["noise"].square().expand(len(values["loc"]))
    return values["loadings"] @ values["loadings"].T + noise.diag()


def point(fit):
    return {name: value[0] for name, value in fit.posterior(draws=1).items()}


def dense(values, x, mask=None):
    """log Normal(x | loc, WW' + noise), each row by itself, over its observed entries."""
    total, c = [], covariance(values)
    for i, row in enumerate(x):
        at = torch.arange(x.shape[1]) if mask is None else mask[i].nonzero().squeeze(-1)
        normal = torch.distributions.MultivariateNormal(values["loc"][at], c[at][:, at])
        total.append(normal.log_prob(row[at]))
    return torch.stack(total)


def best(x, latent=2):
    """The greatest log-likelihood per row, in closed form."""
    found = principal_components(x, latent)
    return float(dense({"loc": found.loc, "loadings": found.loadings, "noise": found.noise}, x).mean())


# -------------------------------------------------------------------------------------------------------- closed forms


def test_the_closed_form_is_that_of_tipping_and_bishop():
    x = rows()
    values, vectors = np.linalg.eigh(np.cov(x.numpy().T, bias=True))
    noise = values[:4].mean()
    w = vectors[:, 4:] * np.sqrt(values[4:] - noise)
    found = principal_components(x, 2)
    assert abs(float(found.noise) ** 2 - noise) < 1e-10
    torch.testing.assert_close(found.loadings @ found.loadings.T, torch.as_tensor(w @ w.T), rtol=0, atol=1e-10)


def test_its_log_likelihood_is_that_of_scikit_learn():
    from sklearn.decomposition import PCA

    x = rows()
    # scikit-learn divides by N - 1: on rows scaled by the root of N / (N - 1) about their mean it finds our covariance.
    shrunk = x.mean(0) + (x - x.mean(0)) * math.sqrt((len(x) - 1) / len(x))
    theirs = PCA(2, svd_solver="full").fit(shrunk.numpy())
    assert abs(best(x) - theirs.score(x.numpy())) < 1e-10


@pytest.mark.parametrize("recipe", [ppca, factor_analysis])
@pytest.mark.parametrize("gaps", [False, True])
def test_evidence_and_posterior_are_the_dense_gaussian_ones(recipe, gaps):
    x = rows(20)
    data = with_gaps(x) if gaps else {"x": x}
    fit = pg.fit(recipe(6, 2, prior="flat"), data, STILL)
    values = {name: value[0] for name, value in fit.posterior(draws=1).items()}
    mask = data.get("mask")
    assert fit.evidence().exact and fit.evidence().kind.startswith("exact; given one value of ")
    torch.testing.assert_close(fit.evidence().values, dense(values, x, mask), rtol=0, atol=1e-10)
    normal = fit.program.local_posterior(values, **data)["z"]
    for i in range(len(x)):
        at = torch.arange(6) if mask is None else mask[i].nonzero().squeeze(-1)
        gain = torch.linalg.solve(covariance(values)[at][:, at], values["loadings"][at]).T
        torch.testing.assert_close(normal.mean[i], gain @ (x[i, at] - values["loc"][at]), rtol=0, atol=1e-10)
        spread = torch.eye(2) - gain @ values["loadings"][at]
        torch.testing.assert_close(normal.covariance_matrix[i], spread, rtol=0, atol=1e-10)


def test_without_noise_the_posterior_is_principal_component_analysis():
    from sklearn.decomposition import PCA

    x = rows()
    closed = principal_components(x, 2)
    program = ppca(6, 2, start="principal")(x)
    unit, values = program.evidence.__self__.scale, program.start()
    for precision in (1e4, 1e8, 1e12):
        normal = program.local_posterior({**values, "precision": torch.tensor(precision)}, x)["z"]
        # Both gaps shrink as the noise variance over the eigenvalues of W'W, of order 1.
        assert float((normal.mean - closed.codes(x)).abs().max()) < 100 / precision
        assert float(normal.covariance_matrix.abs().max()) < 100 / precision
    theirs = torch.as_tensor(PCA(2, svd_solver="full").fit(x.numpy()).components_)
    cosines = torch.linalg.svdvals(theirs @ closed.axes)
    torch.testing.assert_close(cosines, torch.ones(2), rtol=0, atol=1e-10)
    assert float(unit) > 0


# ------------------------------------------------------------------------------------------------------------------ EM


def test_em_reaches_the_closed_form_and_starts_elsewhere():
    x = rows()
    closed = principal_components(x, 2)
    expected = covariance({"loc": closed.loc, "loadings": closed.loadings, "noise": closed.noise})
    before = pg.fit(ppca(6, 2, start="random"), x, EM(steps=1), seed=0)
    assert before.evidence().mean < best(x) - 0.01 and float((covariance(point(before)) - expected).abs().max()) > 0.1
    fit = pg.fit(ppca(6, 2, start="random"), x, EM(tolerance=1e-12), seed=0)
    assert fit.status == "converged" and fit.notes["M-step"].endswith("offered by the program")
    torch.testing.assert_close(covariance(point(fit)), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(point(fit)["loadings"] @ point(fit)["loadings"].T, closed.loadings @ closed.loadings.T)
    assert abs(fit.evidence().mean - best(x)) < 1e-10
    assert fit.history["log_likelihood"].values[-1] == pytest.approx(len(x) * best(x), rel=1e-12)


def test_em_stays_at_the_closed_form():
    x = rows()
    gained = pg.fit(ppca(6, 2), x, EM(steps=5, tolerance=0.0), seed=0).history["log_likelihood"]
    # Five E-steps of 300 rows of six numbers: sums near 3000 nats round to 1e-12 of that.
    assert float(np.ptp(gained.values)) < 1e-8 and abs(gained.values[0] / len(x) - best(x)) < 1e-10
    fit = pg.fit(ppca(6, 2), x, EM(), seed=0)
    assert fit.status == "converged" and fit.cost["steps"] <= 3


def many_rows(noise, n=12_000, d=100):
    """More than a million numbers in float32, with five factors."""
    generator = torch.Generator().manual_seed(2)
    draw = {"generator": generator, "dtype": torch.float32}
    return 3 + torch.randn(n, 5, **draw) @ torch.randn(5, d, **draw) + noise * torch.randn(n, d, **draw)


def test_rows_in_float32_give_the_fit_of_the_same_rows_in_float64():
    x = many_rows(noise=1.0)
    single, double = (pg.fit(ppca(latent=5), rows, EM(), seed=0) for rows in (x, x.double()))
    assert single.status == "converged" and single.recipe is not None
    # Products of B = 12000 rows in float32 (epsilon 6e-8): as errors of either sign sqrt(B) epsilon = 7e-6, of the
    # root of C_ii C_jj, for the sum of a chunk; blocks of some hundred rows are what is summed in float32.
    one, other = covariance(point(single)), covariance(point(double))
    scale = other.diagonal().sqrt()
    assert float(((one - other) / torch.outer(scale, scale)).abs().max()) < 7e-6
    last = [fit.history["log_likelihood"].values[-1] for fit in (single, double)]
    assert last[0] != last[1] and last[0] == pytest.approx(last[1], rel=1e-6)


def test_where_noise_is_small_products_are_in_float64():
    x = many_rows(noise=1e-3)  # a variance of 1e-6 under eigenvalues near 100
    single, double = (pg.fit(ppca(latent=5, floor=1e-12), rows, EM(steps=2), seed=0) for rows in (x, x.double()))
    torch.testing.assert_close(point(single)["noise"], point(double)["noise"], rtol=1e-9, atol=0)


def test_rows_fewer_than_columns_know_their_covariance_by_a_factor():
    x = rows(30, 50)
    fit = pg.fit(ppca(latent=3), x, EM(), seed=0)
    assert fit.status == "converged" and fit.evidence().mean == pytest.approx(best(x, 3), abs=1e-9)
    slow = pg.fit(ppca(latent=3, start="random"), x, EM(tolerance=1e-10), seed=0)
    assert slow.evidence().mean == pytest.approx(best(x, 3), abs=1e-6)


@pytest.mark.parametrize("written", [slice(None), 1], ids=["all rows", "one row"])
def test_data_changed_in_place_are_read_anew(written):
    x = rows(400).numpy()
    program = ppca(6, 2)(torch.from_numpy(x))
    x[written] *= 2.0
    fit = pg.fit(program, x, EM(tolerance=1e-12), seed=0)
    assert fit.evidence().mean == pytest.approx(best(torch.from_numpy(x)), abs=1e-8)


@pytest.mark.parametrize("patterns", [3, 60])
@pytest.mark.parametrize("recipe", [ppca, factor_analysis])
def test_expected_moments_with_gaps_are_those_of_each_row_by_itself(recipe, patterns):
    """Few patterns go one by one, many by a batch of products."""
    x = rows(60)
    some = torch.rand(patterns, 6, generator=torch.Generator().manual_seed(3)) < 0.7
    mask = some[torch.arange(60) % patterns]
    mask[:, 0] = True  # in some row, so that no column is missing throughout
    program = recipe(6, 2, start="random")({"x": x, "mask": mask})
    values = {name: value * 1.5 for name, value in program.start().items()}
    read = program.em.prepare(x, mask)
    assert len(read[0].seen) <= patterns
    total, found = program.em.e_step(values, *read)
    normal = program.local_posterior(values, x, mask)["z"]
    second = normal.covariance_matrix + normal.mean[:, :, None] * normal.mean[:, None, :]
    assert float(total) == pytest.approx(float(program.evidence(values, x, mask).sum()), rel=1e-12)
    torch.testing.assert_close(found["z_mean"], normal.mean.mean(0), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found["z_second"], second.mean(0), rtol=1e-10, atol=1e-10)
    y = program.evidence.__self__.standardised(x, mask)
    for column in range(6):
        at = mask[:, column]
        torch.testing.assert_close(found["zz"][column, :2, :2], second[at].mean(0), rtol=1e-10, atol=1e-10)
        crossed = (y[at, column, None] * normal.mean[at]).mean(0)
        torch.testing.assert_close(found["yz"][column, :2], crossed, rtol=1e-10, atol=1e-10)


def test_factor_analysis_equals_scikit_learn():
    from sklearn.decomposition import FactorAnalysis

    noise = torch.tensor([0.5, 0.7, 1.0, 0.6, 0.8, 0.9])
    x = rows(noise=noise) * torch.tensor([1.0, 10.0, 0.1, 3.0, 1.0, 1.0])
    theirs = FactorAnalysis(2, tol=1e-8, max_iter=20_000, svd_method="lapack").fit(x.numpy())
    start = pg.fit(factor_analysis(6, 2), x, EM(steps=1), seed=0)
    fit = pg.fit(factor_analysis(6, 2), x, EM(steps=5000, tolerance=1e-10), seed=0)
    assert start.evidence().mean < theirs.score(x.numpy()) - 0.01
    assert abs(fit.evidence().mean - theirs.score(x.numpy())) < 1e-6  # gains of 1e-10 shrink by a hundredth a step
    theirs_covariance = torch.as_tensor(theirs.get_covariance())
    scale = theirs_covariance.diagonal().sqrt()
    gap = (covariance(point(fit)) - theirs_covariance) / torch.outer(scale, scale)
    assert float(gap.abs().max()) < 1e-3


@pytest.mark.parametrize("recipe", [ppca, factor_analysis])
@pytest.mark.parametrize("prior", [False, True])
def test_em_with_gaps_never_falls_and_does_not_see_what_is_missing(recipe, prior):
    x = rows(120)
    data = with_gaps(x)
    fit = pg.fit(recipe(6, 2), data, EM(steps=60, prior=prior, tolerance=0.0), seed=0)
    values = fit.history["log_posterior" if prior else "log_likelihood"].values
    assert np.diff(values).min() > -1e-8 and values[-1] - values[0] > 10  # of some 1000 nats
    assert fit.history["log_likelihood"].values[-1] == pytest.approx(float(dense(point(fit), x, data["mask"]).sum()))
    other = pg.fit(recipe(6, 2), {**data, "x": torch.where(data["mask"], x, -3.0)}, EM(steps=60, prior=prior), seed=0)
    torch.testing.assert_close(covariance(point(other)), covariance(point(fit)), rtol=1e-3, atol=1e-3)


def test_a_step_on_complete_rows_is_the_step_of_a_mask_that_hides_nothing():
    x = rows(50)
    for recipe in (ppca(6, 2), factor_analysis(6, 2)):
        program = recipe(x)
        values, everything = program.start(), torch.ones_like(x, dtype=torch.bool)
        for prior in (False, True):
            steps = []
            for rest in ((), (everything,)):
                read = program.em.prepare(x, *rest)
                total, moments = program.em.e_step(values, *read)
                steps.append({**program.em.m_step(moments, values, prior, *read), "total": total})
            for name in steps[0]:
                torch.testing.assert_close(steps[0][name], steps[1][name], rtol=1e-10, atol=1e-10)


# ----------------------------------------------------------------------------------------------------------- SVI, NUTS


def gap_of_the_bound(fit, x):
    """KL(q(z | x) || p(z | x)) per row, in closed form: the ELBO is the evidence minus this."""
    values = {name: value[0] for name, value in fit.posterior(draws=1).items()}
    with fit.bound():
        q = poutine.trace(fit.guide).get_trace(x).nodes["z"]["fn"]
        p = fit.program.local_posterior(values, x)["z"]
        if not isinstance(q, torch.distributions.MultivariateNormal):
            q = torch.distributions.MultivariateNormal(q.mean, q.base_dist.scale.square().diag_embed())
        return float(torch.distributions.kl_divergence(q, p).mean())


@pytest.mark.parametrize("guide", ["exact", "full", "diagonal"])
def test_the_linear_variational_autoencoder_is_ppca(guide):
    x, steps = rows(200), 300 if guide == "exact" else 1000
    recipe = ppca(6, 2, prior="flat", guide=guide, start="random")
    untrained = pg.fit(recipe, x, STILL, seed=0)
    assert untrained.evidence().mean < best(x) - 0.1
    assert guide == "exact" or gap_of_the_bound(untrained, x) > 0.1

    def falling(optimiser):
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)

    fit = pg.fit(recipe, x, SVI(steps=steps, lr=0.05, schedule=falling), seed=0)
    gap = gap_of_the_bound(fit, x)
    assert best(x) - 1e-3 < fit.evidence().mean <= best(x) + 1e-10
    assert best(x) - 1e-3 < fit.evidence().mean - gap
    if guide == "diagonal":  # which pays for columns of W that are not orthogonal
        w = fit.posterior(draws=1)["loadings"][0]
        cosine = torch.nn.functional.cosine_similarity(w[:, 0], w[:, 1], dim=0)
        assert abs(float(cosine)) < 0.1


def test_priors_give_a_posterior_and_new_rows_their_exact_latents():
    x = rows(100)
    fit = pg.fit(ppca(6, 2), x, SVI(steps=400, lr=0.05), seed=0)
    estimate = fit.evidence(x[:10], draws=20)
    assert estimate.kind.startswith("averaged over 20 posterior draws") and not estimate.exact
    draws = fit.posterior(draws=20)
    each = [dense({n: v[s] for n, v in draws.items()}, x[:10]) for s in range(20)]
    by_hand = torch.logsumexp(torch.stack(each), 0) - math.log(20)
    assert abs(estimate.mean - float(by_hand.mean())) < 0.2  # other draws of the same posterior
    new = pg.fit(ppca(6, 2), x, EM(), seed=0).posterior(x[:3] + 1.0, draws=4000)
    exact = principal_components(x, 2)
    spread = torch.linalg.inv(torch.eye(2) + exact.loadings.T @ exact.loadings / exact.noise**2)
    # Variances of 4000 normal draws are known to 2.2 %; 5.5 standard errors.
    found = torch.linalg.eigvalsh(torch.cov(new["z"][:, 0].T))
    torch.testing.assert_close(found, torch.linalg.eigvalsh(spread), rtol=0.13, atol=0.0)


def test_what_is_missing_is_filled_in():
    x = rows(200)
    data = with_gaps(x)
    fit = pg.fit(ppca(6, 2), data, EM(), seed=0)
    hidden = ~data["mask"]

    def miss(filled):
        return float((filled - x)[hidden].square().mean())

    assert miss(reconstructions(fit, data, draws=50)) < 0.5 * miss(x.mean(0).expand_as(x))
    assert miss(fit.predict(data, draws=50)["x"].mean(0)) < 0.5 * miss(x.mean(0).expand_as(x))


def test_draws_of_the_chain_are_rotated_onto_each_other():
    x = rows(40, 4)
    fit = pg.fit(ppca(4, 2, start="principal"), x, NUTS(draws=20, warmup=20, chains=1), seed=0)
    w = fit.posterior(draws=20)["loadings_standard"]
    inner = w.mT @ w.mean(0)  # symmetric and positive where no rotation brings a draw nearer to the mean
    lopsided = (inner - inner.mT).abs().amax((-1, -2)) / inner.abs().amax((-1, -2))
    assert float(lopsided.max()) < 0.2
    turned = aligned({"loadings_standard": w, "z": fit.posterior(draws=20)["z"]})
    torch.testing.assert_close(turned["loadings_standard"] @ turned["z"].mT, w @ fit.posterior(draws=20)["z"].mT)


# -------------------------------------------------------------------------------------------------------------- errors


def test_arguments_are_checked():
    for wrong in (
        {"latent": 3},
        {"latent": 0},
        {"prior": "none"},
        {"guide": "mean"},
        {"start": "kmeans"},
        {"floor": 0.0},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ppca(3, **{"latent": 1, **wrong})
    with pytest.raises(ValueError, match="latent"):
        principal_components(torch.ones(4, 2), 2)


def test_data_are_checked():
    x = rows(10)
    with pytest.raises(ValueError, match="rows of 5 columns"):
        ppca(5, 2)(x)
    x[2, 1] = math.nan
    with pytest.raises(ValueError, match=r"index \(2, 1\).*mask"):
        pg.fit(ppca(6, 2), x, EM())
    x[2, 1] = 0.0
    with pytest.raises(ValueError, match="expected booleans"):
        pg.fit(ppca(6, 2), {"x": x, "mask": torch.ones_like(x)}, EM())
    hidden = torch.ones(10, 6, dtype=torch.bool)
    hidden[:, 3] = False
    with pytest.raises(ValueError, match="column 3"):
        pg.fit(ppca(6, 2), {"x": x, "mask": hidden}, EM())
    x[:, 0] = 1.0
    with pytest.raises(ValueError, match=r"column\(s\) 0 are constant"):
        pg.fit(factor_analysis(6, 2), x, EM())
    assert pg.fit(ppca(6, 2), x, EM(steps=2)).evidence().exact, "one noise variance for all columns needs no such care"


def test_a_flat_prior_has_no_draws():
    with pytest.raises(pg.IncompatibleError, match="flat"):
        pg.prior_predictive(ppca(6, 2, prior="flat"), rows(10), draws=2)
    assert pg.prior_predictive(ppca(6, 2), rows(10), draws=2)["x"].shape == (2, 10, 6)
    fit = pg.fit(ppca(6, 2, prior="flat"), rows(10), STILL)
    assert fit.sample(4)["x"].shape == (4, 6)
