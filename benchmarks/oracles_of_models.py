"""Mixtures, Markov chains, Boltzmann machines, noise: closed forms, sums over all states, scikit-learn, Pyro."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyro.distributions as dist
import torch
from checks import Check, largest, rng
from pyro import poutine
from scipy.stats import multivariate_t

import ppl_gen as pg
from ppl_gen.inference import CAVI, EM
from ppl_gen.models import gaussian_mixture, hidden_markov
from ppl_gen.models.diffusion.noising import noise_schedule
from ppl_gen.models.energy.rbm import BoltzmannMachine

__all__ = ["boltzmann", "cavi", "crabs_by_em", "em_against_scikit_learn", "markov", "mixture_rows", "noising"]

# ------------------------------------------------------------------------------------------------- mixtures by EM, CAVI


def crabs_by_em() -> Iterator[Check]:
    crabs = pg.load_data("crabs")

    def maximum(**settings):
        return pg.fit(gaussian_mixture(**settings), crabs, EM(), seed=0).history["log_likelihood"].values

    two, one, equal = maximum(components=2), maximum(components=1), maximum(components=2, weights="equal")
    yield Check("crabs, published", f"maximum by EM {two[-1]:.6f} and 2567.5789", abs(two[-1] - 2567.5789), 1e-4)
    gain = two[-1] - one[-1]
    yield Check("crabs, published", f"gain over one normal {gain:.5f} and 26.604", abs(gain - 26.604), 2e-3)
    yield Check("crabs", f"equal weights {equal[-1]:.5f} and 2567.469", abs(equal[-1] - 2567.469), 2e-3)
    said = f"largest fall of the log-likelihood in {len(two)} EM steps that gain {two[-1] - two[0]:.2f} on the crabs"
    yield Check("theorem", said, float(-np.diff(two).min()), 1e-9)


def mixture_rows(dims, rows=200):
    """Three overlapping groups, in units far from standard: N, or N x dims."""
    which, noise = torch.arange(rows) % 3, torch.randn(rows, max(dims, 1), generator=rng())
    x = 40.0 + 5.0 * (torch.tensor([-3.0, 0.0, 2.5])[which, None] + noise @ (torch.eye(max(dims, 1)) + 0.4))
    return x if dims else x[:, 0]


def em_against_scikit_learn() -> Iterator[Check]:
    from sklearn.mixture import GaussianMixture

    for dims in (0, 2, 3):
        x = mixture_rows(dims)
        built = gaussian_mixture(components=3)(x)
        start = built.start()
        nodes = poutine.trace(poutine.condition(built.model, data=start)).get_trace(x).nodes
        spread = nodes["covariance"]["value"] if dims else nodes["scale"]["value"].square().reshape(3, 1, 1)
        rows = x.reshape(len(x), -1).numpy()
        theirs = GaussianMixture(
            3,
            weights_init=start["weights"].numpy(),
            means_init=nodes["loc"]["value"].reshape(3, -1).numpy(),
            precisions_init=torch.linalg.inv(spread).numpy(),
            init_params="random_from_data",
            reg_covar=0.0,
            tol=0.0,
            max_iter=11,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it has not converged, as intended
            theirs.fit(rows)
        ours = pg.fit(replace(built, start=lambda start=start: start), x, EM(steps=10, tolerance=0.0), seed=0)
        # Its bound belongs to the parameters before each step, ours to those after.
        error = largest(ours.history["log_likelihood"].values, np.array(theirs.lower_bounds_)[1:] * len(x))
        kind = f"{dims}-D full covariances" if dims else "1-D"
        yield Check("scikit-learn", f"log-likelihood of each of 10 EM steps, {kind}, 200 rows", error, 1e-8)


STRENGTH, DEGREES, SPREAD = 0.3, 4.5, 0.8


def student_evidence(y):
    """log p of rows under one normal with a normal-Wishart prior: a product of Student t densities (Murphy 2007)."""
    size, total = y.shape[1], 0.0
    kappa, mean, nu, psi = STRENGTH, np.zeros(size), DEGREES, SPREAD * np.eye(size)
    for row in y:
        free = nu - size + 1
        total += multivariate_t.logpdf(row, mean, psi * (kappa + 1) / (kappa * free), free)
        psi = psi + kappa / (kappa + 1) * np.outer(row - mean, row - mean)
        mean, kappa, nu = (kappa * mean + row) / (kappa + 1), kappa + 1, nu + 1
    return total


def cavi() -> Iterator[Check]:
    prior = {"strength": STRENGTH, "degrees": DEGREES, "spread": SPREAD}
    for dims in (0, 2):
        x = mixture_rows(dims, 60)
        unit = x.std(0, correction=0)
        y = ((x - x.mean(0)) / unit).reshape(len(x), -1)
        exact = student_evidence(y.numpy()) - len(x) * float(unit.log().sum())
        bound = pg.fit(gaussian_mixture(components=1, **prior), x, CAVI(), seed=0).history["elbo"].values[-1]
        yield Check(
            "closed form", f"ELBO of CAVI, one {max(dims, 1)}-D normal, and the evidence", abs(bound - exact), 1e-8
        )
        sweeps = CAVI(steps=200, tolerance=0.0)
        elbo = pg.fit(gaussian_mixture(components=3, **prior), x, sweeps, seed=0).history["elbo"].values
        said = (
            f"largest fall of the ELBO in 200 sweeps that gain {elbo[-1] - elbo[0]:.2f}, three {max(dims, 1)}-D normals"
        )
        yield Check("theorem", said, float(-np.diff(elbo).min()), 1e-9)


# ----------------------------------------------------------------------------------------------------- sums over states


def markov() -> Iterator[Check]:
    x = 20.0 + 4.0 * torch.randn(6, 7, generator=rng())
    fit = pg.fit(hidden_markov(states=3), x, EM(steps=3), seed=0)
    values = {name: draw[0] for name, draw in fit.posterior(draws=1).items()}
    first, step = values["initial"].log(), values["transition"].log()
    emission = dist.Normal(values["loc"], values["scale"])
    emitted = emission.log_prob(x[..., None])
    paths = torch.tensor(list(itertools.product(range(3), repeat=7)))
    prior = first[paths[:, 0]] + step[paths[:, :-1], paths[:, 1:]].sum(1)
    joint = prior + sum(emitted[:, t, paths[:, t]] for t in range(7))
    ours = fit.evidence().values
    yield Check(
        "sum over 2187 paths", "evidence of each of 6 rows, hidden_markov", largest(ours, joint.logsumexp(1)), 1e-10
    )
    # Pyro's begins with a transition: the first one here forgets where it came from.
    transitions = torch.cat([first.expand(1, 3, 3), step.expand(6, 3, 3)])
    theirs = dist.DiscreteHMM(torch.zeros(3), transitions, emission).log_prob(x)
    yield Check("pyro's DiscreteHMM", "the same", largest(ours, theirs), 1e-10)


def boltzmann() -> Iterator[Check]:
    machine = BoltzmannMachine(torch.randn(5, generator=rng()), 7, 1.5)
    v, h = (torch.tensor(list(itertools.product((0.0, 1.0), repeat=n))) for n in (5, 7))
    weights = (torch.einsum("ni,ij,mj->nm", v, machine.weight, h) + (v @ machine.visible_bias)[:, None]).detach()
    weights = weights + (h @ machine.hidden_bias).detach()
    error = largest(machine.free_energy(v).detach(), -weights.logsumexp(1))
    yield Check("sum over 128 states", "free energy of each of 32 rows, rbm", error, 1e-10)
    error = largest(machine.log_partition().detach(), weights.flatten().logsumexp(0))
    yield Check("sum over 4096 states", "log Z, rbm", error, 1e-10)


def noising() -> Iterator[Check]:
    for kind in ("linear", "cosine"):
        chain, start, error = noise_schedule(kind, 50), torch.tensor([[1.5, -0.4]]), 0.0
        mean, variance = start, 0.0  # of x_{t-1} given x_0, from single steps only
        for t in range(1, 51):
            kept, added = (float(value) for value in chain.step(torch.ones(1, 1), t))
            joint = kept**2 * variance + added**2
            gain, x = variance * kept / joint, torch.randn(1, 2, generator=rng(t))
            # (1 - gain kept) variance, which cancels nothing where the noise is small
            expected = mean + gain * (x - kept * mean), math.sqrt(variance * added**2 / joint)
            error = max(error, *(largest(a, b) for a, b in zip(chain.posterior(start, x, t), expected, strict=True)))
            mean, variance = kept * mean, joint
        yield Check("Gaussian algebra", f"mean and sd of q(x_t-1 given x_t, x_0), {kind}, 50 steps", error, 1e-8)
