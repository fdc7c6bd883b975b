"""Weights of guided continuous locals beside finite ones that are summed out: together, and as if each were alone."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

import ppl_gen as pg
from ppl_gen.diagnostics import row_weights
from ppl_gen.inference import SVI
from ppl_gen.weights import weighed
from ppl_gen.weights.particles import local_log_weights
from ppl_gen.weights.summed_particles import can_sum_together

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")

TOPICS, WORDS = 2, 4
DOCUMENTS = torch.tensor([[0, 0, 1, 0, 2], [3, 3, 2, 3, 3], [0, 1, 2, 3, 0], [1, 1, 1, 0, 0]])


def lda(words):
    with pyro.plate("topics", TOPICS):
        phi = pyro.sample("phi", dist.Dirichlet(torch.full((WORDS,), 0.5)))
    with pyro.plate("documents", len(words), dim=-2):
        theta = pyro.sample("theta", dist.Dirichlet(torch.ones(TOPICS)))
        with pyro.plate("words", words.shape[1], dim=-1):
            topic = pyro.sample("topic", dist.Categorical(theta))
            pyro.sample("word", dist.Categorical(phi[topic]), obs=words)


def guide(words):
    start = torch.tensor([[4.0, 2.0, 1.0, 1.0], [1.0, 1.0, 2.0, 4.0]])
    phi = pyro.param("phi_q", start, constraint=constraints.positive)
    theta = pyro.param("theta_q", torch.full((len(words), 1, TOPICS), 2.0), constraint=constraints.positive)
    with pyro.plate("topics", TOPICS):
        pyro.sample("phi", dist.Dirichlet(phi))
    with pyro.plate("documents", len(words), dim=-2):
        pyro.sample("theta", dist.Dirichlet(theta))


@pytest.fixture(scope="module")
def fit():
    return pg.fit(pg.Program(lda, guide), DOCUMENTS, SVI(steps=200, lr=0.02), seed=0)


def by_hand(fit, phi, theta):
    """log p(words, theta | phi) - log q(theta) of every document, written out."""
    words = torch.log(torch.einsum("dk,kv->dv", theta, phi)).gather(1, DOCUMENTS).sum(1)
    prior = dist.Dirichlet(torch.ones(TOPICS)).log_prob(theta)
    return words + prior - dist.Dirichlet(fit.params["theta_q"][:, 0]).log_prob(theta)


def test_weights_of_particles_together_are_those_of_each_and_those_written_out(fit):
    with fit.bound(3):
        batch = fit.data.batch()
        phi = fit.posterior(draws=1)["phi"][0]
        assert can_sum_together(fit.joint, fit.guide, fit.info, batch, ("topic",))
        found = {}
        for together in (True, False):
            pyro.set_rng_seed(5)
            found[together] = local_log_weights(
                fit.joint, fit.guide, fit.info, batch, 30, values={"phi": phi}, sums=("topic",), vectorise=together
            )
        assert torch.allclose(found[True].rows, found[False].rows, atol=1e-4)
        assert torch.allclose(found[True].globals, found[False].globals, atol=1e-4)
        pyro.set_rng_seed(5)
        for k in range(30):
            theta = pyro.poutine.trace(pyro.poutine.condition(fit.guide, {"phi": phi})).get_trace(DOCUMENTS)
            expected = by_hand(fit, phi, theta.nodes["theta"]["value"][:, 0])
            assert torch.allclose(found[True].rows[k], expected, atol=1e-4), k


def lengthening(seq, lengths):
    with pyro.plate("data", len(seq)):
        level, state = pyro.sample("level", dist.Normal(0.0, 1.0)), 0
        for t in pyro.markov(range(int(lengths.max()))):
            with pyro.poutine.mask(mask=t < lengths):
                state = pyro.sample(f"s_{t}", dist.Categorical(torch.tensor([[0.8, 0.2], [0.3, 0.7]])[state]))
                pyro.sample(f"y_{t}", dist.Normal(level + 2.0 * state, 1.0), obs=seq[:, t])


def levels(seq, lengths):
    with pyro.plate("data", len(seq)):
        pyro.sample("level", dist.Normal(pyro.param("w", torch.tensor(0.2)) * seq[:, 0], 0.7))


def test_rows_that_lack_the_last_steps_are_summed_together_too():
    seq, lengths = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([2, 4, 3, 2, 2, 4, 3, 2])
    ragged = pg.fit(pg.Program(lengthening, levels), {"seq": seq, "lengths": lengths}, SVI(steps=2), seed=0)
    short, sums = lengths < 3, tuple(ragged.info.finite_latents)
    with ragged.bound(3):
        batch = ragged.dataset({"seq": seq[short], "lengths": lengths[short]}).batch()
        assert len(sums) == 4 and can_sum_together(ragged.joint, ragged.guide, ragged.info, batch, sums)
        found = []
        for together in (True, False):
            pyro.set_rng_seed(5)
            found.append(
                local_log_weights(
                    ragged.joint, ragged.guide, ragged.info, batch, 5, values={}, sums=sums, vectorise=together
                ).rows
            )
    assert found[0].shape == (5, 4) and torch.allclose(*found, atol=1e-4)


@pytest.mark.slow
def test_k_hats_are_those_of_unrolled_weights(fit, monkeypatch):
    """The same random numbers give the same draws either way, so that the k-hats agree to rounding."""
    together = fit.diagnose(draws=100)
    kept = dict(fit.computed)
    fit.computed.clear()
    for module in (row_weights, weighed):
        monkeypatch.setattr(module, "can_sum_together", lambda *_: False)
    alone = fit.diagnose(draws=100)
    fit.computed.clear()
    fit.computed.update(kept)
    assert together.attrs["pareto_k"] == pytest.approx(alone.attrs["pareto_k"], abs=1e-3)
    assert np.allclose(together.attrs["pareto_k_rows"], alone.attrs["pareto_k_rows"], atol=1e-3)
    assert together.attrs["pareto_k_rows"].shape == (4,)


def test_short_chains_count_the_table_of_topics_and_words(fit):
    from ppl_gen.diagnostics.second_look import _table

    with fit.bound():
        assert _table(fit, fit.data) == TOPICS * WORDS
