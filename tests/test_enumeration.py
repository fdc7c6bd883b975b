"""Exact sums over discrete sites against hand formulas, brute force over all states, and Pyro's own machinery.

Float64 tolerances: a handful of roundings per state of at most 1e4 states (eps 2.2e-16) on values of order 10 stays below
1e-12; sums over hundreds of rows or paths are given 1e-10. Frequencies are held to |z| < 6 per cell: with at most 40
cells in all, the false-alarm rate is below 40 * 2e-9.
"""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate

from ppl_gen.inference.enumeration import (
    discrete_marginals,
    enumerated_trace,
    expected_log_joint,
    factor_marginals,
    log_joint,
    log_prior,
    row_log_density,
    sample_discrete,
)


@pytest.fixture(autouse=True)
def float64_and_seed():
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20)
        yield
    torch.set_default_dtype(default)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------------------------- programs


def mixture(x, subsample=None):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("components", 3):
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=subsample) as rows:
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], scale), obs=x[rows])


def mixture_values():
    values = {
        "weights": torch.tensor([0.2, 0.5, 0.3]),
        "loc": torch.tensor([-1.0, 0.5, 2.0]),
        "scale": torch.tensor(0.7),
    }
    return {name: value.requires_grad_() for name, value in values.items()}


def mixture_table(x, values):
    weights = values["weights"] / values["weights"].sum()  # as Categorical does, which the gradient sees
    return weights.log() + dist.Normal(values["loc"], values["scale"]).log_prob(x[:, None])


def hmm(x, start, move, out, lengths=None, markov=pyro.markov):
    """Rows are sequences; a mask ends each at its own length."""
    count, steps = x.shape
    with pyro.plate("data", count):
        z = None
        for t in markov(range(steps)):
            alive = torch.ones(count, dtype=torch.bool) if lengths is None else t < lengths
            with poutine.mask(mask=alive):
                z = pyro.sample(f"z_{t}", dist.Categorical(start if z is None else move[z]))
                emission = dist.Normal(out[z], 0.8) if x.is_floating_point() else dist.Categorical(out[z])
                pyro.sample(f"x_{t}", emission, obs=x[:, t])


def hmm_case(states, steps, emission, rows=3):
    values = {
        "start": torch.rand(states, generator=rng(1)) + 0.1,
        "move": torch.rand(states, states, generator=rng(2)) + 0.1,
    }
    values = {name: value / value.sum(-1, keepdim=True) for name, value in values.items()}
    if emission == "normal":
        values["out"], x = torch.arange(states) - 0.5, torch.randn(rows, steps, generator=rng(3))
    else:
        table = torch.rand(states, 4, generator=rng(4)) + 0.1
        values["out"] = table / table.sum(-1, keepdim=True)
        x = torch.randint(4, (rows, steps), generator=rng(5))
    return x, {name: value.requires_grad_() for name, value in values.items()}


def all_paths(x, values):
    """Every state path (paths x steps), and its log-joint with each row (rows x paths)."""
    states, steps = len(values["start"]), x.shape[1]
    paths = torch.tensor(list(itertools.product(range(states), repeat=steps)))
    start, move = (values[name] / values[name].sum(-1, keepdim=True) for name in ("start", "move"))
    log = start.log()[paths[:, 0]]
    log = log + sum((move.log()[paths[:, t - 1], paths[:, t]] for t in range(1, steps)), torch.zeros(()))
    if x.is_floating_point():
        emission = dist.Normal(values["out"], 0.8).log_prob(x[..., None])
    else:
        emission = values["out"].log().t()[x]
    return paths, log + sum(emission[:, t][:, paths[:, t]] for t in range(steps))


def traced(model, *args, nesting=1, **kwargs):
    return enumerated_trace(model, args, plate_nesting=nesting, **kwargs)


def traced_hmm(x, values, **kwargs):
    return enumerated_trace(hmm, (x,), {**values, **kwargs}, plate_nesting=1)


# ----------------------------------------------------------------------------------------------------------- mixtures


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_mixture_rows_and_responsibilities(dtype, tolerance):
    torch.set_default_dtype(dtype)
    x, values = torch.randn(50), mixture_values()
    trace = traced(mixture, x, values=values)
    table = mixture_table(x, values)
    close(row_log_density(trace), table.logsumexp(-1), tolerance)
    close(discrete_marginals(trace)["z"], table.softmax(-1).detach(), tolerance)
    assert row_log_density(trace).dtype == dtype


def test_gradient_of_weighted_rows_is_that_of_the_formula():
    x, values = torch.randn(30), mixture_values()
    weigh = torch.randn(30)
    ours = torch.autograd.grad(row_log_density(traced(mixture, x, values=values)) @ weigh, list(values.values()))
    hand = torch.autograd.grad(mixture_table(x, values).logsumexp(-1) @ weigh, list(values.values()))
    for a, b in zip(ours, hand, strict=True):
        close(a, b, 1e-11)


def test_prior_and_joint_agree_with_pyro():
    x, values = torch.randn(30), mixture_values()
    trace = traced(mixture, x, values=values)
    prior = (
        dist.Dirichlet(torch.ones(3)).log_prob(values["weights"])
        + dist.Normal(0.0, 2.0).log_prob(values["loc"]).sum()
        + dist.LogNormal(0.0, 1.0).log_prob(values["scale"])
    )
    close(log_prior(trace), prior, 1e-12)
    model = poutine.condition(config_enumerate(mixture), data=values)
    close(log_joint(trace), -TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(model, lambda x: None, x), 1e-11)
    close(log_prior(trace, without=["scale"]), prior - dist.LogNormal(0.0, 1.0).log_prob(values["scale"]), 1e-12)
    assert all(trace.nodes[name]["infer"]["given"] and not trace.nodes[name]["is_observed"] for name in values)


def test_minibatch_rows_carry_no_plate_scale():
    x, values = torch.randn(40), mixture_values()
    some = torch.tensor([3, 17, 5, 8])
    trace = enumerated_trace(mixture, (x,), {"subsample": 4}, values={**values, "data": some}, plate_nesting=1)
    assert trace.nodes["x"]["scale"] == 10.0
    close(row_log_density(trace), mixture_table(x[some], values).logsumexp(-1), 1e-12)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("states", [1, 2])
def test_dims_of_size_one(rows, states):
    x, log = torch.randn(rows), torch.randn(states).log_softmax(0)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=log))
            pyro.sample("x", dist.Normal(1.0 * z, 1.0), obs=x)

    trace = traced(model, x)
    table = log + dist.Normal(torch.arange(1.0 * states), 1.0).log_prob(x[:, None])
    close(row_log_density(trace), table.logsumexp(-1), 1e-12)
    close(discrete_marginals(trace)["z"], table.softmax(-1), 1e-12)
    assert sample_discrete(trace, draws=4)["z"].shape == (4, rows)


# ------------------------------------------------------------------------------------------------ hidden Markov chains


@pytest.mark.parametrize("emission", ["normal", "categorical"])
@pytest.mark.parametrize(("states", "steps"), [(2, 1), (2, 8), (3, 6)])
def test_hmm_against_every_path(states, steps, emission):
    x, values = hmm_case(states, steps, emission)
    trace = traced_hmm(x, values)
    paths, joint = all_paths(x, values)
    close(row_log_density(trace), joint.logsumexp(-1), 1e-10)

    posterior = joint.detach().softmax(-1)
    one_hot = torch.nn.functional.one_hot(paths, states).double()
    weights, marginals = factor_marginals(trace).weights, discrete_marginals(trace)
    for t in range(steps):
        close(marginals[f"z_{t}"], posterior @ one_hot[:, t], 1e-10)
        if t:
            pairs = torch.einsum("rp,pj,pk->rjk", posterior, one_hot[:, t - 1], one_hot[:, t])
            own, before = (trace.nodes[f"z_{s}"]["infer"]["_enumerate_symbol"] for s in (t, t - 1))
            order = [weights[f"z_{t}"]._pyro_dims.index(d) for d in (trace.plate_to_symbol["data"], before, own)]
            close(weights[f"z_{t}"].permute(order), pairs, 1e-10)


def test_hmm_against_discrete_hmm():
    x, values = hmm_case(3, 60, "normal", rows=4)
    # Pyro's initial state comes before the first transition, so our first emission goes into it, normalised.
    first = values["start"].log() + dist.Normal(values["out"], 0.8).log_prob(x[:, 0, None])
    rest = dist.DiscreteHMM(first, values["move"].log(), dist.Normal(values["out"], 0.8))
    close(row_log_density(traced_hmm(x, values)), rest.log_prob(x[:, 1:]) + first.logsumexp(-1), 1e-10)


def test_ragged_sequences_are_their_own_lengths():
    x, values = hmm_case(2, 6, "normal", rows=3)
    lengths = torch.tensor([6, 2, 4])
    rows = row_log_density(traced_hmm(x, values, lengths=lengths))
    alone = [row_log_density(traced_hmm(x[i : i + 1, :n], values))[0] for i, n in enumerate(lengths)]
    close(rows, torch.stack(alone), 1e-12)


def test_whole_program_without_a_plate():
    x, values = hmm_case(2, 5, "normal", rows=1)

    def single(x):
        z, locs = None, pyro.sample("locs", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        for t in pyro.markov(range(len(x))):
            z = pyro.sample(f"z_{t}", dist.Categorical(values["start"] if z is None else values["move"][z]))
            pyro.sample(f"x_{t}", dist.Normal(locs[z], 0.8), obs=x[t])

    trace = traced(single, x[0], values={"locs": values["out"]}, nesting=0)
    row = row_log_density(trace, None)
    assert row.shape == (1,)
    close(row[0], all_paths(x, values)[1].logsumexp(-1)[0], 1e-12)
    prior = dist.Normal(0.0, 1.0).log_prob(values["out"]).sum()
    close(log_prior(trace, None), prior, 1e-12)
    close(log_joint(trace, None), row[0] + prior, 1e-12)


def test_impossible_transitions_leave_gradients_finite():
    move = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]])
    x, loc = torch.randn(3, 5), torch.arange(3.0).requires_grad_()

    def model(x):
        with pyro.plate("data", len(x)):
            z = torch.tensor(0)
            for t in pyro.markov(range(x.shape[1])):
                z = pyro.sample(f"z_{t}", dist.Categorical(logits=move.log()[z]))
                pyro.sample(f"x_{t}", dist.Normal(loc[z], 0.8), obs=x[:, t])

    trace = traced(model, x)
    assert torch.isinf(trace.nodes["z_4"]["packed"]["unscaled_log_prob"]).any(), "the case must have impossible states"
    values = {"start": move[0], "move": move, "out": loc}
    close(row_log_density(trace), all_paths(x, values)[1].logsumexp(-1), 1e-12)
    marginals = factor_marginals(trace)
    assert all(torch.isfinite(weight).all() for weight in marginals.weights.values())
    q = torch.autograd.grad(expected_log_joint(trace, marginals.weights), loc, retain_graph=True)[0]
    close(q, torch.autograd.grad(row_log_density(trace).sum(), loc)[0], 1e-10)


def test_impossible_data_has_density_zero():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Uniform(z, z + 1.0), obs=x)

    trace = traced(model, torch.tensor([0.5, 3.0, 1.5]))
    assert row_log_density(trace).tolist() == pytest.approx([math.log(0.5), -math.inf, math.log(0.5)])
    with pytest.raises(ValueError, match="density zero"):
        sample_discrete(trace)


# ------------------------------------------------------------------------------------------------ shapes of dependence


def test_two_discrete_sites_per_row():
    x, y = torch.randn(7), torch.randn(7)

    def model(x, y):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
            b = pyro.sample("b", dist.Bernoulli((1.0 + a) / 4))
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)
            pyro.sample("y", dist.Normal(b, 2.0), obs=y)

    a, b = torch.arange(3.0)[:, None], torch.arange(2.0)
    table = torch.tensor([0.2, 0.3, 0.5]).log()[:, None] + dist.Bernoulli((1 + a) / 4).log_prob(b)
    table = table + dist.Normal(a + b, 1.0).log_prob(x[:, None, None]) + dist.Normal(b, 2.0).log_prob(y[:, None, None])
    trace = traced(model, x, y)
    close(row_log_density(trace), table.logsumexp((-1, -2)), 1e-12)
    posterior = table.flatten(1).softmax(-1).reshape(table.shape)
    close(discrete_marginals(trace)["a"], posterior.sum(2), 1e-12)
    close(discrete_marginals(trace)["b"], posterior.sum(1), 1e-12)
    counts = torch.zeros(3, 2)
    drawn = sample_discrete(trace, draws=20_000, generator=rng())
    counts.index_put_((drawn["a"][:, 0], drawn["b"][:, 0].long()), torch.ones(()), accumulate=True)
    expected = 20_000 * posterior[0]
    assert ((counts - expected) / (expected * (1 - posterior[0])).sqrt()).abs().max() < 6


def topics(words):
    """Documents are rows; a plate of words with topics of their own lies inside the plate of documents."""
    with pyro.plate("data", words.shape[1], dim=-1):
        kind = pyro.sample("kind", dist.Categorical(torch.tensor([0.4, 0.6])))
        with pyro.plate("words", words.shape[0], dim=-2):
            topic = pyro.sample("topic", dist.Categorical(torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.3, 0.2]])[kind]))
            pyro.sample("word", dist.Normal(1.0 * topic, 1.0), obs=words)


def test_plates_inside_the_data_plate():
    words = torch.randn(4, 5)
    topic = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.3, 0.2]]).log()
    emission = dist.Normal(torch.arange(3.0), 1.0).log_prob(words[..., None])  # words, docs, topics
    inner = topic + emission[:, :, None]  # words, docs, kinds, topics
    table = torch.tensor([0.4, 0.6]).log() + inner.logsumexp(-1).sum(0)
    trace = traced(topics, words, nesting=2)
    close(row_log_density(trace), table.logsumexp(-1), 1e-12)
    marginals = discrete_marginals(trace)
    close(marginals["kind"], table.softmax(-1), 1e-12)
    close(marginals["topic"], (table.softmax(-1)[..., None] * inner.softmax(-1)).sum(-2), 1e-12)

    drawn = sample_discrete(trace, draws=20_000, generator=rng(1))
    assert drawn["kind"].shape == (20_000, 5) and drawn["topic"].shape == (20_000, 4, 5)
    one = drawn["kind"][:, 2] == 1
    seen = torch.stack([(drawn["topic"][one, 1, 2] == k).double().mean() for k in range(3)])
    given = inner[1, 2, 1].softmax(-1)
    assert ((seen - given) / (given * (1 - given) / one.sum()).sqrt()).abs().max() < 6


def test_local_continuous_site_with_a_value():
    x, w = torch.randn(6), torch.randn(6)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            w = pyro.sample("w", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    trace = traced(model, x, values={"w": w})
    z = torch.arange(2.0)
    table = dist.Bernoulli(0.3).log_prob(z) + dist.Normal(z, 1.0).log_prob(w[:, None])
    likelihood = dist.Normal(w, 1.0).log_prob(x)
    close(row_log_density(trace), table.logsumexp(-1) + likelihood, 1e-12)
    close(row_log_density(trace, without=["w"]), likelihood, 1e-12)
    close(discrete_marginals(trace)["z"], table.softmax(-1), 1e-12)
    assert log_prior(trace) == 0


def test_labels_observed_in_part():
    x, label, seen = torch.randn(6), torch.tensor([0, 1, 2, 0, 0, 0]), torch.tensor([1, 1, 1, 0, 0, 0]).bool()

    def model(x, label, seen):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])), obs=label, obs_mask=seen)
            pyro.sample("x", dist.Normal(1.0 * y, 1.0), obs=x)

    table = torch.tensor([0.2, 0.3, 0.5]).log() + dist.Normal(torch.arange(3.0), 1.0).log_prob(x[:, None])
    expected = torch.where(seen, table.gather(1, label[:, None])[:, 0], table.logsumexp(-1))
    close(row_log_density(traced(model, x, label, seen)), expected, 1e-12)


def test_masked_observations_count_nothing():
    x, values = torch.randn(8), mixture_values()
    seen = torch.arange(8) % 3 > 0

    def model(x):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(3), 2.0).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(values["weights"]))
            with poutine.mask(mask=seen):
                pyro.sample("x", dist.Normal(loc[z], values["scale"]), obs=x)

    trace = traced(model, x, values={"loc": values["loc"]})
    close(row_log_density(trace), mixture_table(x, values).logsumexp(-1) * seen, 1e-12)
    assert (mixture_table(x, values).logsumexp(-1) != 0).all()
    close(discrete_marginals(trace)["z"][~seen], values["weights"].detach().expand(int((~seen).sum()), 3), 1e-12)
    assert factor_marginals(trace).weights["x"].sum() == pytest.approx(int(seen.sum()))


def test_user_scale_multiplies_a_row():
    x, values, weigh = torch.randn(5), mixture_values(), torch.rand(5)
    table = mixture_table(x, values)

    def scaled(x, scale):
        with pyro.plate("data", len(x)), poutine.scale(scale=scale):
            z = pyro.sample("z", dist.Categorical(values["weights"]))
            pyro.sample("x", dist.Normal(values["loc"][z], values["scale"]), obs=x)

    for scale in (0.25, weigh):
        trace = traced(scaled, x, scale)
        close(row_log_density(trace), scale * table.logsumexp(-1), 1e-12)
        close(discrete_marginals(trace)["z"], table.softmax(-1).detach(), 1e-12)
        q = expected_log_joint(trace, factor_marginals(trace).weights)
        hand = (scale * mixture_table(x, values).logsumexp(-1)).sum()
        ours, fisher = (torch.autograd.grad(total, values["loc"])[0] for total in (q, hand))
        close(ours, fisher, 1e-10)

    def uneven(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            with poutine.scale(scale=2.0):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"'x'.*'z'.*poutine.scale|'z'.*'x'.*poutine.scale"):
        row_log_density(traced(uneven, x))


def test_a_program_with_nothing_to_enumerate():
    x = torch.randn(4, 3)

    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4, dim=-2), pyro.plate("columns", 3, dim=-1):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    trace = traced(model, x, values={"loc": torch.tensor(0.3)}, nesting=2)
    close(row_log_density(trace), dist.Normal(0.3, 1.0).log_prob(x).sum(-1), 1e-12)
    assert sample_discrete(trace) == {} and discrete_marginals(trace) == {}


def coupled(x):
    shift = pyro.sample("shift", dist.Bernoulli(0.3))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.6))
        pyro.sample("x", dist.Normal(shift + 2 * z, 1.0), obs=x)


def test_discrete_site_outside_the_plate():
    x = torch.randn(4)
    trace = traced(coupled, x)
    with pytest.raises(ValueError, match="'shift' is discrete and lies outside plate 'data'"):
        row_log_density(trace)
    s, z = torch.arange(2.0)[:, None, None], torch.arange(2.0)
    rows = dist.Bernoulli(0.6).log_prob(z) + dist.Normal(s + 2 * z, 1.0).log_prob(x[:, None])  # shift, rows, z
    table = dist.Bernoulli(0.3).log_prob(s[:, 0, 0]) + rows.logsumexp(-1).sum(-1)
    close(log_joint(trace), table.logsumexp(0), 1e-12)
    marginals = discrete_marginals(trace)
    close(marginals["shift"], table.softmax(0), 1e-12)
    close(marginals["z"], torch.einsum("s,srz->rz", table.softmax(0), rows.softmax(-1)), 1e-12)
    drawn = sample_discrete(trace, draws=20_000, generator=rng())
    assert drawn["shift"].shape == (20_000,) and drawn["z"].shape == (20_000, 4)
    p = table.softmax(0)[1]
    assert abs(drawn["shift"].mean() - p) / (p * (1 - p) / 20_000).sqrt() < 6
    apart = drawn["z"][drawn["shift"] == 1].mean(0) - rows.softmax(-1)[1, :, 1]
    assert apart.abs().max() < 6 * 0.5 / (drawn["shift"].sum()).sqrt()


def test_contradictory_evidence_in_float32():
    """exp(-200) and exp(-180) are zero in float32: only a sum of logarithms, then one logsumexp, keeps them."""
    torch.set_default_dtype(torch.float32)

    def model():
        with pyro.plate("data", 1):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.factor("first", torch.where(z == 1, 0.0, -200.0))
            pyro.factor("second", torch.where(z == 1, -180.0, 0.0))

    assert float(row_log_density(traced(model))[0]) == pytest.approx(-180.0 + math.log(0.5), abs=1e-4)


# ------------------------------------------------------------------------------------------------------------------ EM


@pytest.mark.parametrize("case", ["mixture", "hmm", "topics"])
def test_fishers_identity(case):
    if case == "mixture":
        x, values = torch.randn(40), mixture_values()
        trace = traced(mixture, x, values=values)
    elif case == "hmm":
        x, values = hmm_case(3, 7, "normal")
        trace = traced_hmm(x, values)
    else:
        values = {"words": torch.randn(4, 5).requires_grad_()}
        trace = traced(topics, values["words"], nesting=2)
    leaves = list(values.values())
    log_density, weights = factor_marginals(trace)
    rows = row_log_density(trace)
    close(log_density, rows.sum().detach(), 1e-12)
    assert not log_density.requires_grad and not any(w.requires_grad for w in weights.values())
    q = torch.autograd.grad(expected_log_joint(trace, weights), leaves, retain_graph=True)
    for ours, fisher in zip(q, torch.autograd.grad(rows.sum(), leaves), strict=True):
        assert fisher.abs().max() > 0.01, "the identity must have something to say"
        close(ours, fisher, 1e-10)


def test_q_bounds_the_log_density_at_other_values():
    """log p(x | new) - log p(x | old) >= Q(new) - Q(old) (Dempster, Laird, Rubin, 1977), with equality at old."""
    x, values = torch.randn(40), mixture_values()
    old = traced(mixture, x, values=values)
    log_density, weights = factor_marginals(old)
    start = expected_log_joint(old, weights)
    for _ in range(20):
        new = traced(mixture, x, values={**values, "loc": values["loc"] + 0.3 * torch.randn(3)})
        gain, bound = row_log_density(new).sum() - log_density, expected_log_joint(new, weights) - start
        assert gain > bound


# --------------------------------------------------------------------------------------------------------------- draws


def test_joint_draws_of_paths_have_the_posterior_frequencies():
    x, values = hmm_case(2, 3, "normal", rows=2)
    paths, joint = all_paths(x, values)
    drawn = sample_discrete(traced_hmm(x, values), draws=40_000, generator=rng(7))
    assert drawn["z_1"].shape == (40_000, 2)
    code = drawn["z_0"] * 4 + drawn["z_1"] * 2 + drawn["z_2"]
    posterior = joint.detach().softmax(-1)
    for row in range(2):
        seen = torch.bincount(code[:, row], minlength=8) / 40_000
        error = (seen - posterior[row]) / (posterior[row] * (1 - posterior[row]) / 40_000).sqrt()
        assert error.abs().max() < 6
        independent = math.prod(
            [discrete_marginals(traced_hmm(x, values))[f"z_{t}"][row, paths[:, t]] for t in range(3)]
        )
        wrong = (seen - independent) / (independent * (1 - independent) / 40_000).sqrt()
        assert wrong.abs().max() > 6, "draws from the marginals, site by site, must fail the same test"


@pytest.mark.parametrize(
    ("fn", "values"),
    [
        (dist.Categorical(torch.tensor([0.2, 0.8])), [0, 1]),
        (dist.Bernoulli(0.4), [0.0, 1.0]),
        (dist.Binomial(3, torch.tensor(0.4)), [0.0, 1.0, 2.0, 3.0]),
        (dist.OneHotCategorical(torch.tensor([0.2, 0.8])), [[1.0, 0.0], [0.0, 1.0]]),
    ],
)
def test_draws_are_in_the_programs_own_values(fn, values):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", fn)
            pyro.sample("x", dist.Normal(z.sum(-1) if fn.event_dim else z, 1.0), obs=x)

    trace = traced(model, torch.randn(6))
    one, many = sample_discrete(trace, generator=rng())["z"], sample_discrete(trace, draws=50, generator=rng())["z"]
    assert one.shape == (6, *fn.event_shape) and many.shape == (50, 6, *fn.event_shape)
    assert one.dtype == many.dtype == fn.sample().dtype
    assert all(value in values for value in many.reshape(300, *fn.event_shape).tolist())
    log = traced(model, torch.randn(6), values={"z": one})  # they can be fed back
    assert torch.isfinite(row_log_density(log)).all()


def test_draws_repeat_under_a_generator_and_leave_the_global_one_alone():
    x, values = hmm_case(3, 5, "normal")
    before, validation = torch.get_rng_state(), torch.distributions.Distribution._validate_args
    trace = traced_hmm(x, values)
    first, again, other = (sample_discrete(trace, draws=9, generator=rng(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.distributions.Distribution._validate_args == validation


def test_many_values_at_once_by_vmap():
    x, values = torch.randn(20), mixture_values()
    locs = torch.randn(11, 3)

    def rows(loc):
        return row_log_density(traced(mixture, x, values={**values, "loc": loc}))

    close(torch.vmap(rows)(locs), torch.stack([rows(loc) for loc in locs]), 1e-12)


# -------------------------------------------------------------------------------------------------------------- errors


def with_latent(fn):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(1.0 * pyro.sample("count", fn), 1.0), obs=x)

    return model


@pytest.mark.parametrize(
    ("fn", "options", "message"),
    [
        (dist.Poisson(2.0), {}, r"'count' \(Poisson\) has no finite support.*truncated"),
        (dist.Normal(0.0, 1.0), {}, r"'count' is continuous \(Normal\) and has no value"),
        (dist.Bernoulli(0.5), {"discrete": []}, "'count' is latent, is not among the discrete sites"),
        (dist.Binomial(torch.tensor([1.0, 2.0, 3.0]), 0.5), {}, "'count' cannot be enumerated"),
        (dist.Bernoulli(0.5), {"discrete": ["count", "other"]}, r"`discrete` names \['other'\]"),
        (dist.Bernoulli(0.5), {"discrete": ["count"], "values": {"count": torch.zeros(3)}}, "both in"),
        (dist.Bernoulli(0.5), {"plate_nesting": 0}, "plate 'data' at dim -1.*plate_nesting=1"),
        (dist.Dirichlet(torch.ones(2)), {"values": {"count": torch.zeros(3)}}, r"shape \(3,\); expected \(..., 2\)"),
    ],
)
def test_programs_that_cannot_be_summed(fn, options, message):
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        enumerated_trace(with_latent(fn), (torch.zeros(3),), **{"plate_nesting": 1, **options})
    assert torch.equal(before, torch.get_rng_state()), "nothing may be drawn before the error"


def test_independent_events_point_to_a_plate():
    with pytest.raises(ValueError, match="pyro.plate rather than .to_event"):
        traced(with_latent(dist.Bernoulli(torch.full((2,), 0.5)).to_event(1)), torch.zeros(3))


def test_a_long_loop_without_markov_points_to_markov():
    x, values = hmm_case(2, 40, "normal")
    with pytest.raises(ValueError, match="pyro.markov"):
        traced_hmm(x, values, markov=iter)
    assert row_log_density(traced_hmm(x, values)).shape == (3,)


def test_wrong_plates_are_named():
    trace = traced(coupled, torch.zeros(3))
    with pytest.raises(ValueError, match=r"'rows'; the plates are \['data'\]"):
        row_log_density(trace, "rows")

    def loop(x):
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"x_{i}", dist.Normal(0.0, 1.0), obs=x[i])

    with pytest.raises(ValueError, match="vectorised"):
        row_log_density(traced(loop, torch.zeros(3)))


def test_crossing_plates_are_refused():
    def model(x):
        rows, columns = pyro.plate("data", 3, dim=-2), pyro.plate("columns", 4, dim=-1)
        with rows:
            a = pyro.sample("a", dist.Bernoulli(0.5))
        with columns:
            b = pyro.sample("b", dist.Bernoulli(0.5))
        with rows, columns:
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    trace = traced(model, torch.zeros(3, 4), nesting=2)
    with pytest.raises(ValueError, match="cross"):
        log_joint(trace)
    with pytest.raises(ValueError, match="'b' is discrete and lies outside plate 'data'"):
        row_log_density(trace)


def test_weights_of_another_program_are_refused():
    x, values = torch.randn(5), mixture_values()
    weights = factor_marginals(traced(mixture, x, values=values)).weights
    with pytest.raises(ValueError, match="site 'z': the weights have shape|site 'x': the weights have shape"):
        expected_log_joint(traced(mixture, torch.randn(6), values=values), weights)
    with pytest.raises(ValueError, match="the weights are for sites"):
        expected_log_joint(traced(coupled, x), weights)
