"""Linear latent variables: closed forms, scikit-learn, the linear variational autoencoder, the principal subspace."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from checks import Check, largest, rng
from pyro import poutine
from torch.distributions import MultivariateNormal, kl_divergence

import ppl_gen as pg
from ppl_gen.inference import EM, SVI
from ppl_gen.models import autoencoder, factor_analysis, ppca, principal_components

__all__ = ["linear_autoencoder", "linear_gaussian", "linear_variational_autoencoder"]

STILL = SVI(steps=1, lr=1e-30)


def factor_rows(rows=300):
    """Two factors of six columns, in units far from standard ones."""
    w, noise = 2 * torch.randn(6, 2, generator=rng()), torch.tensor([0.5, 0.7, 1.0, 0.6, 0.8, 0.9])
    return 5 + torch.randn(rows, 2, generator=rng(1)) @ w.T + noise * torch.randn(rows, 6, generator=rng(2))


def falling(steps):
    return lambda optimiser: torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)


def point(fit):
    return {name: value[0] for name, value in fit.posterior(draws=1).items()}


def covariance(values):
    return values["loadings"] @ values["loadings"].T + values["noise"].square().expand(6).diag()


def greatest(x):
    """The greatest log-likelihood of PPCA per row (Tipping and Bishop 1999), from a dense covariance."""
    found = principal_components(x, 2)
    dense = covariance({"loadings": found.loadings, "noise": found.noise})
    return found, dense, float(MultivariateNormal(found.loc, dense).log_prob(x).mean())


def linear_gaussian() -> Iterator[Check]:
    from sklearn.decomposition import PCA, FactorAnalysis

    x = factor_rows()
    closed, dense, best = greatest(x)
    values, vectors = np.linalg.eigh(np.cov(x.numpy().T, bias=True))
    noise = values[:4].mean()
    w = vectors[:, 4:] * np.sqrt(values[4:] - noise)
    yield Check("numpy eigh", "noise variance of PPCA", abs(float(closed.noise) ** 2 - noise), 1e-10)
    yield Check("numpy eigh", "WW' of PPCA", largest(closed.loadings @ closed.loadings.T, w @ w.T), 1e-10)
    shrunk = x.mean(0) + (x - x.mean(0)) * math.sqrt((len(x) - 1) / len(x))
    theirs = PCA(2, svd_solver="full").fit(shrunk.numpy()).score(x.numpy())
    yield Check("scikit-learn", "log-likelihood of PPCA, after N / (N - 1)", abs(best - theirs), 1e-10)
    fit = pg.fit(ppca(6, 2), x, EM(tolerance=1e-12), seed=0)
    error = largest(covariance(point(fit)) / dense.diagonal().max(), dense / dense.diagonal().max())
    yield Check("closed form", "covariance of PPCA by EM, relative", error, 1e-6)
    yield Check("closed form", "evidence per row of PPCA by EM", abs(fit.evidence().mean - best), 1e-10)
    theirs = FactorAnalysis(2, tol=1e-8, max_iter=20_000, svd_method="lapack").fit(x.numpy()).score(x.numpy())
    fit = pg.fit(factor_analysis(6, 2), x, EM(steps=5000, tolerance=1e-10), seed=0)
    yield Check("scikit-learn", "evidence per row of factor analysis by EM", abs(fit.evidence().mean - theirs), 1e-6)
    seen = torch.rand(x.shape, generator=rng(3)) > 0.2
    fit = pg.fit(factor_analysis(6, 2), {"x": torch.where(seen, x, 1e3), "mask": seen}, EM(steps=200), seed=0)
    values, dense = point(fit), covariance(point(fit))
    rows = [s.nonzero().squeeze(-1) for s in seen]
    each = [MultivariateNormal(values["loc"][r], dense[r][:, r]).log_prob(x[i, r]) for i, r in enumerate(rows)]
    said = "evidence of each of 300 rows, a fifth of the entries missing"
    yield Check("dense Gaussian", said, largest(fit.evidence().values, torch.stack(each)), 1e-10)
    said = "largest fall of the log-likelihood by EM on these"
    yield Check("theorem", said, float(-np.diff(fit.history["log_likelihood"].values).min()), 1e-9)


def bound(fit, x):
    """The ELBO per row: the evidence minus KL(q(z | x) || p(z | x)), both normal."""
    with fit.bound():
        q = poutine.trace(fit.guide).get_trace(x).nodes["z"]["fn"]
        p = fit.program.local_posterior(point(fit), x)["z"]
    if not isinstance(q, MultivariateNormal):
        q = MultivariateNormal(q.mean, q.base_dist.scale.square().diag_embed())
    return fit.evidence().mean - float(kl_divergence(q, p).mean())


def linear_variational_autoencoder() -> Iterator[Check]:
    x, steps = factor_rows(200), 1500
    best = greatest(x)[2]
    for guide in ("full", "diagonal"):
        recipe = ppca(6, 2, prior="flat", guide=guide)
        trained = pg.fit(recipe, x, SVI(steps=steps, lr=0.05, schedule=falling(steps)), seed=0)
        untrained = best - bound(pg.fit(recipe, x, STILL, seed=0), x)
        said = f"of the linear VAE and PPCA's maximum, {guide} covariance, nats per row ({untrained:.2f} untrained)"
        yield Check("closed form", f"ELBO {said}", abs(best - bound(trained, x)), 1e-3)
        yield Check("closed form", f"evidence {said}", abs(best - trained.evidence().mean), 1e-3)


def linear_autoencoder() -> Iterator[Check]:
    from sklearn.decomposition import PCA

    x, steps = factor_rows(200), 1000
    axes = torch.as_tensor(PCA(2, svd_solver="full").fit(x.numpy()).components_.T)

    def angle(fit):
        with torch.no_grad():
            image = fit.module("decoder")(torch.eye(2)) - fit.module("decoder")(torch.zeros(1, 2))
        return float(torch.linalg.svdvals(torch.linalg.qr(image.T)[0].T @ axes).clamp(max=1).arccos().max())

    for tied in (False, True):
        recipe = autoencoder(6, 2, hidden=(), tied=tied)
        trained = pg.fit(recipe, x, SVI(steps=steps, lr=0.03, schedule=falling(steps)), seed=0)
        untrained = angle(pg.fit(recipe, x, STILL, seed=0))
        said = f"largest angle of the linear autoencoder{', tied,' * tied} to the subspace ({untrained:.2f} untrained)"
        yield Check("scikit-learn's PCA", said, angle(trained), 1e-2)
