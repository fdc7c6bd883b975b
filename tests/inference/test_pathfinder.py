"""Pathfinder against closed forms, a dense BFGS, several modes and a funnel."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from test_laplace import LINEAR, SQUARES, exact_linear, funnel, linear, two_modes
from torch.distributions import MultivariateNormal, kl_divergence

import ppl_gen as pg
from ppl_gen.inference import NUTS, Pathfinder
from ppl_gen.inference.inverse_hessian import implied_normal, next_diagonal
from ppl_gen.inference.lbfgs import advanced, begun

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")


def rosenbrock(u):
    u = u.detach().requires_grad_(True)
    value = ((1 - u[0]) ** 2 + 100 * (u[1] - u[0] ** 2) ** 2).sum()
    return value.detach(), torch.autograd.grad(value, u)[0]


def test_lbfgs_finds_the_end_of_a_bent_valley() -> None:
    path = begun(rosenbrock, torch.tensor([-1.2, 1.0], dtype=torch.float64))
    assert float(path.value) > 20
    falls = []
    for _ in range(100):
        after = advanced(rosenbrock, path, 6)
        falls.append(float(path.value - after.value))
        path = after
    assert torch.allclose(path.u, torch.ones(2, dtype=torch.float64), atol=1e-6) and min(falls) >= -1e-14
    assert path.gap == 0.0 and path.evaluations < 300


def test_lbfgs_turns_back_where_there_is_no_density() -> None:
    """-log u, with nothing below 0: the first step from 0.1 overshoots."""

    def potential(u):
        inside = bool(u[0] > 0)
        value = u[0] - u[0].log() if inside else u.new_tensor(float("inf"))
        return value, (1 - 1 / u if inside else torch.zeros_like(u))

    path = begun(potential, torch.tensor([5.0], dtype=torch.float64))
    for _ in range(30):
        path = advanced(potential, path, 6)
    assert float(path.u) == pytest.approx(1.0, abs=1e-6)


def test_the_implied_normal_is_that_of_dense_updates() -> None:
    """H' = (I - r s y') H (I - r y s') + r s s' for every pair, from diag(alpha): the textbook's formula."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    precision = root @ root.T + torch.eye(5, dtype=torch.float64)

    def potential(u):
        return u @ precision @ u / 2, precision @ u

    path = begun(potential, torch.randn(5, generator=generator, dtype=torch.float64))
    for _ in range(4):
        path = advanced(potential, path, 3)
    alpha = torch.rand(5, generator=generator, dtype=torch.float64) + 0.5
    dense, eye = torch.diag(alpha), torch.eye(5, dtype=torch.float64)
    for s, y in zip(path.steps, path.slopes, strict=True):
        r = 1 / (s @ y)
        left = eye - r * torch.outer(s, y)
        dense = left @ dense @ left.T + r * torch.outer(s, s)
    made = implied_normal(path, alpha)
    assert made is not None and len(path.steps) == 3
    assert torch.allclose(made.covariance(), dense, rtol=1e-9, atol=1e-12)
    assert torch.allclose(made.loc, path.u - dense @ path.slope, rtol=1e-9, atol=1e-12)
    noise = torch.randn(200_000, 5, generator=generator, dtype=torch.float64)
    u, density = made.draw(noise)
    exact = MultivariateNormal(made.loc, dense)
    assert torch.allclose(density, exact.log_prob(u), atol=1e-8)
    # an entry of a sample covariance has standard error below sqrt(2 / n) times the largest variance: six of them
    assert float((torch.cov(u.T) - dense).abs().max()) < 6 * (2 / 200_000) ** 0.5 * float(dense.diagonal().max())


def test_the_diagonal_satisfies_the_secant_equation_along_the_step() -> None:
    """s' diag(1 / alpha') s = s'y for any pair: a consequence of the update (Gilbert and Lemarechal 1989)."""
    generator = torch.Generator().manual_seed(1)
    s = torch.randn(6, generator=generator, dtype=torch.float64)
    y = s * (torch.rand(6, generator=generator, dtype=torch.float64) + 0.5)
    after = next_diagonal(torch.rand(6, generator=generator, dtype=torch.float64) + 0.5, s, y)
    assert bool((after > 0).all())


def test_a_normal_posterior() -> None:
    """In one number the secant is the curvature, and the answer exact; in three, KL(q || p) below 0.05 nats."""

    def one(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    loc, variance = pg.fit(one, x, Pathfinder(paths=1), seed=0).guide.moments()
    assert float(loc) == pytest.approx(6 / 3.01, abs=1e-7) and float(variance) == pytest.approx(1 / 3.01, rel=1e-6)
    fit = pg.fit(linear, LINEAR, Pathfinder(), seed=0)
    loc, covariance = fit.guide.moments()
    exact = MultivariateNormal(*exact_linear(**LINEAR))
    assert float(kl_divergence(MultivariateNormal(loc, covariance), exact)) < 0.05
    assert fit.status is pg.Status.CONVERGED and fit.verdict.grade == "trust"
    evidence = fit.marginal_likelihood()
    assert max(fit.records["elbo"]) <= evidence.mean + 0.3, "a bound, but for the noise of its estimate"
    assert fit.records["elbo"] == sorted(fit.records["elbo"]), "the best so far"


def test_several_paths_find_both_modes_in_their_shares() -> None:
    """Two modes of equal mass. Shares by 4000 draws, half of them effective, have standard error 0.5 / sqrt(2000)."""
    fit = pg.fit(two_modes, SQUARES, Pathfinder(paths=6, draws=4000), seed=0)
    positive = float((fit.posterior(draws=4000)["w"] > 0).double().mean())
    assert abs(positive - 0.5) < 5 * (0.011**2 + 0.25 / 4000) ** 0.5
    assert fit.verdict.grade == "trust"
    assert pg.fit(two_modes, SQUARES, Pathfinder(paths=1), seed=0).verdict.grade != "trust"


def test_a_lesser_mode_counts_for_what_it_holds() -> None:
    """Two modes of one shape, masses in the ratio of their priors: N(1, 1) at +1 and -1 weighs e^2 to 1, share 0.88."""

    def uneven(y):
        w = pyro.sample("w", dist.Normal(1.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(w.square(), 0.1), obs=y)

    y = torch.ones(40, dtype=torch.float64)
    fit = pg.fit(uneven, y, Pathfinder(paths=6, draws=4000), seed=0)
    grid = torch.linspace(-3, 3, 200_001, dtype=torch.float64)
    log = -0.5 * (grid - 1) ** 2 - 40 * 0.5 * ((1 - grid**2) / 0.1) ** 2
    exact = float(log[grid > 0].exp().sum() / log.exp().sum())
    shares, loc = fit.guide.shares, fit.guide.loc[:, 0]
    assert float(shares[loc > 0].sum()) == pytest.approx(exact, abs=0.04)
    assert 0.1 < 1 - exact < 0.15


@pytest.mark.slow
def test_a_funnel_is_not_trusted() -> None:
    assert pg.fit(funnel, torch.zeros(2), Pathfinder(), seed=0).verdict.grade != "trust"


def test_the_seed_alone_decides(tmp_path) -> None:
    first, again, other = (pg.fit(linear, LINEAR, Pathfinder(), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.guide.loc, again.guide.loc) and first.records == again.records
    assert not torch.equal(first.guide.loc, other.guide.loc)
    first.save(tmp_path / "fit")
    back = pg.load(tmp_path / "fit", program=linear)
    assert torch.equal(back.posterior(draws=5)["b"], first.posterior(draws=5)["b"])


def test_an_interrupt_keeps_the_best_normal() -> None:
    def stop(step, info):
        if step == 5:
            raise KeyboardInterrupt

    fit = pg.fit(linear, LINEAR, Pathfinder(), seed=0, callbacks=[stop])
    assert fit.status is pg.Status.INTERRUPTED and fit.posterior(draws=3)["b"].shape == (3, 3)


@pytest.mark.slow
def test_it_stands_in_comparisons() -> None:
    comparison = pg.compare(
        linear,
        LINEAR,
        {"paths": Pathfinder(), "chains": NUTS(draws=50, warmup=50, chains=2)},
        seeds=[0],
        progress=False,
    )
    assert "paths" in comparison.table().to_string()
