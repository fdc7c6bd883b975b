"""The library against answers known from elsewhere: closed forms, sums over all states, other libraries.

Float64 where exactness is claimed; every seed is fixed.
"""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import RenyiELBO
from scipy.integrate import quad
from scipy.stats import multivariate_t
from torch import nn
from versions import table, write

import ppl_gen as pg
from ppl_gen.data.batching import Batch
from ppl_gen.dryrun import dry_run
from ppl_gen.inference import CAVI, ELBO, EM, IWAE, SVI, Adversarial
from ppl_gen.inference.objectives.adversarial import COSTS
from ppl_gen.inference.objectives.base import Setting
from ppl_gen.isolation import isolated
from ppl_gen.models import gaussian_mixture, hidden_markov
from ppl_gen.models.boltzmann import BoltzmannMachine
from ppl_gen.models.noising import noise_schedule


@dataclass(frozen=True)
class Check:
    """Passed where ``error`` is at most ``tolerance``; the error of a bound is the bound minus what it must not exceed."""

    oracle: str
    compared: str
    error: float
    tolerance: float

    def row(self) -> list[str]:
        passed = "yes" if self.error <= self.tolerance else "**no**"
        return [self.oracle, self.compared, f"{self.error:.2g}", f"{self.tolerance:.2g}", passed]


def largest(ours, theirs) -> float:
    return float((torch.as_tensor(ours) - torch.as_tensor(theirs)).abs().max())


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


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
    yield Check(
        "theorem",
        f"largest fall of the log-likelihood in {len(two)} steps on the crabs",
        float(-np.diff(two).min()),
        1e-9,
    )


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
        elbo = pg.fit(gaussian_mixture(components=3, **prior), x, CAVI(steps=200, tolerance=0.0), seed=0).history[
            "elbo"
        ]
        fall = float(-np.diff(elbo.values).min())
        yield Check("theorem", f"largest fall of the ELBO in 200 sweeps, three {max(dims, 1)}-D normals", fall, 1e-9)


# ------------------------------------------------------------------------------------------------------- sums over states


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


# ---------------------------------------------------------------------------------------------------- diffusion and games


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


def optimal_critic() -> Iterator[Check]:
    p, q = dist.Normal(0.0, 1.0), dist.Normal(1.0, 1.5)
    grid = torch.linspace(-30.0, 30.0, 20_001)
    log_p, log_q = p.log_prob(grid), q.log_prob(grid)

    def half(one, other):
        def integrand(value):
            a, b = (float(each.log_prob(torch.tensor(value))) for each in (one, other))
            return math.exp(a) * (a - np.logaddexp(a, b) + math.log(2))

        return 0.5 * quad(integrand, -30, 30, limit=200, epsabs=1e-11)[0]

    expected = 2 * (half(p, q) + half(q, p)) - math.log(4)
    for kind in ("minimax", "non-saturating"):
        best = log_p - log_q
        paid = log_p.exp() * COSTS[kind].real(best) + log_q.exp() * COSTS[kind].fake(best)
        error = abs(float(-torch.trapezoid(paid, grid)) - expected)
        yield Check("quadrature", f"value of the {kind} game at its best critic and 2 JS - log 4", error, 1e-6)


def parallel_lines() -> Iterator[Check]:
    for theta in (1.0, -0.5):

        def lines(x, theta=theta):
            shift = pyro.param("theta", torch.tensor(theta))
            with pyro.plate("data", len(x)):
                h = pyro.sample("h", dist.Uniform(0.0, 1.0))
                pyro.sample("x", dist.Delta(torch.stack([shift.expand_as(h), h], -1), event_dim=1), obs=x)

        critic = nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 1))
        h = torch.linspace(0.0, 1.0, 1000)
        data, made = (torch.stack([torch.full_like(h, place), h], -1) for place in (0.0, theta))
        objective = Adversarial("wasserstein", critic=critic, penalty="gradient", penalty_weight=50.0, critic_steps=1)
        rates = {"critic": 1e-2, "program": 1e-12}  # the program stays where it is
        trained = pg.fit(lines, data, SVI(objective, steps=400, batch_size=64, lr=rates), seed=0).module("critic")
        w1 = [float((net(data) - net(made)).mean().detach()) for net in (critic, trained)]
        said = f"W1 of lines {abs(theta):g} apart by a penalised critic: {w1[0]:.3f} untrained, {w1[1]:.3f} trained"
        yield Check("closed form", said, abs(w1[1] - abs(theta)), 0.05 * abs(theta))


# ------------------------------------------------------------------------------------------------- bounds and minibatches


def conjugate(x):
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(theta, 1.0), obs=x)


def game_of(objective, program, x) -> Callable[[torch.Tensor], float]:
    """The bound in nats, minus N times the loss, as a function of the batch's rows."""
    whole = Batch((x,), {}, len(x), len(x))
    info = dry_run(program, whole, guide=program.guide)
    game = objective.build(Setting(program, program.model, program.guide, info, whole, minibatches=True))

    def bound(rows):
        with torch.no_grad():
            return -len(x) * float(game.loss("program", Batch((x[rows],), {}, len(rows), len(x), rows)).value)

    return bound


def bounds_on_minibatches() -> Iterator[Check]:
    particles, count = 10, 320
    x = 1.0 + torch.randn(8, generator=rng(1))
    exact = float(dist.MultivariateNormal(torch.zeros(8), torch.eye(8) + 1).log_prob(x))
    mean, sd = x.sum() / 9, 1.5 / 3  # the posterior's mean, and half as much again as its sd
    elbo = exact - (0.5 * (1.5**2 - 1) - math.log(1.5))  # the evidence less KL(guide || posterior)

    def guide(*_):
        pyro.sample("theta", dist.Normal(mean, sd))

    ours = game_of(IWAE(particles), pg.Program(conjugate, guide), x)

    def pyros(rows):
        def model():
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            with pyro.plate("data", 8, subsample=rows):
                pyro.sample("x", dist.Normal(theta, 1.0), obs=x[rows])

        return -RenyiELBO(alpha=0, num_particles=particles, vectorize_particles=True, max_plate_nesting=1).loss(
            model, guide
        )

    for size in (8, 4, 2, 1):
        values = {"ours": [], "pyro's": []}
        for turn in range(count):  # every batch of the partition equally often
            rows = torch.arange(8).roll(-size * (turn % (8 // size)))[:size]
            values["ours"].append(ours(rows))
            values["pyro's"].append(pyros(rows))
        bound, error = np.mean(values["ours"]), np.std(values["ours"]) / math.sqrt(count)
        theirs, spread = np.mean(values["pyro's"]), np.std(values["pyro's"]) / math.sqrt(count)
        said = (
            f"IWAE({particles}) on batches of {size} of 8: {bound:.3f} ({error:.3f}), "
            + (f"in theory {elbo:.3f}, " if size < 8 else "")
            + f"at most the evidence {exact:.3f}; "
            f"pyro's RenyiELBO(alpha=0): {theirs:.3f} ({spread:.3f})"
            + (", above it" if theirs > exact + 5 * spread else "")
        )
        yield Check("closed form", said, bound - exact, 5 * error)


def unbiased_minibatches() -> Iterator[Check]:
    """The mean over every batch equals the whole at the same draw of the globals: an identity, to rounding."""
    x = mixture_rows(0, 6)
    mixture = gaussian_mixture(components=2)(x)
    start = mixture.start()

    def conjugate_guide(*_):
        pyro.sample("theta", dist.Normal(30.0, 0.5))

    def mixture_guide(*_):
        pyro.sample("weights", dist.Dirichlet(torch.tensor([3.0, 4.0])))
        pyro.sample("loc_standard", dist.Normal(start["loc_standard"], 0.1).to_event(1))
        pyro.sample("precision", dist.Gamma(torch.tensor([5.0, 6.0]), 2.0).to_event(1))

    def mixture_model(x):
        return mixture.model(x)

    programs = {
        "conjugate Normal": pg.Program(conjugate, conjugate_guide),
        "mixture, assignments summed out": pg.Program(mixture_model, mixture_guide),
    }
    for name, program in programs.items():
        bound, error = game_of(ELBO(), program, x), 0.0
        for size in (1, 2, 4):
            batches = [torch.tensor(rows) for rows in itertools.combinations(range(6), size)]

            def value(rows, bound=bound):
                torch.manual_seed(3)
                return bound(rows)

            error = max(error, abs(np.mean([value(rows) for rows in batches]) - value(torch.arange(6))))
        yield Check("identity", f"ELBO, mean over all batches of 1, 2, 4 of 6 rows and the whole: {name}", error, 1e-8)


def evidence_by_importance() -> Iterator[Check]:
    x = 1.0 + torch.randn(8, generator=rng(1))
    exact = float(dist.MultivariateNormal(torch.zeros(8), torch.eye(8) + 1).log_prob(x))
    fit = pg.fit(conjugate, x, SVI(steps=300, lr=0.02), seed=0)
    found = fit.marginal_likelihood(draws=2000)
    said = f"log p(all data) by importance weighting from SVI's guide: {found.mean:.4f}, exact {exact:.4f}"
    yield Check("closed form", said, abs(found.mean - exact), 5 * found.mc_stderr)


ORACLES = (
    crabs_by_em,
    em_against_scikit_learn,
    cavi,
    markov,
    boltzmann,
    noising,
    optimal_critic,
    parallel_lines,
    bounds_on_minibatches,
    unbiased_minibatches,
    evidence_by_importance,
)
ABOUT = """
A bound's error is the bound minus what it must not exceed (negative: below it), its tolerance five standard errors; in
brackets, standard errors. All other errors are absolute, the largest where several numbers are compared.
"""


def main():
    began, checks = time.perf_counter(), []
    for oracle in ORACLES:
        with isolated(0, dtype=torch.float32 if oracle is parallel_lines else torch.float64):
            checks += list(oracle())
        print(f"{oracle.__name__}: {time.perf_counter() - began:.0f} s", flush=True)
    failed = [check for check in checks if not check.error <= check.tolerance]
    passed = f"{len(checks) - len(failed)} of {len(checks)} pass."
    body = table(["oracle", "what is compared", "error", "tolerance", "pass"], [check.row() for check in checks])
    write("oracles", "Oracles", f"{ABOUT.strip()}\n\n{passed}\n\n{body}", time.perf_counter() - began)
    raise SystemExit(len(failed))


if __name__ == "__main__":
    main()
