"""The ELBO: exact sums, estimators that agree with closed forms, and Pyro's own objectives."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from programs import (
    X8,
    both,
    both_guide,
    conjugate,
    conjugate_guide,
    conjugate_posterior,
    gradient,
    layered,
    layered_prior,
    local,
    local_guide,
    losses,
    mixture,
    playing,
    switch,
    switch_guide,
    switch_joint,
)
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import nn

import ppl_gen as pg
from ppl_gen.inference import ELBO, SVI
from ppl_gen.inference.gradients import gradients
from ppl_gen.models import denoising_diffusion


def test_analytic_divergence_has_the_expectation_that_draws_have() -> None:
    with playing(conjugate, conjugate_guide, ELBO(), X8) as (game, dataset):
        assert game.notes["gradients"] == "analytic KL: theta"
        loc, scale = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64)
        kl = torch.distributions.kl_divergence(dist.Normal(loc, scale), dist.Normal(torch.zeros_like(loc), 1.0))
        # E_q log N(x; theta, 1) in closed form: the density at the mean, minus half the variance for every row.
        exact = float(kl - dist.Normal(loc, 1.0).log_prob(X8).sum() + 8 * 0.5 * scale**2) / 8
        draws = losses(game, dataset.batch(), 400)
        assert float(game.loss("program", dataset.batch(), game.init(dataset.batch()))[0].parts["kl"]) == pytest.approx(
            float(kl) / 8, abs=1e-12
        )
    z = (draws.mean() - exact) / (draws.std() / 20)
    assert abs(z) < 4.5  # two-sided 7e-6


def test_unequal_scales_of_a_site_are_no_divergence() -> None:
    def half(x: torch.Tensor) -> None:
        with poutine.scale(scale=0.5):
            theta = pyro.sample("theta", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(theta, 1.0), obs=x)

    with playing(half, conjugate_guide, ELBO(), X8) as (game, dataset):
        torch.manual_seed(1)
        ours = float(losses(game, dataset.batch(), 1)) * 8
        torch.manual_seed(1)
        theirs = pyro.infer.Trace_ELBO().loss(half, conjugate_guide, X8)
    assert ours == pytest.approx(theirs, abs=1e-12)


def test_a_site_summed_out_in_the_model_gives_what_a_sum_by_hand_gives() -> None:
    def guide(x: torch.Tensor) -> None:
        pyro.param("unused", torch.tensor(0.0, dtype=x.dtype))

    with playing(switch, guide, ELBO(), X8) as (game, dataset):
        assert "summed out in the model: y" in game.notes["gradients"]
        value = losses(game, dataset.batch(), 2)
    exact = -torch.logsumexp(switch_joint(X8), -1).mean()
    assert value.tolist() == pytest.approx([float(exact)] * 2, abs=1e-12)  # nothing is drawn


def test_the_prior_of_a_guided_site_may_hang_on_a_site_summed_out() -> None:
    for objective in (ELBO(), pg.inference.IWAE(particles=1)):
        with playing(layered, local_guide, objective, X8) as (game, dataset):
            torch.manual_seed(7)
            value = float(losses(game, dataset.batch(), 1))
            torch.manual_seed(7)
            q = poutine.trace(local_guide).get_trace(X8).nodes["z"]
            z = q["value"].detach()
            log_q = q["fn"].log_prob(z).detach()
        by_hand = log_q - layered_prior(z) - dist.Normal(z, 1.0).log_prob(X8)
        assert value == pytest.approx(float(by_hand.mean()), abs=1e-12), objective


def test_a_global_discrete_site_is_summed_out_on_the_whole_data_only() -> None:
    def model(x: torch.Tensor) -> None:
        s = pyro.sample("s", dist.Bernoulli(torch.tensor(0.3, dtype=x.dtype)))
        m = pyro.sample("m", dist.Normal(3.0 * s, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        pyro.sample("m", dist.Normal(pyro.param("loc", torch.tensor(0.4, dtype=x.dtype)), 0.3))

    with playing(model, guide, ELBO(), X8) as (game, dataset):
        torch.manual_seed(2)
        value = float(losses(game, dataset.batch(), 1)) * 8
        torch.manual_seed(2)
        q = dist.Normal(torch.tensor(0.4, dtype=torch.float64), 0.3)
        m = q.sample()
        prior = torch.logsumexp(
            torch.stack([math.log(p) + dist.Normal(3.0 * s, 1.0).log_prob(m) for s, p in ((0, 0.7), (1, 0.3))]), 0
        )
        by_hand = q.log_prob(m) - prior - dist.Normal(m, 1.0).log_prob(X8).sum()
    assert value == pytest.approx(float(by_hand), abs=1e-6)  # 0.7 and 0.3 are float32 inside torch's Bernoulli here
    with pytest.raises(pg.IncompatibleError, match=r"\['s'\] stand outside the data plate and are summed out"):
        pg.fit(pg.Program(model, guide), X8, SVI(steps=2, batch_size=4))


def _exact_gradient(x: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    """The ELBO of `switch` under `switch_guide`, and its gradient, by summing over y."""
    a = torch.tensor(0.7, dtype=x.dtype, requires_grad=True)
    b = torch.tensor(-0.2, dtype=x.dtype, requires_grad=True)
    logits = torch.stack([torch.zeros_like(x), a * x + b], -1)
    q = torch.log_softmax(logits, -1)
    loss = (q.exp() * (q - switch_joint(x))).sum(-1).mean()
    grads = torch.autograd.grad(loss, [a, b])
    return loss.item(), dict(zip("ab", grads, strict=True))


def test_a_site_summed_out_in_the_guide_gives_the_exact_elbo_and_gradient() -> None:
    loss, exact = _exact_gradient(X8)
    with playing(switch, switch_guide, ELBO(), X8) as (game, dataset):
        assert "summed out in the guide: y" in game.notes["gradients"]
        assert losses(game, dataset.batch(), 1).tolist() == pytest.approx([loss], abs=1e-12)
        found = gradient(game, dataset.batch())
        batches = [dataset.batch(index) for index in torch.arange(8).split(3)]
        average = sum(len(b.index) / 8 * game.loss("program", b, game.init(b))[0].value.item() for b in batches)
    assert all(torch.allclose(found[name], exact[name], rtol=0, atol=1e-12) for name in exact)
    assert average == pytest.approx(loss, abs=1e-12)


def test_the_score_function_has_the_exact_gradient_as_its_mean_from_the_first_step_on() -> None:
    x = X8[:3]
    _, exact = _exact_gradient(x)
    rows = x.repeat_interleave(500)  # independent rows: their mean is a mean of 500 draws
    for first_only in (False, True):
        draws: dict[str, list[torch.Tensor]] = {"a": [], "b": []}
        for fresh in range(24 if first_only else 1):
            with playing(switch, switch_guide, ELBO(enumerate=False), rows) as (game, dataset):
                assert game.notes["gradients"] == "score function with baseline: y"
                torch.manual_seed(100 + fresh)
                for _ in range(1 if first_only else 24):
                    for name, value in gradient(game, dataset.batch()).items():
                        draws[name].append(value)
        for name, values in draws.items():
            stacked = torch.stack(values)
            z = (stacked.mean() - exact[name]) / (stacked.std() / math.sqrt(24))
            assert abs(float(z)) < 7.0, name  # Student's t with 23 degrees of freedom: two-sided 4e-7


def test_the_baseline_lowers_the_variance() -> None:
    spread = {}
    for baseline in (True, False):
        with playing(switch, switch_guide, ELBO(enumerate=False), X8) as (game, dataset):
            torch.manual_seed(0)
            grads, state = [], game.init(dataset.batch())
            named = dict(pyro.get_param_store().named_parameters())
            for _ in range(300):
                if not baseline:
                    state = {"y": torch.zeros((), dtype=torch.float64)}
                step = gradients(game, "program", list(named.values()), dataset.batch(), state)
                state = step.state
                grads.append(dict(zip(named, step.gradients, strict=True))["b"])
            spread[baseline] = float(torch.stack(grads).std())
    assert spread[True] < 0.8 * spread[False]  # a sample sd of 300 draws is known to 4 %


def test_a_global_site_without_reparameterisation_gets_the_whole_cost() -> None:
    def model(x: torch.Tensor) -> None:
        s = pyro.sample("s", dist.Poisson(torch.tensor(1.0, dtype=x.dtype)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(s, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        rate = pyro.param("rate", torch.tensor(0.8, dtype=x.dtype), constraint=dist.constraints.positive)
        pyro.sample("s", dist.Poisson(rate))

    rate = torch.tensor(0.8, dtype=torch.float64).log().requires_grad_()
    counts = torch.arange(0.0, 30.0, dtype=torch.float64)
    q = dist.Poisson(rate.exp()).log_prob(counts)
    joint = dist.Poisson(torch.tensor(1.0, dtype=q.dtype)).log_prob(counts)
    joint = joint + dist.Normal(counts, 1.0).log_prob(X8[:, None]).sum(0)
    loss = (q.exp() * (q - joint)).sum() / 8
    (exact,) = torch.autograd.grad(loss, rate)
    with playing(model, guide, ELBO(particles=4), X8) as (game, dataset):
        torch.manual_seed(3)
        draws = torch.stack([gradient(game, dataset.batch())["rate"] for _ in range(500)])
    z = (draws.mean() - exact) / (draws.std() / math.sqrt(500))
    assert abs(float(z)) < 4.5  # two-sided 7e-6


def test_a_latent_that_nothing_can_train_is_named() -> None:
    def guide(x: torch.Tensor) -> None:
        pyro.param("unused", torch.zeros(()))

    with pytest.raises(ValueError, match=r"latent site\(s\) \['theta'\] are in the model only"):
        pg.fit(pg.Program(conjugate, guide), X8, SVI(steps=2))
    with pytest.raises(pg.IncompatibleError, match=r"enumerate=False.*\['k'\]"):
        pg.fit(mixture, X8, SVI(ELBO(enumerate=False), steps=2))


# ------------------------------------------------------------------------------------------------ beta
def test_beta_of_one_is_the_elbo_bit_for_bit() -> None:
    for model, guide in ((both, both_guide), (switch, switch_guide)):
        values = []
        for objective in (ELBO(), ELBO(beta=1)):
            with playing(model, guide, objective, X8) as (game, dataset):
                torch.manual_seed(0)
                values.append((losses(game, dataset.batch(), 3), gradient(game, dataset.batch())))
        assert torch.equal(values[0][0], values[1][0])
        assert all(torch.equal(values[0][1][name], values[1][1][name]) for name in values[0][1])


@pytest.mark.parametrize("batch", [None, [1, 4, 6]])
def test_beta_weighs_the_divergence_alone(batch: list[int] | None) -> None:
    """One draw, so that reconstruction and divergence of it are known: for closed forms and for draws."""
    index = None if batch is None else torch.tensor(batch)
    x = X8 if index is None else X8[index]
    for beta in (0.0, 0.5, 4.0):
        with playing(local, local_guide, ELBO(beta=beta), X8) as (game, dataset):
            torch.manual_seed(2)
            found = float(losses(game, dataset.batch(index), 1))
            torch.manual_seed(2)
            z = 0.2 * x + torch.normal(torch.zeros_like(x), 1.0)
            kl = 0.5 * (0.2 * x) ** 2  # of unit normals
            assert found == pytest.approx(float((beta * kl - dist.Normal(z, 1.0).log_prob(x)).mean()), abs=1e-12)
    with playing(switch, switch_guide, ELBO(beta=4.0), X8) as (game, dataset):
        log_q = torch.log_softmax(torch.stack([torch.zeros_like(x), 0.7 * x - 0.2], -1), -1)
        prior = torch.tensor([0.7, 0.3], dtype=x.dtype).log()
        exact = (log_q.exp() * (4.0 * (log_q - prior) - (switch_joint(x) - prior))).sum(-1).mean()
        assert float(losses(game, dataset.batch(index), 1)) == pytest.approx(float(exact), abs=1e-12)


@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal])
def test_beta_weighs_an_autoguides_density_at_its_auxiliary_sites(guide: Any) -> None:
    """The optimum is the posterior of a likelihood to the power 1 / beta: N(sum x / (n + beta), beta / (n + beta))."""
    deviation = {}
    for beta in (1.0, 4.0):
        algorithm = SVI(ELBO(beta=beta, particles=4), steps=400, lr=0.03)
        draws = pg.fit(pg.Program(conjugate, guide), X8, algorithm, seed=0).posterior(draws=2000)["theta"]
        deviation[beta] = float(draws.std())
        assert float(draws.mean()) == pytest.approx(float(X8.sum()) / (8 + beta), abs=0.15)  # 0.013, and Adam's 0.1
        assert deviation[beta] == pytest.approx(math.sqrt(beta / (8 + beta)), rel=0.2)
    assert deviation[4.0] > 1.4 * deviation[1.0]


def test_beta_leaves_the_programs_own_density_alone() -> None:
    still = [SVI(ELBO(beta=beta), steps=1, lr=1e-30) for beta in (1.0, 4.0)]
    one, four = (pg.fit(pg.Program(local, local_guide), X8, algorithm, seed=0).evidence(seed=1) for algorithm in still)
    assert torch.equal(one.values, four.values)


def test_beta_is_refused_where_no_divergence_is_left() -> None:
    for wrong in (-1.0, math.inf, math.nan, True, "4"):
        with pytest.raises(ValueError, match="beta: expected a finite number of at least 0"):
            ELBO(beta=wrong)  # type: ignore[arg-type]

    def guide(x: torch.Tensor) -> None:
        pyro.param("unused", torch.tensor(0.0, dtype=x.dtype))

    with pytest.raises(pg.IncompatibleError, match=r"beta=2.0: y are summed out in the model.*draw them in the guide"):
        pg.fit(pg.Program(switch, guide), X8, SVI(ELBO(beta=2.0), steps=1))
    chain, rows = denoising_diffusion(2, steps=3, hidden=4), torch.randn(6, 2)
    with pytest.raises(pg.IncompatibleError, match='beta=2.0: its chain is entered at one time step.*time_step="all"'):
        pg.fit(chain, rows, SVI(ELBO(beta=2.0), steps=1))
    assert pg.fit(chain, rows, SVI(ELBO(beta=2.0, time_step="all"), steps=1)).status == "finished"


# ----------------------------------------------------------------- Pyro's objectives, and ours in Pyro
PYRO = {
    "Trace_ELBO": pyro.infer.Trace_ELBO,
    "Trace_ELBO instance": pyro.infer.Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
    "TraceMeanField_ELBO": pyro.infer.TraceMeanField_ELBO,
    "TraceGraph_ELBO": pyro.infer.TraceGraph_ELBO,
    "TraceEnum_ELBO": pyro.infer.TraceEnum_ELBO(max_plate_nesting=1),
    "RenyiELBO": pyro.infer.RenyiELBO(alpha=0.5, num_particles=3),
    "ReweightedWakeSleep": pyro.infer.ReweightedWakeSleep(num_particles=3),
}


@pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no sample sites")
@pytest.mark.parametrize("name", PYRO)
def test_pyros_objectives_give_the_loss_and_gradient_they_give_in_pyro(name: str) -> None:
    given = PYRO[name]
    elbo = given() if isinstance(given, type) else given
    with playing(both, both_guide, given, X8) as (game, dataset):
        elbo.loss_and_grads(both, both_guide, X8)  # some of Pyro's look at the program at the first call
        game.loss("program", dataset.batch(), game.init(dataset.batch()))[0]
        for _, p in pyro.get_param_store().named_parameters():
            p.grad = None
        torch.manual_seed(4)
        named = dict(pyro.get_param_store().named_parameters())
        reference = elbo.loss_and_grads(both, both_guide, X8)
        reference = float(reference[0] if isinstance(reference, tuple) else reference) / 8
        expected = {n: p.grad / 8 for n, p in named.items()}
        for p in named.values():
            p.grad = None
        torch.manual_seed(4)
        value = game.loss("program", dataset.batch(), game.init(dataset.batch()))[0].value.item()
        torch.manual_seed(4)
        found = gradient(game, dataset.batch())
        assert all(p.grad is None for p in named.values()), "no gradient is left lying about"
    assert value == pytest.approx(reference, abs=1e-12)
    assert all(torch.allclose(found[key], expected[key], rtol=0, atol=1e-12) for key in expected)
    looks = dict(vars(elbo))
    fit = pg.fit(pg.Program(both, both_guide), X8, SVI(given, steps=2, batch_size=4), seed=0)
    assert fit.algorithm == f"SVI(pyro.infer.{type(elbo).__name__})" and np.isfinite(fit.history["program_loss"]).all()
    assert vars(elbo) == looks, "an instance is copied, since Pyro's keep state"


@pytest.mark.filterwarnings("ignore:Found vars in model but not guide")
def test_pyros_objectives_and_discrete_sites() -> None:
    def model(x: torch.Tensor) -> None:  # with a parameter, since Pyro refuses what has no gradient
        switch(x + pyro.param("shift", torch.zeros((), dtype=x.dtype)))

    def guide(x: torch.Tensor) -> None:
        return None

    with playing(model, guide, pyro.infer.TraceEnum_ELBO(max_plate_nesting=1), X8) as (game, dataset):
        value = game.loss("program", dataset.batch(), game.init(dataset.batch()))[0].value.item()
    assert value == pytest.approx(-float(torch.logsumexp(switch_joint(X8), -1).mean()), abs=1e-12)
    with pytest.raises(pg.IncompatibleError, match=r"Trace_ELBO cannot sum out the discrete site\(s\) \['y'\]"):
        pg.fit(pg.Program(model, guide), X8, SVI(pyro.infer.Trace_ELBO, steps=2))
    with pytest.raises(pg.IncompatibleError, match=r"RenyiELBO gives no gradient to the guide's site\(s\) \['y'\]"):
        pg.fit(pg.Program(switch, switch_guide), X8, SVI(pyro.infer.RenyiELBO(num_particles=2), steps=2))


def test_our_elbo_is_a_loss_for_pyros_svi() -> None:
    pyro_svi = pyro.infer.SVI(conjugate, conjugate_guide, pyro.optim.Adam({"lr": 0.05}), loss=ELBO(particles=2))
    exact = conjugate_posterior(X8)
    assert abs(0.3 - float(exact.loc)) > 0.1, "it does not start at the answer"
    for _ in range(400):
        value = pyro_svi.step(X8)
    assert pyro.param("loc").item() == pytest.approx(float(exact.loc), abs=0.1)  # the noise of Adam at 0.05 is 0.02
    assert 8.0 < value < 16.0, "total nats, as Pyro counts them"
    pyro.clear_param_store()


def test_a_game_of_several_players_is_no_loss_for_pyros_svi() -> None:
    from ppl_gen.inference.objectives.adversarial import Adversarial

    def implicit(x: torch.Tensor) -> None:
        shift = pyro.param("shift", torch.zeros(()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Delta(pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0)) + shift), obs=x)

    svi = pyro.infer.SVI(implicit, lambda x: None, pyro.optim.Adam({}), loss=Adversarial(critic=nn.Linear(1, 1)))
    with pytest.raises(TypeError, match="several players"):
        svi.step(torch.zeros(4))
    pyro.clear_param_store()


def test_an_objective_in_plain_scripts_keeps_the_games_of_the_last_pairs_alone() -> None:
    objective = ELBO()
    with pyro.get_param_store().scope():
        for _ in range(20):

            def model(x: torch.Tensor) -> None:
                conjugate(x)

            first = objective(model, conjugate_guide, X8)
            kept = objective.__dict__["_games"]
            assert (model, conjugate_guide) in kept and bool(first.isfinite())
    assert len(kept) == 16 and copy.deepcopy(objective).__dict__.get("_games") is None
