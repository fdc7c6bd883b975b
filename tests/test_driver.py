"""One loop, one set of guarantees: what a fit repeats, what it leaves alone, how it ends, and what a fit answers."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import (
    X8,
    conjugate,
    conjugate_guide,
    conjugate_posterior,
    eight_schools,
    generator,
    local,
    local_guide,
    mixture,
    network,
    no_plate,
    regression,
    sine_rows,
)
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn

import ppl_gen as pg
from ppl_gen.data.batching import as_dataset
from ppl_gen.data.rows import Rows
from ppl_gen.inference import ELBO, SVI
from ppl_gen.inference.objectives.base import Game, Loss, Objective, Player


def same(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# ------------------------------------------------------------------------------------------------ repeatable
def test_the_same_seed_gives_bitwise_the_same_fit_and_another_seed_another() -> None:
    model, net = regression()
    data, svi = sine_rows(), SVI(steps=12, batch_size=8, lr=0.05)
    first, again, other = (pg.fit(model, data, svi, seed=seed) for seed in (3, 3, 4))
    assert same(first.params, again.params) and same(first.state.buffers, again.state.buffers)
    assert first.history.equals(again.history) and first.history.sizes["step"] == 12
    assert same(first.posterior(draws=3), again.posterior(draws=3)) and same(first.sample(4), again.sample(4))
    assert same(first.predict(draws=3), again.predict(draws=3))
    assert not same(first.params, other.params) and not first.history.equals(other.history)
    assert not same(first.posterior(draws=3, seed=1), first.posterior(draws=3, seed=2))
    torch.rand(7), np.random.rand(3), random.random()
    assert same(pg.fit(model, data, svi, seed=3).params, first.params), "whatever the global generators did before"


def test_a_recipe_is_built_once_under_the_seed_with_the_whole_data() -> None:
    seen: list[torch.Tensor] = []

    def build(data: torch.Tensor) -> pg.Program:
        seen.append(data)
        net = nn.Linear(1, 1)
        middle = data.mean()

        def model(x: torch.Tensor) -> None:
            pyro.module("net", net)
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(middle + net(torch.ones(1)), 1.0), obs=x)

        return pg.Program(model)

    x = torch.randn(20)
    fits = [pg.fit(pg.Recipe(build), x, SVI(steps=1, lr=1e-9, batch_size=5), seed=seed) for seed in (0, 0, 1)]
    assert len(seen) == 3 and all(torch.equal(data, x) for data in seen)
    assert same(fits[0].params, fits[1].params) and not same(fits[0].params, fits[2].params)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=4)
    assert same(pg.fit(pg.Recipe(build), loader, SVI(steps=1, lr=1e-9, batch_size=5)).params, fits[0].params)
    assert torch.equal(seen[-1], x), "a recipe sees tensors, whatever the user holds"
    with pytest.raises(TypeError, match="must return a Program, got NoneType"):
        pg.fit(pg.Recipe(lambda data: None), x, SVI(steps=1))


# ------------------------------------------------------------------------------------------- nothing is changed
def test_a_fit_leaves_modules_and_gradients_as_they_were() -> None:
    """The guard compares weights, buffers, modes, flags and gradients of every network made by `network`."""
    model, net = regression()
    net.eval()
    net[1].train()
    from programs import REGISTRY, looks

    REGISTRY[net] = looks(net)
    fit = pg.fit(model, sine_rows(), SVI(steps=10, lr=0.1))
    trained = fit.module("net")
    assert not torch.equal(trained[0].weight, net[0].weight), "it did learn"
    assert torch.equal(trained[2].bias, net[2].bias) and not trained[2].bias.requires_grad, "a frozen layer stays frozen"
    assert trained[0].weight.requires_grad and not trained.training
    assert not torch.equal(trained[1].running_mean, net[1].running_mean)
    with torch.no_grad():
        trained[0].weight.zero_()
    assert fit.module("net")[0].weight.abs().sum() > 0, "every call makes a copy"
    for call in (fit.posterior, fit.predict, fit.evidence, fit.to_arviz, fit.diagnose):
        call(draws=60)
    fit.sample(3)


def test_running_statistics_move_once_a_step() -> None:
    model, net = regression()
    fit = pg.fit(model, sine_rows(), SVI(steps=7, batch_size=8))
    assert int(fit.state.buffers["net$$$1.num_batches_tracked"]) == 7, "looking at a program is no training"


class Angry(Exception):
    pass


def _raising(when: int) -> Callable[[int, Any], None]:
    def hook(step: int, info: Any) -> None:
        if step == when:
            raise Angry

    return hook


@pytest.mark.parametrize("error", [Angry, KeyboardInterrupt])
def test_nothing_is_changed_by_a_fit_that_raises(error: type[BaseException]) -> None:
    model, net = regression()
    calls = {"n": 0}

    def fragile(t: torch.Tensor, y: torch.Tensor | None = None) -> None:
        calls["n"] += 1
        if calls["n"] == 9:
            raise error
        model(t, y)

    store = pyro.get_param_store()
    mine = pyro.param("mine", torch.ones(2))
    try:
        pg.fit(fragile, sine_rows(), SVI(steps=20))
        assert error is KeyboardInterrupt
    except Angry:
        assert error is Angry
    with pytest.raises(Angry):
        pg.fit(model, sine_rows(), SVI(steps=20), callbacks=[_raising(3)])
    assert list(store) == ["mine"] and store["mine"] is not None and torch.equal(mine, torch.ones(2))
    pyro.clear_param_store()


def test_tensors_of_a_closure_are_not_written_to() -> None:
    plain, lazy, parameter = torch.zeros(()), torch.zeros(()), nn.Parameter(torch.zeros(()))

    def guide(x: torch.Tensor) -> None:
        loc = pyro.param("plain", plain) + pyro.param("lazy", lambda: lazy) + pyro.param("parameter", parameter)
        pyro.sample("theta", dist.Normal(loc, 0.3))

    fit = pg.fit(pg.Program(conjugate, guide), X8.float(), SVI(steps=20, lr=0.1))
    assert all(abs(float(fit.params[name])) > 0.01 for name in ("plain", "lazy", "parameter"))
    assert [float(plain), float(lazy), parameter.item()] == [0.0] * 3
    assert not plain.requires_grad and not lazy.requires_grad
    assert abs(float(fit.posterior(draws=200)["theta"].mean()) - sum(map(float, fit.params.values()))) < 0.12  # 5 errors


@pytest.mark.parametrize("switched", ["torch", "pyro", "dtype", "no_grad", "inference_mode", "local parameters"])
def test_global_settings_are_left_as_they_were_and_do_not_matter(switched: str) -> None:
    expected = pg.fit(conjugate, X8, SVI(steps=3)).params
    if switched == "torch":
        torch.distributions.Distribution.set_default_validate_args(False)
    elif switched == "pyro":
        pyro.enable_validation(False)
    elif switched == "dtype":
        torch.set_default_dtype(torch.float64)
    from conftest import settings

    before = settings()
    scopes: dict[str, Any] = {
        "no_grad": torch.no_grad(),
        "inference_mode": torch.inference_mode(),
        "local parameters": pyro.settings.context(module_local_params=True),
    }
    try:
        if switched in scopes:
            with scopes[switched]:
                found = pg.fit(conjugate, X8, SVI(steps=3)).params
        else:
            found = pg.fit(conjugate, X8, SVI(steps=3)).params
        assert settings() == before
    finally:
        torch.set_default_dtype(torch.float32)
        pyro.enable_validation(True)
    assert same(found, expected)


def test_two_networks_under_one_name_are_an_error() -> None:
    one, two = network(nn.Linear(1, 1)), network(nn.Linear(1, 1))

    def model(x: torch.Tensor) -> None:
        pyro.module("net", one)
        pyro.module("net", two)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(one(x[:, None])[:, 0] + two(x[:, None])[:, 0], 1.0), obs=x)

    with pytest.raises(ValueError, match=r"pyro.module\('net', ...\) registers two different modules"):
        pg.fit(model, X8.float(), SVI(steps=2))


def test_an_unregistered_network_is_noted_and_one_registered_by_the_guide_is_not() -> None:
    net = network(nn.Linear(1, 1))

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(net(z[:, None])[:, 0], 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        local_guide(x)

    def registering(x: torch.Tensor) -> None:
        pyro.module("net", net)
        local_guide(x)

    fit = pg.fit(pg.Program(model, guide), X8.float(), SVI(steps=2))
    assert fit.notes["not trained"].startswith("Linear hold trainable parameters that Pyro does not know")
    assert "not trained" not in pg.fit(pg.Program(model, registering), X8.float(), SVI(steps=2)).notes


# ----------------------------------------------------------------------------------------------- Pyro's modules
class Line(PyroModule):
    """A model as a PyroModule: a trained weight, a constrained parameter, a bias with a prior, a plain network."""

    def __init__(self) -> None:
        super().__init__()
        self.line = PyroModule[nn.Linear](1, 1)
        self.line.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))
        self.noise = PyroParam(torch.tensor(1.0), constraint=dist.constraints.positive)
        self.net = nn.Linear(1, 1, bias=False)

    def forward(self, t: torch.Tensor, y: torch.Tensor | None = None) -> None:
        mean = (self.line(t) + 0.01 * self.net(t)).squeeze(-1)
        with pyro.plate("data", len(t)):
            pyro.sample("y", dist.Normal(mean, self.noise), obs=y)


def test_a_model_written_as_a_pyro_module_trains_and_answers_with_its_trained_values() -> None:
    model = network(Line())
    t = torch.linspace(-1.0, 1.0, 60)[:, None]
    data = {"t": t, "y": 3.0 * t[:, 0] + 0.5 + 0.1 * torch.randn(60)}
    short = SVI(steps=250, lr=0.05)
    fit = pg.fit(model, data, short)
    start = pg.fit(model, data, SVI(steps=1, lr=1e-9))
    slope = fit.params["line.weight"]
    assert abs(float(slope) - 3.0) < 0.3 < abs(float(start.params["line.weight"]) - 3.0)
    assert float(fit.params["noise"]) < 0.5 < float(start.params["noise"])
    copied = fit.module("model")
    assert torch.equal(copied.line.weight, slope) and torch.equal(copied.net.weight, fit.params["net$$$weight"])
    assert copied.noise.item() == pytest.approx(float(fit.params["noise"]))
    mean = fit.predict({"t": torch.ones(4, 1)}, draws=400)["y"].mean()
    # Noise 0.1-0.2 over 1600 draws, and the posterior of the bias: 0.02 in all.
    assert abs(float(mean) - 3.5) < 0.4
    more = pg.fit(model, data, SVI(steps=100, lr=0.02), start=fit)
    assert abs(float(more.params["line.weight"]) - 3.0) < 0.3 and not same(more.params, fit.params), "it trains on"
    assert torch.equal(more.params["line.weight"], more.module("model").line.weight)


# ---------------------------------------------------------------------------------------------------- how it ends
@pytest.mark.parametrize("when", [1, 5])
def test_ctrl_c_gives_the_partial_fit(when: int) -> None:
    def interrupt(step: int, info: Any) -> None:
        if step == when:
            raise KeyboardInterrupt

    fit = pg.fit(conjugate, X8, SVI(steps=50, lr=0.1), callbacks=[interrupt], seed=1)
    assert fit.status == "interrupted" and f"after {when} steps" in fit.message and fit.cost["steps"] == when
    assert fit.history.sizes["step"] == when
    assert same(fit.params, pg.fit(conjugate, X8, SVI(steps=when, lr=0.1), seed=1).params), "all steps done are kept"
    assert fit.posterior(draws=2)["theta"].shape == (2,)


class _Faulty(Objective):
    """The ELBO of a conjugate program, until a given update, when loss or gradient breaks."""

    needs = (("density",),)

    def __init__(self, when: int, what: str) -> None:
        self.when, self.what = when, what

    def build(self, setting: Any) -> Game:
        outer, inner = self, ELBO().build(setting)

        class Broken(Game):
            count = 0

            def loss(self, player: str, batch: Any) -> Loss:
                self.count += 1
                found = inner.loss(player, batch)
                if self.count != outer.when:
                    return found
                if outer.what == "loss":
                    return Loss(found.value * math.nan, found.parts)
                zero = (pyro.param("loc") - pyro.param("loc").detach()).abs()
                return Loss(found.value + zero.sqrt().sqrt())  # value as before, slope 0 * infinity at zero

        return Broken()


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("when", [1, 4, 6])
def test_a_nonfinite_step_rolls_back_to_the_last_finite_state(when: int, what: str) -> None:
    program = pg.Program(conjugate, conjugate_guide)
    with pytest.raises(pg.NonFiniteError, match=f"the {what} of player 'program' is not finite at step {when - 1}") as caught:
        pg.fit(program, X8, SVI(_Faulty(when, what), steps=6, lr=0.1), seed=2)
    fit = caught.value.fit
    assert fit is not None and fit.status == "diverged" and fit.history.sizes.get("step", 0) == when - 1
    assert fit.cost["steps"] == when - 1
    # The last parameters whose loss was known to be finite are those before the update that led here.
    steps = max(0, when - 2)
    if steps:
        assert same(fit.params, pg.fit(program, X8, SVI(steps=steps, lr=0.1), seed=2).params)
    else:
        assert float(fit.params["loc"]) == 0.3
    assert all(bool(value.isfinite().all()) for value in fit.params.values()) and fit.posterior(draws=1)


def test_an_overflow_in_the_very_last_update_is_noticed() -> None:
    with pytest.raises(pg.NonFiniteError, match="the update of step 1 made loc.* infinite or NaN") as caught:
        pg.fit(pg.Program(conjugate, conjugate_guide), X8.float(), SVI(steps=1, lr=1e39, optimiser="sgd"))
    assert caught.value.fit is not None and float(caught.value.fit.params["loc"]) == pytest.approx(0.3)


def test_buffers_are_rolled_back_too() -> None:
    model, net = regression()
    t = sine_rows()["t"]

    factor = {"t": 1.0}

    def poisoned(t: torch.Tensor, y: torch.Tensor | None = None) -> None:
        model(t * factor["t"], y)

    def poison(step: int, info: Any) -> None:
        factor["t"] = math.inf if step == 3 else 1.0

    with pytest.raises(pg.NonFiniteError) as caught:
        pg.fit(poisoned, {"t": t, "y": t[:, 0]}, SVI(steps=9), callbacks=[poison])
    assert caught.value.fit is not None and caught.value.fit.cost["steps"] == 3
    assert all(bool(value.isfinite().all()) for value in caught.value.fit.state.buffers.values())


def test_a_stop_rule_ends_the_run_as_converged() -> None:
    asked: list[int] = []

    def rule(history: Mapping[str, Any]) -> str | None:
        asked.append(len(history["program_loss"]))
        return "enough" if asked[-1] >= 100 else None

    fit = pg.fit(conjugate, X8, SVI(steps=400, stop_rule=rule))
    assert (fit.status, fit.message, fit.cost["steps"]) == ("converged", "enough", 100)
    assert asked == [50, 100] and fit.history.sizes["step"] == 100


def test_validation_records_the_evidence_of_held_out_rows() -> None:
    held = torch.tensor([0.5, -0.5], dtype=torch.float64)
    program = pg.Program(conjugate, conjugate_guide)
    fit = pg.fit(program, X8, SVI(steps=20, lr=0.1), validation=held, validate_every=8, seed=5)
    assert fit.history["check"].values.tolist() == [8, 16, 20]
    assert same(fit.params, pg.fit(program, X8, SVI(steps=20, lr=0.1), seed=5).params), "looking changes nothing"
    last = fit.history["validation_evidence"].values[-1]
    assert last == pytest.approx(fit.evidence(held, particles=16, draws=16).mean, abs=1e-12)
    model, net = generator()
    with pytest.raises(pg.IncompatibleError, match="(?s)^validation does not fit the program 'implicit'.*density"):
        pg.fit(model, torch.randn(8, 1), SVI(_Duel(needs=()), steps=2), validation=torch.randn(4, 1))
    with pytest.raises(ValueError, match="validate_every: expected a whole number of at least 1, got 0"):
        pg.fit(program, X8, SVI(steps=2), validation=held, validate_every=0)


def test_start_continues_where_the_earlier_fit_ended() -> None:
    program = pg.Program(conjugate, conjugate_guide)
    first = pg.fit(program, X8, SVI(steps=50, lr=0.1))
    still = pg.fit(program, X8, SVI(steps=1, lr=1e-12), start=first)
    assert all(torch.allclose(still.params[name], first.params[name], atol=1e-9) for name in first.params)
    default = pg.fit(conjugate, X8, SVI(steps=50, lr=0.1))
    on = pg.fit(conjugate, X8, SVI(steps=1, lr=1e-12), start=default)
    assert all(torch.allclose(on.params[name], default.params[name], atol=1e-9) for name in default.params)
    model, net = regression()
    rows = sine_rows()
    one = pg.fit(model, rows, SVI(steps=30, lr=0.05))
    before = {name: value.clone() for name, value in one.params.items()}
    two = pg.fit(model, rows, SVI(steps=30, lr=0.05), start=one)
    assert float(two.history["program_loss"][0]) < float(one.history["program_loss"][0])
    assert same(one.params, before), "the earlier fit stays what it was"
    wide = pg.fit(model, {k: v.double() for k, v in rows.items()}, SVI(steps=2), start=one)
    assert wide.params["net$$$0.weight"].dtype == torch.float64, "other dtypes are cast"
    with pytest.raises(ValueError, match="start: that fit is of the program 'conjugate', and not of 'local'"):
        pg.fit(local, X8, SVI(steps=2), start=default)


# ----------------------------------------------------------------------------------------- dtype, device, players
@pytest.mark.parametrize("data, dtype", [(X8, torch.float64), (X8.float(), torch.float32), ([1.0, 2.0], torch.float64)])
def test_the_dtype_is_that_of_the_data(data: Any, dtype: torch.dtype) -> None:
    inside = []

    def model(x: torch.Tensor) -> None:
        inside.append(torch.zeros(()).dtype)
        conjugate(x)

    fit = pg.fit(model, data, SVI(steps=2))
    assert set(inside) == {dtype} and {p.dtype for p in fit.params.values()} == {dtype}
    assert fit.posterior(draws=2)["theta"].dtype == dtype == fit.data.dtype
    other = torch.float32 if dtype == torch.float64 else torch.float64
    assert pg.fit(model, data, SVI(steps=2), dtype=other).posterior(draws=2)["theta"].dtype == other


def test_one_entry_in_float64_makes_the_whole_fit_float64() -> None:
    net = network(nn.Linear(1, 1))

    def model(t: torch.Tensor, y: torch.Tensor) -> None:
        pyro.module("net", net)
        noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(t)):
            pyro.sample("y", dist.Normal(net(t)[:, 0], noise), obs=y)

    rows = {"t": torch.randn(6, 1), "y": torch.randn(6), "unused": np.zeros(6)}
    fit = pg.fit(model, rows, SVI(steps=2))
    assert fit.data.dtype == fit.params["net$$$weight"].dtype == torch.float64


def test_mistakes_in_the_arguments_of_fit() -> None:
    svi = SVI(steps=2)
    for seed in (-1, 1.5, "a", None, True, 2**32):
        with pytest.raises(ValueError, match="seed: expected a whole number of at least 0 and below"):
            pg.fit(conjugate, X8, svi, seed=seed)
    assert pg.fit(conjugate, X8, svi, seed=np.int64(3)).seed == 3
    with pytest.raises(TypeError, match=r"algorithm: expected an instance such as SVI\(\) \(with brackets\), got SVI"):
        pg.fit(conjugate, X8, SVI)
    with pytest.raises(TypeError, match="algorithm: expected an instance.*got str"):
        pg.fit(conjugate, X8, "svi")
    with pytest.raises(TypeError, match="program: expected a model function, a Program or a Recipe, got int"):
        pg.fit(3, X8, svi)
    with pytest.raises(TypeError, match="program: got the class Line"):
        pg.fit(Line, X8, svi)
    with pytest.raises(TypeError, match="dtype: expected torch.float32 or torch.float64"):
        pg.fit(conjugate, X8, svi, dtype="float64")
    with pytest.raises(ValueError, match="device: .*nowhere"):
        pg.fit(conjugate, X8, svi, device="nowhere")
    with pytest.raises(TypeError, match="guide: expected a Pyro guide"):
        pg.Program(conjugate, guide=3)


def test_a_closure_on_another_device_is_explained() -> None:
    far = torch.ones((), device="meta")

    def mixed(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(torch.cat([far[None], x[1:]]), 1.0), obs=x)

    with pytest.raises(ValueError, match="closure lives on another device.*pg.constant"):
        pg.fit(mixed, X8.float(), SVI(steps=2))


class _Duel(Objective):
    """Two players on parameters of the model: one follows the data, the other the first."""

    needs: Any = (("density",),)
    uses_guide = False

    def __init__(self, needs: Any = ()) -> None:
        self.needs = needs

    def build(self, setting: Any) -> Game:
        class Two(Game):
            players = (
                Player("chaser", updates=3, owns=lambda name: name == "b"),
                Player("program", owns=lambda name: name == "a"),
            )

            def loss(self, player: str, batch: Any) -> Loss:
                setting.model(*batch.args)
                a, b = pyro.param("a"), pyro.param("b")
                return Loss((b - a.detach()) ** 2 if player == "chaser" else (a - batch.args[0].mean()) ** 2)

        return Two()


def test_every_player_has_its_own_optimiser_rate_and_batches() -> None:
    def model(x: torch.Tensor) -> None:
        a = pyro.param("a", torch.zeros((), dtype=x.dtype))
        pyro.param("b", torch.ones((), dtype=x.dtype))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(a, 1.0), obs=x)

    x = torch.full((4,), 2.0, dtype=torch.float64)
    fit = pg.fit(model, x, SVI(_Duel(), steps=1, optimiser="sgd", lr={"program": 0.25, "chaser": 0.1}))
    # chaser: b <- b - 0.1 * 2 (b - a) three times from 1 with a = 0: 0.8^3; then a <- 0 + 0.25 * 2 * 2.
    assert float(fit.params["b"]) == pytest.approx(0.512, abs=1e-12) and float(fit.params["a"]) == pytest.approx(1.0)
    assert set(fit.history.data_vars) == {"program_loss", "chaser_loss"}
    assert fit.cost["steps"] == 1 and fit.cost["gradient_evaluations"] == 4
    fixed = pg.fit(model, x, SVI(_Duel(), steps=5, optimiser="sgd", lr={"program": 0.25, "chaser": 1e-12}))
    assert float(fixed.params["b"]) == pytest.approx(1.0, abs=1e-9)


def test_callbacks_see_every_step_and_progress_is_off_when_told(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[int, float]] = []
    fit = pg.fit(conjugate, X8, SVI(steps=4), callbacks=[lambda s, info: seen.append((s, float(info["program_loss"])))], progress=False)
    assert [step for step, _ in seen] == [1, 2, 3, 4]
    assert [value for _, value in seen] == fit.history["program_loss"].values.tolist()
    assert capsys.readouterr().err == ""
    pg.fit(conjugate, X8, SVI(steps=4), progress=True)
    assert "SVI(ELBO)" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- what a fit answers
def test_a_fit_says_what_it_is() -> None:
    fit = pg.fit(conjugate, X8, SVI(steps=3), seed=7)
    assert repr(fit).startswith("Fit(conjugate, SVI(ELBO), seed=7: finished") and "ran all 3 steps" in repr(fit)
    assert fit.status is pg.Status.FINISHED and fit == fit and hash(fit) == hash(fit) and fit != copy.copy(fit)
    with pytest.raises(AttributeError):
        fit.seed = 3  # type: ignore[misc]
    fit.params["AutoNormal.locs.theta"].zero_()
    assert float(fit.params["AutoNormal.locs.theta"]) != 0.0, "params are copies"
    with pytest.raises(KeyError, match="no network named 'net' in this fit"):
        fit.module("net")
    for name, value in (("draws", 0), ("draws", 1.5), ("draws", True)):
        with pytest.raises(ValueError, match=f"{name}: expected a whole number of at least 1"):
            fit.posterior(**{name: value})
    with pytest.raises(ValueError, match="n: expected a whole number"):
        fit.sample(0)


def test_posterior_and_predict_have_draws_first() -> None:
    exact = conjugate_posterior(X8)
    fit = pg.fit(pg.Program(conjugate, conjugate_guide), X8, SVI(steps=400, lr=0.03))
    theta = fit.posterior(draws=3000)["theta"]
    assert theta.shape == (3000,)
    predicted = fit.predict(draws=3000)["x"]
    assert predicted.shape == (3000, 8)
    variance = float(fit.params["scale"] ** 2 + 1.0)
    # Rows share theta: the variance of one column has a relative error of sqrt(2 / 3000) = 0.026.
    assert float(predicted[:, 0].var()) == pytest.approx(variance, rel=0.13)
    assert float(theta.mean()) == pytest.approx(float(exact.loc), abs=0.12)
    assert fit.predict(X8[:3], draws=5)["x"].shape == (5, 3)


def test_predict_draws_what_is_missing_and_posterior_what_is_latent_then() -> None:
    model, net = regression()
    fit = pg.fit(model, sine_rows(), SVI(steps=20, lr=0.05))
    new = {"t": torch.linspace(0.0, 1.0, 5)[:, None]}
    assert fit.predict(new, draws=6)["y"].shape == (6, 5)
    assert set(fit.sample(3)) == {"noise", "y"}
    given = fit.sample(3, given={"t": torch.zeros(3, 1), "noise": 1e-4})
    expected = fit.module("net")(torch.zeros(3, 1)).squeeze(-1).detach()
    assert torch.allclose(given["y"], expected, atol=1e-3) and float(given["noise"]) == pytest.approx(1e-4)
    with pytest.raises(ValueError, match=r"given: no site or input named \['q'\]"):
        fit.sample(3, given={"q": 1})
    with pytest.raises(ValueError, match=r"given: 't' has shape \(2, 1\), expected \(3, 1\)"):
        fit.sample(3, given={"t": torch.zeros(2, 1)})


def test_given_values_may_be_plain_numbers() -> None:
    fit = pg.fit(conjugate, X8, SVI(steps=2))
    drawn = fit.sample(2000, given={"theta": 5})["x"]
    assert float(drawn.mean()) == pytest.approx(5.0, abs=5 / math.sqrt(2000))
    assert fit.sample(3, given={"x": 1})["x"].tolist() == [1.0, 1.0, 1.0]


def test_an_amortised_guide_follows_new_rows_and_a_guide_by_row_does_not() -> None:
    fit = pg.fit(pg.Program(local, local_guide), X8, SVI(steps=2))
    far = X8 + 100.0
    assert float(fit.posterior(far, draws=20)["z"].mean()) > 15.0, "slope 0.2"

    def by_row(x: torch.Tensor) -> None:
        loc = pyro.param("loc", lambda: 50.0 + torch.zeros(len(x), dtype=x.dtype))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0))

    for guide in (by_row, AutoNormal):
        fit = pg.fit(pg.Program(local, guide), X8, SVI(steps=2))
        draws = fit.posterior(far, draws=40)["z"]  # as many rows as there were, but other ones
        assert draws.shape == (40, 8) and abs(float(draws.mean())) < 5 / math.sqrt(320), "from the prior, as documented"


def test_a_program_that_reads_x_to_make_x_cannot_be_run_forward() -> None:
    def chain(x: torch.Tensor) -> None:
        slope = pyro.param("slope", torch.tensor(0.5, dtype=x.dtype))
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(slope * before, 1.0).to_event(1), obs=x)

    def logged(x: torch.Tensor) -> None:  # the observation is not the entry itself
        chain(x.exp().log())

    x = torch.randn(10, 3)
    for model in (chain, logged):
        fit = pg.fit(model, x, SVI(steps=2))
        assert fit.evidence().exact
        with pytest.raises(pg.IncompatibleError, match=r"reads its own observation of x to generate it"):
            fit.sample(4)

    def standardised(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.param("a", torch.zeros(())), 1.0), obs=(x - 3.0) / 2.0)

    assert pg.fit(standardised, x[:, 0], SVI(steps=2)).sample(4)["x"].shape == (4,)


def test_finite_latents_are_drawn_exactly_from_their_conditional() -> None:
    fit = pg.fit(mixture, torch.cat([X8 - 6.0, X8 + 6.0]), SVI(steps=300, lr=0.05), seed=1)
    draws = fit.posterior(draws=50)
    assert draws["k"].shape == (50, 16) and draws["means"].shape == (50, 2)
    side = draws["k"].double().mean(0)
    assert float((side[:8] - side[8:]).abs().min()) > 0.9, "rows 12 standard deviations apart are told apart"


def test_prior_predictive_needs_no_fit() -> None:
    drawn = pg.prior_predictive(conjugate, X8, draws=2000, seed=3)
    assert drawn["theta"].shape == (2000,) and drawn["x"].shape == (2000, 8)
    assert float(drawn["x"][:, 0].var()) == pytest.approx(2.0, rel=0.16)  # relative error sqrt(2 / 2000): 5 of them
    assert same(drawn, pg.prior_predictive(conjugate, X8, draws=2000, seed=3))


def test_programs_of_every_kind_answer_without_a_crash() -> None:
    schools = pg.fit(eight_schools, {"sigma": X8.abs().float() + 1.0, "y": 10 * X8.float()}, SVI(steps=20))
    whole = pg.fit(no_plate, X8, SVI(steps=20))
    free = pg.fit(pg.Program(lambda x: _free(x)), X8, SVI(steps=20))
    for fit in (schools, whole, free):
        assert "verdict" in fit.diagnose(draws=60).attrs and fit.to_arviz(draws=60) is not None and fit.sample(8)
        assert math.isfinite(fit.evidence(draws=30, particles=30).mean)
    with pytest.raises(pg.IncompatibleError, match="has no latent sites"):
        free.posterior()


def _free(x: torch.Tensor) -> None:
    """No latent site at all: maximum likelihood."""
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(pyro.param("loc", torch.zeros((), dtype=x.dtype)), 1.0), obs=x)


# ---------------------------------------------------------------------------------------------------------- subsets
def test_a_subset_keeps_what_is_drawn_afresh_for_every_batch() -> None:
    images = torch.rand(30, 4)
    rows = Rows({"x": images, "y": torch.arange(30)}, on_batch=lambda batch: {**batch, "x": torch.bernoulli(batch["x"])})

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Bernoulli(pyro.param("p", torch.full((4,), 0.5))).to_event(1), obs=x)

    held = as_dataset(rows, model).subset(torch.arange(10, 20))
    assert isinstance(held.original, Rows) and held.original.on_batch is rows.on_batch
    assert torch.equal(held.original["x"], images[10:20]) and held.original["y"].tolist() == list(range(10, 20))
    assert set(held.batch().kwargs["x"].unique().tolist()) == {0.0, 1.0}
    seen: list[Any] = []

    def build(data: Any) -> pg.Program:
        seen.append(data)
        return pg.Program(model)

    for data in (held, held.original):
        fit = pg.fit(pg.Recipe(build), data, SVI(steps=3, batch_size=5))
        assert fit.data.on_batch is not None and isinstance(seen[-1], Rows) and len(seen[-1]["x"]) == 10
    plain = as_dataset({"x": images, "y": torch.arange(30), "c": pg.constant([1])}, model).subset(torch.tensor([3, 4]))
    assert plain.original["y"].tolist() == [3, 4] and plain.original["c"].value == [1]


def _iterator() -> Iterator[int]:
    yield 1


@pytest.mark.parametrize(
    "data, error, message",
    [
        ("text", TypeError, "data 'x': expected a tensor or an array of numbers, got str"),
        (["a", "b"], TypeError, "expected a tensor or an array of numbers"),
        (np.array([None, 1]), TypeError, "expected a tensor or an array of numbers"),
        (torch.tensor(1.0), ValueError, "expected rows along the first dimension, got a single number"),
        (torch.zeros(0), ValueError, "expected at least one row"),
        (torch.zeros(3, 0), ValueError, "expected at least one row and one column"),
        (torch.tensor([1.0, math.nan, math.inf]), ValueError, r"2 value\(s\) are NaN or infinite, the first at index \(1,\)"),
        ({"x": torch.zeros(3), "z": torch.zeros(4)}, ValueError, "must share their rows.*x: 3, z: 4.*pg.constant"),
        ({"y": torch.zeros(3)}, ValueError, r"the model needs the argument 'x', which the data does not hold"),
        ((X8, X8), TypeError, "got a tuple of 2 arrays; pass a mapping"),
        (_iterator(), TypeError, "expected a tensor or an array of numbers, got generator"),
        (None, TypeError, "expected a tensor or an array of numbers, got NoneType"),
    ],
)
def test_data_that_cannot_be_rows(data: Any, error: type[Exception], message: str) -> None:
    def model(x: torch.Tensor, z: Any = None) -> None:
        conjugate(x)

    with pytest.raises(error, match=message):
        pg.fit(model, data, SVI(steps=2))


def test_iterable_sources_are_refused() -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[int]:
            return iter(range(3))

    for source in (Stream(), torch.utils.data.DataLoader(Stream())):
        with pytest.raises(TypeError, match="no known number of rows"):
            pg.fit(conjugate, source, SVI(steps=2))
