"""Row densities with discrete sites summed out, against hand formulas, brute force over all states, and Pyro itself.

Float64 tolerances: a few roundings (eps 2.2e-16) per state, at most 1e3 states, on values of order 10 stay below 1e-12;
sums over hundreds of terms are given 1e-10.
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from enumeration_cases import (
    all_paths,
    close,
    coupled,
    hmm_case,
    mixture,
    mixture_table,
    mixture_values,
    traced,
    traced_hmm,
)
from fixtures import float64_under
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate

from ppl_gen.enumeration.marginals import (
    discrete_marginals,
    enumerated_trace,
    expected_log_joint,
    factor_marginals,
    log_joint,
    log_prior,
    row_log_density,
    sample_discrete,
)

float64_and_seed = float64_under(20)


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


@pytest.mark.parametrize("history", [1, 2])
def test_other_chains_agree_with_pyro(history):
    """Two chains side by side, each state looking `history` steps back; rows of a plate."""
    x = torch.randn(4, 6)
    table = (torch.rand((2,) * (history + 2)) + 0.1).log_softmax(-1)

    @config_enumerate
    def model(x):
        with pyro.plate("data", len(x)):
            a, b = [torch.tensor(0)] * history, torch.tensor(0)
            for t in pyro.markov(range(x.shape[1]), history=history):
                b = pyro.sample(f"b_{t}", dist.Bernoulli(0.2 + 0.5 * b)).long()
                a = [*a[1:], pyro.sample(f"a_{t}", dist.Categorical(logits=table[(*a, b)]))]
                pyro.sample(f"x_{t}", dist.Normal(a[-1] - 2.0 * b, 1.0), obs=x[:, t])

    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(model, lambda x: None, x)
    close(row_log_density(traced(model, x)).sum(), torch.tensor(-loss), 1e-10)


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


def test_a_program_with_nothing_to_enumerate():
    x = torch.randn(4, 3)

    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4, dim=-2), pyro.plate("columns", 3, dim=-1):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    trace = traced(model, x, values={"loc": torch.tensor(0.3)}, nesting=2)
    close(row_log_density(trace), dist.Normal(0.3, 1.0).log_prob(x).sum(-1), 1e-12)
    assert sample_discrete(trace) == {} and discrete_marginals(trace) == {}


def test_contradictory_evidence_in_float32():
    """exp(-120) and exp(-130) are zero in float32: only a sum of logarithms before the exponential keeps them."""
    torch.set_default_dtype(torch.float32)

    def model():
        with pyro.plate("data", 1):
            z = pyro.sample("z", dist.Categorical(logits=torch.tensor([0.0, -120.0])))
            pyro.factor("evidence", torch.where(z == 1, 0.0, -130.0))

    exact = -120.0 + math.log1p(math.exp(-10.0))
    assert float(row_log_density(traced(model))[0]) == pytest.approx(exact, abs=1e-4)


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
