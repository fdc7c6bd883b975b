"""EM's derived M-steps against steps written out by hand, least squares, and Baum and Welch.

Float64: closed forms are held to 1e-10, rounding being near 1e-13.
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from em_cases import (
    F64,
    NORMALS_START,
    REGRESSIONS_START,
    close,
    last,
    lines,
    normals,
    normals_log_density,
    normals_step,
    regressions,
    rises,
    rng,
    started,
    tensor,
    two_groups,
)
from pyro import poutine

import ppl_gen as pg
from ppl_gen.inference import EM

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


def test_log_normal_densities_are_normal_in_logarithms():
    x = two_groups()

    def skewed(x):
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("components", 2):
            loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
            scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.LogNormal(loc[z], scale[z]), obs=x)

    fit = pg.fit(started(skewed, NORMALS_START), x.exp(), EM(steps=1, m_step="derived"), seed=0)
    for name, value in normals_step(NORMALS_START, x).items():
        close(fit.point[name], value, 1e-10)


def test_hundreds_of_parameters_are_told_apart():
    """Three classes of 150 answers: 450 probabilities, more than could be moved one by one."""
    answers = (torch.rand(30, 150, generator=rng(0), dtype=F64) < 0.5).to(F64)
    start = 0.2 + 0.6 * torch.rand(3, 150, generator=rng(1), dtype=F64)

    def classes(x):
        yes = pyro.sample("yes", dist.Beta(torch.ones(3, 150), 1.0).to_event(2))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(3) / 3))
            pyro.sample("x", dist.Bernoulli(yes[z]).to_event(1), obs=x)

    fit = pg.fit(started(classes, {"yes": start}), answers, EM(steps=1, m_step="derived"), seed=0)
    table = answers @ start.log().T + (1 - answers) @ (1 - start).log().T
    share = table.softmax(-1)
    expected = (share.T @ answers / share.sum(0)[:, None]).clamp(1e-14, 1 - 1e-14)
    close(fit.point["yes"], expected, 1e-10)


@pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")
def test_design_matrices_are_least_squares():
    """Every coefficient takes part in every location, in two classes; that of a covariate of zeros stays in place."""
    a = torch.randn(50, 3, generator=rng(0), dtype=F64)
    a[:, 2] = 0.0
    y = a @ tensor(1.0, -2.0, 0.0) + 0.5 * torch.randn(50, generator=rng(1), dtype=F64)
    start = {"beta": tensor([0.5, -1.0, 0.3], [0.0, 0.0, 0.7])}

    def model(a, y):
        beta = pyro.sample("beta", dist.Normal(torch.zeros(2, 3), 3.0).to_event(2))
        with pyro.plate("data", len(a)):
            z = pyro.sample("z", dist.Bernoulli(0.3)).long()
            pyro.sample("y", dist.Normal((a * beta[z]).sum(-1), 0.7), obs=y)

    fit = pg.fit(started(model, start), {"a": a, "y": y}, EM(steps=1, m_step="derived"), seed=0)
    share = (tensor(0.7, 0.3).log() + dist.Normal(a @ start["beta"].T, tensor(0.7)).log_prob(y[:, None])).softmax(-1)
    for k in range(2):
        root = share[:, k].sqrt()
        expected = torch.linalg.lstsq(root[:, None] * a[:, :2], (root * y)[:, None]).solution.squeeze(-1)
        close(fit.point["beta"][k, :2], expected, 1e-9)
        close(fit.point["beta"][k, 2], start["beta"][k, 2], 1e-12)


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
