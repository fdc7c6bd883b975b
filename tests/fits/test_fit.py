"""What pg.fit promises: repeatable, interruptible, never a silent NaN, and a value at the end."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import X8, conjugate, conjugate_evidence, conjugate_guide, local, local_evidence, local_guide, no_plate
from torch import nn

import ppl_gen as pg
from ppl_gen.inference import EM, IWAE, SVI


def test_same_seed_gives_bit_for_bit_identical_fits_and_another_seed_is_not():
    fits = [pg.fit(pg.Program(conjugate, conjugate_guide), X8, SVI(steps=20, batch_size=3), seed=s) for s in (4, 4, 5)]
    assert fits[0].records == fits[1].records != fits[2].records
    assert all(torch.equal(fits[0].params[name], fits[1].params[name]) for name in fits[0].params)


def test_an_interrupt_gives_the_partial_fit():
    def stop(step, info):
        if step == 7:
            raise KeyboardInterrupt

    fit = pg.fit(conjugate, X8, SVI(steps=100), seed=0, callbacks=[stop])
    assert fit.status is pg.Status.INTERRUPTED and fit.cost["steps"] == 7 and "7" in fit.message
    assert fit.posterior(draws=3)["theta"].shape == (3,), "what was learned can be used"


@pytest.mark.parametrize("bad_step", [1, 5, 20])
def test_a_non_finite_loss_raises_with_the_last_finite_fit(bad_step):
    done = {"steps": 0}

    def poisoned(x):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(theta, 1.0), obs=x)
        if torch.is_grad_enabled() and theta.requires_grad and done["steps"] == bad_step - 1:
            pyro.factor("poison", theta * float("nan"))

    def count(step, info):
        done["steps"] = step

    with pytest.raises(pg.NonFiniteError, match="not finite") as caught:
        pg.fit(pg.Program(poisoned, conjugate_guide), X8, SVI(steps=20, lr=0.05), seed=0, callbacks=[count])
    fit = caught.value.fit
    assert fit.status is pg.Status.DIVERGED and fit.cost["steps"] == bad_step - 1
    assert all(value.isfinite().all() for value in fit.params.values())
    if bad_step > 2:
        moved = [n for n, v in fit.params.items() if not torch.equal(v, _initial()[n])]
        assert moved, "what was learned before is kept"


def _initial():
    with pyro.get_param_store().scope():
        pyro.poutine.trace(conjugate_guide).get_trace(X8)
        return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}


def test_an_exploding_learning_rate_is_rolled_back():
    with pytest.raises(pg.NonFiniteError) as caught:
        pg.fit(pg.Program(conjugate, conjugate_guide), X8, SVI(steps=50, lr=1e30, optimiser="sgd"), seed=0)
    assert all(value.isfinite().all() for value in caught.value.fit.params.values())


def test_a_second_fit_continues_where_the_first_ended():
    program = pg.Program(conjugate, conjugate_guide)
    first = pg.fit(program, X8, SVI(steps=300, lr=0.05), seed=0)
    second = pg.fit(program, X8, SVI(steps=1, lr=1e-8), seed=0, start=first)
    fresh = pg.fit(program, X8, SVI(steps=1, lr=1e-8), seed=0)
    for name, value in first.params.items():
        assert torch.allclose(second.params[name], value, atol=1e-5)
        assert not torch.allclose(fresh.params[name], value, atol=1e-2), "a fresh fit starts elsewhere"


def test_the_gradient_is_clipped_by_its_global_norm():
    def model(x):
        a, b = pyro.param("a", torch.tensor(0.0)), pyro.param("b", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(a + b, 1e-3), obs=x)

    fit = pg.fit(model, torch.ones(4), SVI(steps=1, lr=1.0, optimiser="sgd", clip_norm=1.0), seed=0)
    # Two equal gradients of norm 1 together: each parameter moves 1 / sqrt 2, not 1.
    assert all(abs(abs(float(fit.params[name])) - math.sqrt(0.5)) < 1e-4 for name in "ab")


def test_a_schedule_is_stepped_once_per_update():
    rates = []

    def schedule(optimizer):
        rates.append(optimizer)
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    pg.fit(conjugate, X8, SVI(steps=3, lr=0.8, schedule=schedule), seed=0)
    assert abs(rates[0].param_groups[0]["lr"] - 0.1) < 1e-9


def test_buffers_flags_and_weights_of_a_network_stay():
    network = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    network[1].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    flags = [part.training for part in network.modules()]

    def model(t, y=None):
        pyro.module("network", network)
        with pyro.plate("data", len(t)):
            pyro.sample("y", dist.Normal(network(t).squeeze(-1), 0.1), obs=y)

    t = torch.linspace(-1, 1, 20)[:, None]
    fit = pg.fit(model, {"t": t, "y": t.squeeze(-1)}, SVI(steps=30, lr=0.05), seed=0)
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())
    assert [part.training for part in network.modules()] == flags
    trained = fit.module("network")
    assert any(not torch.equal(trained.state_dict()[name], value) for name, value in before.items())
    assert not trained.training
    with pytest.raises(KeyError, match="network"):
        fit.module("decoder")


def test_every_row_of_data_counts_once_whatever_the_container(tmp_path):
    import numpy as np

    x = torch.randn(23, generator=torch.Generator().manual_seed(0))
    on_disk = np.memmap(tmp_path / "x.bin", dtype=np.float32, mode="w+", shape=(23,))
    on_disk[:] = x.numpy()
    rows = torch.utils.data.TensorDataset(x)
    holders = [x, x.numpy(), on_disk, rows, torch.utils.data.DataLoader(rows, batch_size=5), x.tolist()]
    fits = [pg.fit(pg.Program(conjugate, conjugate_guide), h, SVI(steps=12, batch_size=5), seed=0) for h in holders]
    assert all(fit.records == fits[0].records for fit in fits)


def test_minibatches_need_a_data_plate():
    assert pg.fit(no_plate, X8, SVI(steps=3), seed=0).status is pg.Status.FINISHED
    with pytest.raises(pg.IncompatibleError, match="data plate"):
        pg.fit(no_plate, X8, SVI(steps=3, batch_size=2), seed=0)


def test_autoguides_of_local_latents_refuse_minibatches():
    with pytest.raises(pg.IncompatibleError, match="amortised"):
        pg.fit(local, X8, SVI(steps=3, batch_size=2), seed=0)


def test_the_dtype_follows_data_and_algorithm():
    assert pg.fit(conjugate, X8.double(), SVI(steps=2), seed=0).posterior(draws=2)["theta"].dtype is torch.float64
    assert pg.fit(conjugate, X8.float(), SVI(steps=2), seed=0).posterior(draws=2)["theta"].dtype is torch.float32
    assert torch.get_default_dtype() is torch.float32 and EM.dtype is torch.float64


def test_evidence_of_a_guide_at_the_truth_is_exact_within_its_error():
    fit = pg.fit(pg.Program(local, local_guide), X8, SVI(objective=IWAE(5), steps=400, lr=0.02), seed=0)
    untrained = pg.fit(pg.Program(local, local_guide), X8, SVI(steps=1, lr=1e-6), seed=0)
    estimate, exact = fit.evidence(particles=2000), local_evidence(X8)
    assert abs(estimate.mean - float(exact.mean())) < 5 * estimate.mc_stderr + 1e-4, "5 sd: a false alarm in 2e6"
    assert untrained.evidence(particles=2000).mc_stderr > estimate.mc_stderr, "training the guide sharpens it"
    assert not estimate.exact and estimate.rows == 8 and estimate.stderr > 0


def test_marginal_likelihood_is_that_of_all_data():
    fit = pg.fit(pg.Program(conjugate, conjugate_guide), X8, SVI(steps=500, lr=0.02), seed=0)
    estimate = fit.marginal_likelihood(draws=2000)
    assert abs(estimate.mean - conjugate_evidence(X8)) < 5 * estimate.mc_stderr + 1e-4
    assert estimate.rows == 1 and estimate.pareto_k < 0.7


def test_new_rows_can_be_made_conditionally():
    def labelled(x, y):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=torch.zeros(3)), obs=y)
            pyro.sample("x", dist.Normal(10.0 * y, pyro.param("s", torch.tensor(1.0))), obs=x)

    y = torch.arange(9) % 3
    fit = pg.fit(labelled, {"x": 10.0 * y + 0.1, "y": y}, SVI(steps=2), seed=0)
    rows = fit.sample(50, given={"y": 2})
    assert (rows["y"] == 2).all() and abs(float(rows["x"].mean()) - 20.0) < 1.5  # sd 1 / sqrt 50: 10 sd
    with pytest.raises(ValueError, match="no site or input"):
        fit.sample(5, given={"label": 1})


def test_a_program_that_reads_its_own_observation_is_refused():
    def autoregressive(x):
        before = torch.cat([torch.zeros(len(x), 1), x[:, :-1]], 1)
        with pyro.plate("data", len(x)):
            scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
            pyro.sample("x", dist.Normal(before, scale).to_event(1), obs=x)

    fit = pg.fit(autoregressive, torch.randn(6, 4), SVI(steps=2), seed=0)
    with pytest.raises(pg.IncompatibleError, match="reads its own observation"):
        fit.sample(3)
