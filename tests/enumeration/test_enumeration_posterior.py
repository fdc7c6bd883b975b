"""Responsibilities, EM's Q and joint posterior draws of discrete sites.

Frequencies are held to |z| < 6 per cell: with fewer than 100 cells in all, the false-alarm rate is below 100 * 2e-9.
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
    rng,
    topics,
    traced,
    traced_hmm,
)
from fixtures import float64_under
from pyro import poutine

from ppl_gen.enumeration.marginals import (
    discrete_marginals,
    expected_log_joint,
    factor_marginals,
    log_joint,
    row_log_density,
    sample_discrete,
)

float64_and_seed = float64_under(20)


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


# ------------------------------------------------------------------------------------------------------------------ EM


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
