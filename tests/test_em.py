"""EM against closed forms, scikit-learn, hand-written steps and scipy: E-step, M-steps of all kinds, starts, guards.

Float64 throughout. One step of EM in closed form is a handful of sums over at most 1000 rows, so that two right
implementations differ by some 1e-13 relative; ten steps of a contraction do not enlarge that. 1e-8 (asked for) leaves
five digits; where the data are small 1e-10 is used.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import ppl_gen as pg
from ppl_gen.extensions import EMSteps
from ppl_gen.inference import EM
from ppl_gen.models import gaussian_mixture

F64 = torch.float64


def tensor(*values):
    return torch.tensor(values, dtype=F64)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def close(actual, expected, tolerance):
    torch.testing.assert_close(torch.as_tensor(actual), torch.as_tensor(expected), rtol=tolerance, atol=tolerance)


def rises(fit, name="log_likelihood"):
    return bool((fit.history[name].diff("step") >= -1e-9).all())


def last(fit, name="log_likelihood"):
    return float(fit.history[name][-1])


# ---------------------------------------------------------------------------------------------------------- programs


def normals(x):
    """The user's own mixture of two normals: nothing offered, nothing standardised."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.tensor([2.0, 3.0])))
    with pyro.plate("components", 2):
        loc = pyro.sample("loc", dist.Normal(0.5, 2.0))
        scale = pyro.sample("scale", dist.LogNormal(-1.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)


def normals_log_density(values, x):
    return (values["weights"].log() + dist.Normal(values["loc"], values["scale"]).log_prob(x[:, None])).logsumexp(-1)


def normals_log_prior(values):
    return (
        dist.Dirichlet(tensor(2.0, 3.0)).log_prob(values["weights"])
        + dist.Normal(tensor(0.5), tensor(2.0)).log_prob(values["loc"]).sum()
        + dist.LogNormal(tensor(-1.0), tensor(1.0)).log_prob(values["scale"]).sum()
    )


def two_groups(count=60):
    noise = torch.randn(count, generator=rng(3), dtype=F64)
    return torch.where(torch.arange(count) % 3 == 0, -1.0 + 0.5 * noise, 1.5 + noise)


NORMALS_START = {"weights": tensor(0.4, 0.6), "loc": tensor(-0.5, 1.0), "scale": tensor(0.8, 1.3)}


def normals_step(values, x, weights=None):
    """One EM step by hand."""
    joint = values["weights"].log() + dist.Normal(values["loc"], values["scale"]).log_prob(x[:, None])
    share = joint.softmax(-1) * (1.0 if weights is None else weights[:, None])
    count = share.sum(0)
    loc = share.T @ x / count
    scale = ((share * (x[:, None] - loc) ** 2).sum(0) / count).sqrt()
    return {"weights": count / count.sum(), "loc": loc, "scale": scale}


def started(model, values, **parts):
    return pg.Program(model, start=lambda: values, **parts)


# ------------------------------------------------------------------------------------------------------------- crabs


def test_crabs_reach_the_maximum_of_the_likelihood():
    """2567.5789 and the gain of 26.604 over one normal are published values."""
    crabs = pg.load_data("crabs")
    first = pg.fit(gaussian_mixture(components=2), crabs, EM(steps=1), seed=0)
    assert last(first) < 2567.0, "one step does not do it"
    fit = pg.fit(gaussian_mixture(components=2), crabs, EM(), seed=0)
    assert fit.status is pg.Status.CONVERGED and fit.history["log_likelihood"].dims == ("step",)
    assert rises(fit) and abs(last(fit) - 2567.5789) < 1e-4
    assert fit.notes["M-step"] == "loc_standard, precision, weights: offered by the program"
    one = pg.fit(gaussian_mixture(components=1), crabs, EM(), seed=0)
    assert abs(last(fit) - last(one) - 26.604) < 2e-3 and one.status is pg.Status.CONVERGED


def test_crabs_by_a_derived_m_step_from_a_vague_prior():
    """The prior is centred far from the data: the start is found from five kicks off the saddle at 2540.97."""

    def crabs_of_two_kinds(x):
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("components", 2):
            loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
            scale = pyro.sample("scale", dist.HalfCauchy(1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)

    fit = pg.fit(crabs_of_two_kinds, pg.load_data("crabs"), EM(), seed=0)
    assert rises(fit) and abs(last(fit) - 2567.5789) < 1e-4
    assert float(fit.history["log_likelihood"][0]) < 2567.0
    assert fit.notes["M-step"] == (
        "weights: derived (weighted counts); loc: derived (weighted least squares); scale: derived (weighted residuals)"
    )
    assert fit.cost["restarts"] == 5 and fit.cost["trial_steps"] == 50
    assert fit.status is pg.Status.CONVERGED and "converged after" in fit.message


# ------------------------------------------------------------------------------------------- scikit-learn, step by step


@pytest.mark.parametrize("steps", [1, 2, 10])
@pytest.mark.parametrize("own", [False, True], ids=["offered", "derived"])
def test_steps_are_those_of_scikit_learn(steps, own):
    """The same start, no regularisation: parameters after each number of steps, diagonal covariances in two dimensions."""
    from sklearn.mixture import GaussianMixture

    x = torch.stack([two_groups(), two_groups().flip(0) * 0.7], -1)
    loc, scale = tensor([-0.5, 0.3], [1.0, -0.2]), tensor([0.8, 1.0], [1.3, 0.6])
    if own:

        def diagonal(x):
            weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
            loc = pyro.sample("loc", dist.Normal(torch.zeros(2, 2), 5.0).to_event(2))
            scale = pyro.sample("scale", dist.LogNormal(torch.zeros(2, 2), 1.0).to_event(2))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Categorical(weights))
                pyro.sample("x", dist.Normal(loc[z], scale[z]).to_event(1), obs=x)

        program = started(diagonal, {"weights": tensor(0.4, 0.6), "loc": loc, "scale": scale})
    else:
        built = gaussian_mixture(components=2, covariance="diagonal")(x)
        middle, unit = x.mean(0), x.std(0, correction=0)
        values = {"weights": tensor(0.4, 0.6), "loc_standard": (loc - middle) / unit, "precision": (unit / scale) ** 2}
        program = replace(built, start=lambda: values)
    fit = pg.fit(program, x, EM(steps=steps), seed=0)
    assert ("derived" if own else "offered") in fit.notes["M-step"]
    theirs = GaussianMixture(
        2,
        covariance_type="diag",
        weights_init=[0.4, 0.6],
        means_init=loc.numpy(),
        precisions_init=(scale**-2).numpy(),
        reg_covar=0.0,
        tol=0.0,
        max_iter=steps,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has not converged, as intended
        theirs.fit(x.numpy())
    found = {name: draws[0] for name, draws in fit.posterior(draws=1).items()}
    close(found["weights"], theirs.weights_, 1e-8)
    close(found["loc"], theirs.means_, 1e-8)
    close(found["scale"] ** 2, theirs.covariances_, 1e-8)
    close(last(fit), theirs.score(x.numpy()) * len(x), 1e-8)
    assert not torch.allclose(found["loc"], loc, atol=1e-2), "the first step moves"


# -------------------------------------------------------------------------------------------------- derived M-steps


@pytest.mark.parametrize("m_step", ["derived", "gradient"])
def test_one_step_is_the_one_made_by_hand(m_step):
    """L-BFGS stops at gradients of 1e-9 per row, which leaves parameters of order one within 1e-7."""
    x = two_groups()
    fit = pg.fit(started(normals, NORMALS_START), x, EM(steps=1, m_step=m_step), seed=0)
    assert m_step in fit.notes["M-step"]
    expected = normals_step(NORMALS_START, x)
    for name, value in expected.items():
        close(fit.point[name], value, 1e-10 if m_step == "derived" else 1e-5)
        assert not torch.allclose(value, NORMALS_START[name], atol=1e-3)
    close(last(fit), float(normals_log_density(expected, x).sum()), 1e-8)


def test_variances_and_precisions_are_scales_too():
    """Any power of a scale, times a constant, has the same M-step."""
    x = two_groups()

    def by_precision(x):
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("components", 2):
            loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
            precision = pyro.sample("precision", dist.Gamma(2.0, 2.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=weights.log()))
            pyro.sample("x", dist.Normal(3.0 + 2.0 * loc[z], 2.0 * precision[z].rsqrt()), obs=x)

    start = {
        "weights": NORMALS_START["weights"],
        "loc": (NORMALS_START["loc"] - 3) / 2,
        "precision": (2 / NORMALS_START["scale"]) ** 2,
    }
    fit = pg.fit(started(by_precision, start), x, EM(steps=1, m_step="derived"), seed=0)
    expected = normals_step(NORMALS_START, x)
    close(3 + 2 * fit.point["loc"], expected["loc"], 1e-10)
    close(2 * fit.point["precision"].rsqrt(), expected["scale"], 1e-10)


def regressions(a, y):
    """Two lines, two scales, a common curvature: locations share a coordinate across different scales."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    bend = pyro.sample("bend", dist.Normal(0.0, 1.0))
    with pyro.plate("lines", 2):
        start = pyro.sample("start", dist.Normal(0.0, 3.0))
        slope = pyro.sample("slope", dist.Normal(0.0, 3.0))
        scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
    with pyro.plate("data", len(a)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(start[z] + slope[z] * a + bend * a**2, scale[z]), obs=y)


def lines(count=80):
    a = torch.linspace(-2, 2, count, dtype=F64)
    noise = torch.randn(count, generator=rng(1), dtype=F64)
    odd = torch.arange(count) % 2 == 0
    return {"a": a, "y": torch.where(odd, 1.0 + 2.0 * a + 0.3 * noise, -1.0 - a + 0.7 * noise) + 0.2 * a**2}


REGRESSIONS_START = {
    "weights": tensor(0.5, 0.5),
    "bend": tensor(0.0).squeeze(),
    "start": tensor(0.5, -0.5),
    "slope": tensor(1.0, 0.0),
    "scale": tensor(1.0, 1.0),
}


def test_mixture_of_regressions_is_weighted_least_squares():
    data = lines()
    program = started(regressions, REGRESSIONS_START)
    fit = pg.fit(program, data, EM(steps=1), seed=0)
    assert "bend, start, slope: derived (weighted least squares)" in fit.notes["M-step"]
    a, y = data["a"], data["y"]
    table = torch.stack([a * 0 + 1, a], -1)
    locs = REGRESSIONS_START["start"] + a[:, None] * REGRESSIONS_START["slope"]
    share = (math.log(0.5) + dist.Normal(locs, torch.ones(())).log_prob(y[:, None])).softmax(-1)
    # By hand: all five coefficients at given scales, then the scales, over and over: the joint maximum.
    wide = torch.stack([torch.cat([a[:, None] ** 2, table * (k == 0), table * (k == 1)], -1) for k in range(2)])
    scale = tensor(1.0, 1.0)
    for _ in range(200):
        precision = share.T / scale[:, None] ** 2
        normal = torch.einsum("kn,kni,knj->ij", precision, wide, wide)
        beta = torch.linalg.solve(normal, torch.einsum("kn,kni,n->i", precision, wide, y))
        scale = ((share.T * (y - wide @ beta) ** 2).sum(1) / share.sum(0)).sqrt()
    close(fit.point["bend"], beta[0], 1e-9)
    close(torch.stack([fit.point["start"], fit.point["slope"]], -1).reshape(-1), beta[1:], 1e-9)
    close(fit.point["scale"], scale, 1e-9)
    full = pg.fit(program, data, EM(), seed=0)
    assert rises(full) and full.status is pg.Status.CONVERGED and last(full) > last(fit) + 10
    close(full.point["slope"], tensor(2.0, -1.0), 0.25)  # three standard errors: 0.7 / sqrt(40) / 1.17 = 0.09


RATES = {
    "poisson": (
        lambda rate, z, hours: dist.Poisson(hours * rate[z]),
        lambda share, n, hours: (share * n[:, None]).sum(0) / (share * hours[:, None]).sum(0),
    ),
    "exponential": (
        lambda rate, z, hours: dist.Exponential(1 / (rate[z] * hours)),
        lambda share, n, hours: (share * (n / hours)[:, None]).sum(0) / share.sum(0),
    ),
    "binomial": (
        lambda rate, z, hours: dist.Binomial(12, rate[z] / (1 + rate[z])),
        lambda share, n, hours: (share * n[:, None]).sum(0) / (share * (12 - n)[:, None]).sum(0),
    ),
    "bernoulli": (
        lambda rate, z, hours: dist.Bernoulli(logits=rate[z].log() + 0.5),
        lambda share, n, hours: (share * n[:, None]).sum(0) / (share * (1 - n)[:, None]).sum(0) * math.exp(-0.5),
    ),
}


@pytest.mark.parametrize("kind", list(RATES))
@pytest.mark.parametrize("prior", [False, True])
def test_rates_and_odds_have_closed_forms(kind, prior):
    """Likelihood against the hand formula, posterior against L-BFGS on the whole expected log-joint (1e-5)."""
    family, formula = RATES[kind]

    def counts(n, hours):
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
        rate = pyro.sample("rate", dist.Gamma(torch.tensor([2.0, 3.0]), torch.tensor(1.5)).to_event(1))
        with pyro.plate("data", len(n)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("n", family(rate, z, hours), obs=n)

    hours = torch.rand(40, generator=rng(0), dtype=F64) + 0.5
    n = torch.randint(0, 2 if kind == "bernoulli" else 8, (40,), generator=rng(1)).to(F64)
    start = {"weights": tensor(0.4, 0.6), "rate": tensor(0.7, 2.5)}
    program = started(counts, start)
    data = {"n": n, "hours": hours}
    fit = pg.fit(program, data, EM(steps=1, prior=prior, m_step="derived"), seed=0)
    if prior:
        other = pg.fit(program, data, EM(steps=1, prior=True, m_step="gradient"), seed=0)
        close(fit.point["rate"], other.point["rate"], 1e-5)
        likely = pg.fit(program, data, EM(steps=1, m_step="derived"), seed=0)
        assert not torch.allclose(likely.point["rate"], fit.point["rate"], rtol=1e-3), "the prior counts"
    else:
        z = torch.arange(2)
        table = family(start["rate"], z, hours[:, None]).log_prob(n[:, None])
        share = (start["weights"].log() + table).softmax(-1)
        close(fit.point["rate"], formula(share, n, hours), 1e-10)
        close(fit.point["weights"], share.mean(0), 1e-10)


def test_weights_of_rows_count_as_repeated_rows():
    x = two_groups(20)
    twice = torch.arange(20) % 4 == 0

    def weighted(x, times):
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("components", 2):
            loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
            scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
        with pyro.plate("data", len(x)), poutine.scale(scale=times):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)

    data = {"x": x, "times": twice.to(F64) + 1}
    fit = pg.fit(started(weighted, NORMALS_START), data, EM(steps=3), seed=0)
    assert "gradient" not in fit.notes["M-step"]
    same = pg.fit(started(normals, NORMALS_START), torch.cat([x, x[twice]]), EM(steps=3), seed=0)
    for name in NORMALS_START:
        close(fit.point[name], same.point[name], 1e-10)
    close(last(fit), last(same), 1e-10)


def test_masked_entries_do_not_count():
    """A mask on the statement and a mask on the distribution are the same, and the same as leaving the row out."""
    x = two_groups(30)
    seen = torch.arange(30) % 5 != 0

    def partly(x, seen, inside):
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("components", 2):
            loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
            scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            if inside:
                pyro.sample("x", dist.Normal(loc[z], scale[z]).mask(seen), obs=x)
            else:
                with poutine.mask(mask=seen):
                    pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)

    short = pg.fit(started(normals, NORMALS_START), x[seen], EM(steps=1), seed=0)
    for inside in (False, True):
        fit = pg.fit(started(partly, NORMALS_START), {"x": x, "seen": seen, "inside": inside}, EM(steps=1), seed=0)
        assert "loc: derived" in fit.notes["M-step"]
        for name in ("loc", "scale"):
            close(fit.point[name], short.point[name], 1e-10)
        close(last(fit), float(normals_log_density(fit.point, x[seen]).sum()), 1e-10)


# -------------------------------------------------------------------------------------------------- hidden Markov chain


def chain(x):
    """Sequences of three symbols with two hidden states; the matrix of symbols is a global site too."""
    first = pyro.sample("first", dist.Dirichlet(torch.ones(2)))
    move = pyro.sample("move", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
    symbol = pyro.sample("symbol", dist.Dirichlet(torch.ones(2, 3)).to_event(1))
    with pyro.plate("data", len(x)):
        probs = first
        for t in pyro.markov(range(x.shape[1])):
            state = pyro.sample(f"state_{t}", dist.Categorical(probs))
            pyro.sample(f"x_{t}", dist.Categorical(symbol[state]), obs=x[:, t])
            probs = move[state]


def baum_welch(values, x):
    """One step of Baum and Welch, by forward and backward recursions over probabilities; and the log-likelihood."""
    first, move, symbol = (values[name] for name in ("first", "move", "symbol"))
    total, starts, moves, symbols = 0.0, torch.zeros_like(first), torch.zeros_like(move), torch.zeros_like(symbol)
    for row in x:
        forward = [first * symbol[:, row[0]]]
        for seen in row[1:]:
            forward.append((forward[-1] @ move) * symbol[:, seen])
        backward = [torch.ones_like(first)]
        for seen in row[1:].flip(0):
            backward.insert(0, move @ (symbol[:, seen] * backward[0]))
        evidence = forward[-1].sum()
        total += float(evidence.log())
        for t, seen in enumerate(row):
            here = forward[t] * backward[t] / evidence
            starts = starts + here if t == 0 else starts
            symbols[:, seen] += here
            if t:
                moves += forward[t - 1][:, None] * move * (symbol[:, seen] * backward[t]) / evidence
    normed = [table / table.sum(-1, keepdim=True) for table in (starts, moves, symbols)]
    return total, dict(zip(("first", "move", "symbol"), normed, strict=True))


def test_hidden_markov_chain_is_baum_welch():
    x = torch.randint(0, 3, (12, 7), generator=rng(4))
    start = {
        "first": tensor(0.6, 0.4),
        "move": tensor([0.7, 0.3], [0.2, 0.8]),
        "symbol": tensor([0.5, 0.3, 0.2], [0.1, 0.3, 0.6]),
    }
    program = started(chain, start)
    values = start
    fits = [pg.fit(program, x, EM(steps=steps), seed=0) for steps in (1, 2)]
    for fit in fits:
        _, values = baum_welch(values, x)
        for name, value in values.items():
            close(fit.point[name], value, 1e-8)
        close(last(fit), baum_welch(values, x)[0], 1e-8)
    assert fits[0].notes["M-step"] == "first, move, symbol: derived (weighted counts)"
    fit = pg.fit(program, x, EM(steps=40), seed=0)
    assert rises(fit) and last(fit) > baum_welch(start, x)[0] + 1


def test_hidden_markov_chain_with_normal_emissions_finds_its_states():
    """Means 3 apart with sd 0.7: one state per value, so that EM's means are within 4 sd / sqrt(count) of the truth."""
    state = (torch.arange(20)[:, None] + torch.arange(10) // 3) % 2
    x = 3.0 * state + 0.7 * torch.randn(20, 10, generator=rng(2), dtype=F64)

    def model(x):
        move = pyro.sample("move", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 10.0).to_event(1))
        scale = pyro.sample("scale", dist.HalfNormal(5.0))
        with pyro.plate("data", len(x)):
            state = 0
            for t in pyro.markov(range(x.shape[1])):
                state = pyro.sample(f"state_{t}", dist.Categorical(move[state] if t else torch.ones(2) / 2))
                pyro.sample(f"x_{t}", dist.Normal(loc[state], scale), obs=x[:, t])

    fit = pg.fit(model, x, EM(steps=300), seed=0)
    assert rises(fit) and "gradient" not in fit.notes["M-step"]
    close(fit.point["loc"].sort().values, tensor(0.0, 3.0), 4 * 0.7 / 10)
    close(fit.point["scale"], tensor(0.7).squeeze(), 0.15)


# ---------------------------------------------------------------------------------------------------- gradient M-steps


def test_zero_inflated_regression_reaches_scipys_maximum():
    """Counts that are zero for a second reason; the rate bends in its parameters, so no closed form: 1e-5."""
    from scipy.optimize import minimize

    a = torch.linspace(-1.5, 1.5, 120, dtype=F64)
    count = torch.poisson((0.8 + 0.9 * a).exp(), generator=rng(5)) * (torch.rand(120, generator=rng(6)) > 0.3)

    def model(a, count):
        absent = pyro.sample("absent", dist.Beta(1.0, 1.0))
        line = pyro.sample("line", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        with pyro.plate("data", len(a)):
            z = pyro.sample("z", dist.Bernoulli(absent))
            rate = (line[0] + line[1] * a).exp()
            pyro.sample("count", dist.Poisson(torch.where(z == 1, 1e-12, rate)), obs=count)

    def log_density(free):
        absent, rate = torch.sigmoid(free[0]), (free[1] + free[2] * a).exp()
        table = torch.stack(
            [
                absent.log() + dist.Poisson(1e-12 + 0 * a).log_prob(count),
                (1 - absent).log() + dist.Poisson(rate).log_prob(count),
            ]
        )
        return table.logsumexp(0).sum()

    def loss(free):
        free = torch.as_tensor(free).requires_grad_()
        value = -log_density(free)
        return value.item(), torch.autograd.grad(value, free)[0].numpy()

    best = minimize(loss, [0.0, 0.0, 0.0], jac=True, method="BFGS", options={"gtol": 1e-8})
    fit = pg.fit(model, {"a": a, "count": count}, EM(tolerance=1e-11), seed=0)
    assert "absent: derived (weighted successes)" in fit.notes["M-step"]
    assert "line: gradient (L-BFGS on the expected log-joint; the rate of 'count' mixes it" in fit.notes["M-step"]
    assert rises(fit) and fit.status is pg.Status.CONVERGED
    close(last(fit), -best.fun, 1e-5)
    close(fit.point["absent"], torch.sigmoid(tensor(*best.x[:1])).squeeze(), 1e-5)
    close(fit.point["line"], tensor(*best.x[1:]), 1e-5)
    assert float(fit.history["log_likelihood"][0]) < -best.fun - 1e-3


def test_networks_learn_by_generalised_em():
    """A gate that depends on the input (mixture of experts): the network moves, the user's own does not."""
    data = lines()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        gate = torch.nn.Linear(1, 2).double()
    before = [p.detach().clone() for p in gate.parameters()]

    def experts(a, y):
        pyro.module("gate", gate)
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        scale = pyro.param("scale", torch.ones(()), constraint=dist.constraints.positive)
        with pyro.plate("data", len(a)):
            z = pyro.sample("z", dist.Categorical(logits=gate(a[:, None])))
            pyro.sample("y", dist.Normal(loc[z], scale), obs=y)

    fit = pg.fit(started(experts, {"loc": tensor(-1.0, 1.0)}), data, EM(steps=60, tolerance=1e-9), seed=0)
    assert rises(fit) and last(fit) > float(fit.history["log_likelihood"][0]) + 1
    assert "loc: derived (weighted least squares)" not in fit.notes["M-step"] and "gate$$$weight" in fit.notes["M-step"]
    assert all(torch.equal(p, kept) for p, kept in zip(gate.parameters(), before, strict=True))
    trained = fit.module("gate")
    assert not torch.allclose(trained.weight, before[0], atol=1e-2)
    # At the maximum of the likelihood its gradient vanishes: recomputed here without any of the machinery.
    leaves = [trained.weight, trained.bias, fit.point["loc"].clone(), fit.params["scale"].clone()]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    logits = torch.nn.functional.linear(data["a"][:, None], leaves[0], leaves[1]).log_softmax(-1)
    rows = (logits + dist.Normal(leaves[2], leaves[3]).log_prob(data["y"][:, None])).logsumexp(-1)
    close(last(fit), rows.sum().item(), 1e-8)
    slopes = torch.cat([g.reshape(-1) for g in torch.autograd.grad(rows.sum(), leaves)])
    assert float(slopes.abs().max()) < 0.05, "of terms that sum to some 80"


def test_parameters_without_any_global_site():
    x = two_groups()

    def model(x):
        loc = pyro.param("loc", torch.tensor([-0.5, 1.0]))
        scale = pyro.param("scale", torch.ones(2), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.6)).long()
            pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)

    fit = pg.fit(model, x, EM(steps=200), seed=0)
    assert rises(fit) and fit.point == {} and fit.cost["restarts"] == 1
    params = {name: value.requires_grad_() for name, value in fit.params.items()}
    log_weights = tensor(0.4, 0.6).log()
    total = (log_weights + dist.Normal(params["loc"], params["scale"]).log_prob(x[:, None])).logsumexp(-1).sum()
    close(last(fit), total.item(), 1e-9)
    assert all(float(g.abs().max()) < 1e-2 for g in torch.autograd.grad(total, list(params.values())))


# --------------------------------------------------------------------------------------------------- a posteriori


@pytest.mark.parametrize("m_step", ["derived", "gradient"])
def test_maximum_a_posteriori_is_stationary(m_step):
    """The gradient of log-likelihood plus log prior, written out here, vanishes: in the weights, along the simplex."""
    x = two_groups()
    fit = pg.fit(started(normals, NORMALS_START), x, EM(prior=True, tolerance=1e-12, m_step=m_step), seed=0)
    assert m_step in fit.notes["M-step"] and rises(fit, "log_posterior")
    values = {name: value.clone().requires_grad_() for name, value in fit.point.items()}
    likely, prior = normals_log_density(values, x).sum(), normals_log_prior(values)
    close(last(fit), likely.item(), 1e-9)
    close(last(fit, "log_posterior"), (likely + prior).item(), 1e-9)
    slopes = dict(zip(values, torch.autograd.grad(likely + prior, list(values.values())), strict=True))
    slopes["weights"] = slopes["weights"] - slopes["weights"].mean()
    assert max(float(s.abs().max()) for s in slopes.values()) < 1e-4
    without = torch.autograd.grad(normals_log_density(values, x).sum(), values["scale"])[0]
    assert float(without.abs().max()) > 1e-2, "the prior counts"


def test_maximum_a_posteriori_of_regressions_by_closed_forms_and_by_gradients():
    program = started(regressions, REGRESSIONS_START)
    fits = [pg.fit(program, lines(), EM(prior=True, tolerance=1e-11, m_step=m), seed=0) for m in ("auto", "gradient")]
    assert "gradient" not in fits[0].notes["M-step"] and rises(fits[0], "log_posterior")
    for name, value in fits[1].point.items():
        close(fits[0].point[name], value, 1e-5)
    close(last(fits[0], "log_posterior"), last(fits[1], "log_posterior"), 1e-8)


def hierarchical(x):
    centre = pyro.sample("centre", dist.Normal(0.0, 5.0))
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("components", 2):
        loc = pyro.sample("loc", dist.Normal(centre, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], 0.8), obs=x)


def test_a_site_that_only_priors_depend_on_needs_the_prior():
    x = two_groups()
    with pytest.raises(pg.IncompatibleError, match=r"no density of the data depends on centre\. Use EM\(prior=True\)"):
        pg.fit(hierarchical, x, EM(), seed=0)
    fit = pg.fit(hierarchical, x, EM(prior=True), seed=0)
    assert "centre, loc: gradient" in fit.notes["M-step"] and rises(fit, "log_posterior")
    # d/dcentre of log prior: (sum of loc - 2 centre) - centre / 25 = 0.
    close(fit.point["centre"], fit.point["loc"].sum() / (2 + 1 / 25), 1e-5)


# ------------------------------------------------------------------------------------------------ offered steps


def ppca(x):
    """Two columns of loadings, isotropic noise; the latent of each row is continuous, so the E-step must be offered."""
    loading = pyro.sample("loading", dist.Normal(torch.zeros(x.shape[1], 2), 3.0).to_event(2))
    noise = pyro.sample("noise", dist.HalfNormal(3.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ loading.T, noise).to_event(1), obs=x)


def ppca_e_step(values, x):
    loading, noise = values["loading"], values["noise"]
    cover = loading @ loading.T + noise**2 * torch.eye(len(loading), dtype=F64)
    total = dist.MultivariateNormal(torch.zeros(len(loading), dtype=F64), cover).log_prob(x).sum()
    inner = torch.linalg.inv(loading.T @ loading + noise**2 * torch.eye(2, dtype=F64))
    mean = x @ loading @ inner
    return total, {"mean": mean, "square": mean.T @ mean + len(x) * noise**2 * inner}


def ppca_m_step(weights, values, prior, x):
    loading = torch.linalg.solve(weights["square"], weights["mean"].T @ x).T
    left = (
        (x**2).sum() - 2 * (weights["mean"] * (x @ loading)).sum() + (weights["square"] * (loading.T @ loading)).sum()
    )
    return {"loading": loading, "noise": (left / x.numel()).sqrt()}


def ppca_data():
    z = torch.randn(200, 2, generator=rng(7), dtype=F64)
    return z @ tensor([2.0, 0.0, 1.0, 0.5], [0.0, 1.5, -1.0, 0.2]) + 0.4 * torch.randn(
        200, 4, generator=rng(8), dtype=F64
    )


PPCA_START = {"loading": tensor([1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.1, -0.2]), "noise": tensor(1.0).squeeze()}


def test_offered_steps_serve_continuous_latents():
    """Probabilistic PCA by EM reaches its closed form (Tipping and Bishop 1999): noise is the mean lost eigenvalue."""
    x = ppca_data() - ppca_data().mean(0)
    program = started(ppca, PPCA_START, em=EMSteps(m_step=ppca_m_step, e_step=ppca_e_step))
    fit = pg.fit(program, x, EM(), seed=0)
    lost = torch.linalg.eigvalsh(x.T @ x / len(x))[:2].mean().sqrt()
    assert rises(fit) and fit.status is pg.Status.CONVERGED
    close(fit.point["noise"], lost, 1e-5)
    assert abs(float(PPCA_START["noise"] - lost)) > 0.1
    assert fit.notes["M-step"] == "loading, noise: offered by the program"


def test_an_m_step_without_an_e_step_needs_finite_latents():
    program = started(ppca, PPCA_START, em=EMSteps(m_step=ppca_m_step))
    with pytest.raises(pg.IncompatibleError, match=r"cannot sum out\s+z.*e_step"):
        pg.fit(program, ppca_data(), EM(), seed=0)


def test_a_wrong_m_step_is_mended_or_reported_never_hidden():
    def overshoot(step):
        return lambda weights, values, prior, x: {**step(weights, values, prior, x), **_moved(values)}

    def _moved(values):
        name = "loc" if "loc" in values else "noise"
        return {name: values[name] * 1.5}

    x = two_groups()
    own = EMSteps(m_step=lambda weights, values, prior, x: {"loc": values["loc"] * 1.5})
    fit = pg.fit(started(normals, NORMALS_START, em=own), x, EM(steps=5), seed=0)
    assert rises(fit) and fit.notes["mended"].startswith(("1 ", "2 ", "3 ", "4 ", "5 "))
    wrong = EMSteps(m_step=overshoot(ppca_m_step), e_step=ppca_e_step)
    fit = pg.fit(started(ppca, PPCA_START, em=wrong), ppca_data(), EM(steps=50), seed=0)
    assert fit.status is pg.Status.FAILED and "the objective fell from" in fit.message and rises(fit)


def test_an_e_step_of_another_model_is_an_error():
    def e_step(values, x):
        return normals_log_density(values, x).sum() + 1.0, {}

    program = started(normals, NORMALS_START, em=EMSteps(m_step=lambda *_: {}, e_step=e_step))
    with pytest.raises(ValueError, match=r"summing the states of its model gives"):
        pg.fit(program, two_groups(), EM(), seed=0)


@pytest.mark.parametrize(
    ("returned", "message"),
    [({"mean": torch.zeros(2)}, "'mean', no global latent site"), ({"loc": torch.zeros(3)}, r"'loc' has shape \(2,\)")],
)
def test_what_an_offered_m_step_returns_is_checked(returned, message):
    program = started(normals, NORMALS_START, em=EMSteps(m_step=lambda *_: returned))
    with pytest.raises(ValueError, match=message):
        pg.fit(program, two_groups(), EM(), seed=0)


# ------------------------------------------------------------------------------------------------ what does not fit


def test_incompatible_programs_are_told_both_sides():
    def continuous(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(pg.IncompatibleError) as caught:
        pg.fit(continuous, torch.zeros(3), EM(), seed=0)
    text = str(caught.value)
    assert "EM needs:" in text and "continuous offers:" in text
    assert "missing:" in text and "finite local latents or EM steps" in text and "gaussian_mixture" in text


def test_the_m_step_asked_for_must_exist():
    x = two_groups()
    with pytest.raises(pg.IncompatibleError, match="offers no EM steps"):
        pg.fit(normals, x, EM(m_step="offered"), seed=0)
    with pytest.raises(pg.IncompatibleError, match=r"nothing would move centre, loc \(centre: .*its prior depends"):
        pg.fit(hierarchical, x, EM(prior=True, m_step="derived"), seed=0)
    partial = EMSteps(m_step=lambda weights, values, prior, x: {"weights": values["weights"]})
    with pytest.raises(pg.IncompatibleError, match="nothing would move loc, scale"):
        pg.fit(started(normals, NORMALS_START, em=partial), x, EM(m_step="offered"), seed=0)


def test_unbounded_likelihood_is_an_error_that_keeps_the_last_finite_fit():
    """Two equal rows under a component of their own: its scale falls to zero."""
    start = {"weights": tensor(0.5, 0.5), "loc": tensor(0.0, 2.0), "scale": tensor(0.01, 1.0)}
    x = tensor(0.0, 0.0, 1.0, 2.0, 3.0)
    with pytest.raises(pg.NonFiniteError, match=r"the scale 'scale' fell to zero.*EM\(prior=True\)") as caught:
        pg.fit(started(normals, start), x, EM(), seed=0)
    assert all(bool(value.isfinite().all()) for value in caught.value.fit.point.values())
    fit = pg.fit(started(normals, start), x, EM(prior=True), seed=0)
    assert fit.status is pg.Status.CONVERGED and float(fit.point["scale"].min()) > 0.01


def test_an_impossible_start_is_an_error():
    def bounded(x):
        edge = pyro.sample("edge", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Uniform(z - 1, edge + z, validate_args=False), obs=x)

    with pytest.raises(ValueError, match=r"at the start of EM.*Program\(model, start="):
        pg.fit(started(bounded, {"edge": tensor(1.0).squeeze()}), tensor(0.5, 9.0), EM(), seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps: expected a whole number"),
        ({"steps": True}, "steps: expected a whole number"),
        ({"restarts": 0}, "restarts: expected"),
        ({"tolerance": -1.0}, "tolerance: expected"),
        ({"tolerance": math.nan}, "tolerance: expected"),
        ({"prior": 1}, "prior: expected True or False"),
        ({"m_step": "exact"}, "m_step: expected one of 'auto', 'offered'"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        EM(**settings)


# ------------------------------------------------------------------------------------------- the run and its result


def test_stopping_is_a_function_of_the_history():
    em = EM(tolerance=0.5)
    assert em.stop({"log_likelihood": [1.0]}) is None
    assert em.stop({"log_likelihood": [1.0, 2.0]}) is None
    assert em.stop({"log_likelihood": [1.0, 2.0, 2.5]}) == "converged after 3 steps: the last gained 5.0e-01 nats"
    assert EM(prior=True).stop({"log_likelihood": [1.0, 1.0], "log_posterior": [1.0, 2.0]}) is None
    fit = pg.fit(started(normals, NORMALS_START), two_groups(), EM(steps=3), seed=0)
    assert fit.status is pg.Status.FINISHED and len(fit.history["step"]) == 3


def test_a_fit_continues_where_another_ended():
    x = two_groups()
    program = started(normals, NORMALS_START)
    whole = pg.fit(program, x, EM(steps=7), seed=0)
    part = pg.fit(program, x, EM(steps=3), seed=0)
    rest = pg.fit(program, x, EM(steps=4), seed=0, start=part)
    for name in NORMALS_START:
        close(rest.point[name], whole.point[name], 1e-12)


def test_same_seed_same_bits_and_starts_are_compared():
    x = two_groups()
    state = torch.get_rng_state()
    one, two = (pg.fit(normals, x, EM(steps=4), seed=5) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(one.point[name], two.point[name]) for name in NORMALS_START)
    best, other = (pg.fit(normals, x, EM(steps=10, restarts=n), seed=5) for n in (None, 1))
    assert other.cost["restarts"] == 1 and one.cost["restarts"] == best.cost["restarts"] == 5
    assert last(best) >= last(other), "the other start is the first of the five"
    zoo = pg.fit(gaussian_mixture(components=3), x, EM(steps=12, restarts=4), seed=0)
    assert zoo.cost["restarts"] == 4
    same = pg.fit(started(normals, NORMALS_START), x, EM(steps=2, restarts=4), seed=0)
    assert same.cost["restarts"] == 1, "a start that is always the same is tried once"


def test_history_is_the_whole_path_of_the_winning_start():
    """The trial steps of the start that is chosen are run again and recorded."""
    fit = pg.fit(normals, two_groups(), EM(steps=10), seed=1)
    start = float(fit.notes["start"].split()[1])
    assert float(fit.history["log_likelihood"][0]) >= start and len(fit.history["step"]) == 10


@pytest.mark.parametrize("prior", [False, True])
def test_everything_that_can_be_asked_of_a_fit(prior, tmp_path):
    x = two_groups()
    fit = pg.fit(gaussian_mixture(components=2), x, EM(prior=prior), seed=0)
    assert fit.point.keys() == {"weights", "precision", "loc_standard"}
    draws = fit.posterior(draws=5)
    assert draws["assignment"].shape == (5, len(x)) and torch.equal(draws["loc"][0], draws["loc"][4])
    evidence = fit.evidence()
    assert evidence.exact
    close(evidence.mean * len(x), last(fit), 1e-9)
    assert math.isfinite(fit.evidence(x[:7] + 0.1).mean)
    assert fit.predict(draws=3)["x"].shape == (3, len(x)) and len(fit.sample(9)["x"]) == 9
    tree = fit.to_arviz(draws=10)
    close(float(tree.posterior["loc"].mean()), float(draws["loc"].mean()), 1e-9)
    assert "verdict" in fit.diagnose(draws=10).attrs and repr(fit).startswith(
        "Fit(gaussian_mixture, EM, seed=0: converged"
    )
    loaded = pg.load(fit.save(tmp_path / "fit"), program=gaussian_mixture(components=2))
    close(loaded.evidence().mean, evidence.mean, 1e-12)
    assert last(loaded) == last(fit) and loaded.notes["M-step"] == fit.notes["M-step"]
    checked = pg.fit(gaussian_mixture(components=2), x, EM(steps=4), seed=0, validation=x, validate_every=2)
    assert len(checked.history["validation_evidence"]) == 2
