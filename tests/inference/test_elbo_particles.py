"""The draws of one step of the ELBO: at once or one by one, the same estimate, and never at once where that changes it."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import (
    X8,
    both,
    both_guide,
    both_noisy,
    both_noisy_guide,
    conjugate,
    conjugate_guide,
    gradient,
    layered,
    local,
    local_guide,
    losses,
    network,
    playing,
    switch,
    switch_guide,
)
from torch import Tensor, nn

import ppl_gen as pg
from ppl_gen.handlers.rank_noise import RankNoise
from ppl_gen.inference import ELBO, SVI, flow_guide
from ppl_gen.inference.gradients import gradients
from ppl_gen.inference.objectives import elbo
from ppl_gen.runtime.ranks import Share
from ppl_gen.workspace.isolation import validation_off
from ppl_gen.workspace.streams import Streams

SEEDS = 120


def bent(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z[0] ** 2 + z[1], 0.5), obs=x)


PROGRAMS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "global": (conjugate, conjugate_guide, {}),
    "local": (local, local_guide, {}),
    "global and local": (both, both_guide, {}),
    "score function": (switch, switch_guide, {"enumerate": False}),
    "summed out in the model": (layered, local_guide, {}),
    "planar flow": (bent, flow_guide("planar", layers=3, init_scale=0.5)(bent), {}),
}


@pytest.mark.parametrize("batch", [None, [1, 4, 6]])
def test_with_given_draws_both_ways_give_the_same_value_and_gradient(batch: list[int] | None) -> None:
    shared = pg.constant(torch.tensor(0.4, dtype=torch.float64))
    data = {"x": X8, "noise": torch.randn(8, 1, dtype=torch.float64), "shared": shared}
    index = None if batch is None else torch.tensor(batch)
    with playing(both_noisy, both_noisy_guide, ELBO(particles=4), data) as (game, dataset):
        assert game.notes["particles"] == "vectorised"
        found = []
        for game.vectorise in (True, False):
            found.append((float(losses(game, dataset.batch(index), 1)), gradient(game, dataset.batch(index))))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-10)
    for name, value in found[0][1].items():
        assert torch.allclose(value, found[1][1][name], rtol=0, atol=1e-10), name


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_estimate_and_its_gradient_have_the_mean_and_the_variance_of_the_loop(name: str) -> None:
    model, guide, settings = PROGRAMS[name]
    draws: dict[bool, Tensor] = {}
    with playing(model, guide, ELBO(particles=3, **settings), X8) as (game, dataset):
        batch, state = dataset.batch(), game.init(dataset.batch())
        leaves = [value for _, value in pyro.get_param_store().named_parameters()]
        assert game.notes["particles"] == "vectorised"
        torch.manual_seed(5)
        for game.vectorise in (True, False):
            with validation_off():
                steps = [gradients(game, "program", leaves, batch, state) for _ in range(SEEDS)]
            found = [
                torch.stack([step.value, *(part for g in step.gradients for part in g.flatten())]) for step in steps
            ]
            draws[game.vectorise] = torch.stack(found)
    one, other = draws[True], draws[False]
    error = ((one.var(0) + other.var(0)) / SEEDS).sqrt() + 1e-12  # what is exact has no variance
    # Means of at most 25 numbers for each program: 5 errors are 6e-7 each.
    assert bool(((one.mean(0) - other.mean(0)).abs() < 5 * error).all())
    # Were one draw shared by all three, the variance of their mean would be three times as much: log 3 = 1.1. The
    # logarithm of a ratio of two sample variances, near normal draws, has an error of 2 / sqrt(120) = 0.18.
    assert float(one[:, 0].std()) > 1e-3
    assert abs(math.log(float(one[:, 0].var() / other[:, 0].var()))) < 0.9


def test_baselines_go_from_particle_to_particle_as_in_the_loop() -> None:
    with playing(switch, switch_guide, ELBO(particles=3, enumerate=False), X8) as (game, dataset):
        batch, state, torch_state = dataset.batch(), game.init(dataset.batch()), torch.get_rng_state()
        with validation_off():
            after = game.loss("program", batch, state)[1]["y"]
            torch.set_rng_state(torch_state)
            _, scored = game._draws(batch)
    costs = scored["y"][0].mean(1)
    expected = state["y"]
    for cost in costs:
        expected = 0.9 * expected + 0.1 * cost
    assert costs.shape == (3,) and float(after) == pytest.approx(float(expected), abs=1e-12)


def reading(x: Tensor) -> None:
    theta = pyro.sample("theta", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(theta, 1.0 if theta > 0 else 2.0), obs=x)


def test_what_cannot_go_at_once_goes_one_by_one_and_gives_the_mean_of_single_draws() -> None:
    with playing(reading, conjugate_guide, ELBO(particles=3), X8) as (game, dataset):
        assert game.notes["particles"] == "unrolled"
        torch.manual_seed(2)
        found = float(losses(game, dataset.batch(), 1))
    with playing(reading, conjugate_guide, ELBO(), X8) as (game, dataset):
        assert "particles" not in game.notes
        torch.manual_seed(2)
        assert found == pytest.approx(float(losses(game, dataset.batch(), 3).mean()), abs=1e-12)


def test_a_way_that_the_trial_did_not_take_is_gone_one_by_one() -> None:
    def sometimes(x: Tensor) -> None:
        theta = pyro.sample("theta", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        scale = 1.0 + float(theta) ** 2 if len(x) < 8 else 1.0
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(theta, scale), obs=x)

    part = torch.tensor([1, 4, 6])
    with playing(sometimes, conjugate_guide, ELBO(particles=50), X8) as (game, dataset):
        assert game.notes["particles"] == "vectorised"
        found = losses(game, dataset.batch(part), 20)
        game.vectorise = False
        loop = losses(game, dataset.batch(part), 20)
    # 20 means of 50 draws: Student's t with 38 degrees of freedom, 6 errors are 6e-7.
    assert abs(float(found.mean() - loop.mean())) < 6 * float(((found.var() + loop.var()) / 20).sqrt())


def test_running_statistics_move_once_for_every_draw() -> None:
    net = network(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))

    def guide(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x[:, None].expand(-1, 2)).squeeze(-1), 1.0))

    fit = pg.fit(pg.Program(local, guide), X8.float(), SVI(ELBO(particles=3), steps=4, lr=0.01))
    assert fit.notes["particles"] == "unrolled"
    assert int(fit.state.buffers["net$$$1.num_batches_tracked"]) == 12, "looking at the program is no training"


def test_checks_do_not_change_the_random_numbers_and_still_look() -> None:
    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.3, dtype=x.dtype))
        pyro.sample("theta", dist.Normal(loc, pyro.param("width", torch.tensor(0.6, dtype=x.dtype))))

    with playing(conjugate, guide, ELBO(particles=3), X8) as (game, dataset):
        values = []
        for checks in (True, False):
            torch.manual_seed(0)
            with pyro.validation_enabled(checks):
                values.append(float(game.loss("program", dataset.batch(), {})[0].value.detach()))
        assert values[0] == values[1]
        pyro.get_param_store()["width"] = torch.tensor(-1.0, dtype=torch.float64)
        with pytest.raises(ValueError, match="scale"), pyro.validation_enabled(True):
            game.loss("program", dataset.batch(), {})


def test_where_processes_share_a_batch_draws_are_made_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> None:
        raise AssertionError("at once")

    with playing(both, both_guide, ELBO(particles=3), X8) as (game, dataset):
        monkeypatch.setattr(elbo, "at_once", never)
        streams = Streams(0, 0, torch.device("cpu"))
        with validation_off(), streams.own(0), RankNoise("data", Share(0, 8, 8, 1.0), streams):
            first = game.loss("program", dataset.batch(), {})[0].value
    assert bool(first.isfinite())


def test_fits_say_how_draws_were_made_and_a_recorded_step_is_the_programs() -> None:
    program = pg.Program(bent, flow_guide("planar", layers=2, init_scale=0.5))
    settings = SVI(ELBO(particles=6), steps=30, lr=0.02)
    fits = [pg.fit(program, X8, settings, seed=0, compile=path) for path in (False, "graph")]
    assert [fit.notes["particles"] for fit in fits] == ["vectorised"] * 2
    assert [fit.cost["path"] for fit in fits] == ["eager", "graph"]
    assert fits[0].records == fits[1].records
