"""One loop, one set of guarantees: what a fit repeats, how it ends, and who moves what."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
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
    generator,
    local,
    network,
    regression,
    same,
    sine_rows,
)
from torch import nn

import ppl_gen as pg
from ppl_gen.inference import ELBO, SVI
from ppl_gen.inference.objectives.base import Objective
from ppl_gen.inference.objectives.game import Game, Loss, Player


# ------------------------------------------------------------------------------------------ repeatable
def test_the_same_seed_gives_bit_for_bit_identical_fits_and_another_seed_another() -> None:
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


# ----------------------------------------------------------------------------------------- how it ends
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
            def init(self, batch: Any) -> Any:
                return {"count": torch.zeros((), dtype=torch.long)}

            def loss(self, player: str, batch: Any, state: Any) -> Any:
                state = {"count": state["count"] + 1}
                found, _ = inner.loss(player, batch, {})
                if int(state["count"]) != outer.when:
                    return found, state
                if outer.what == "loss":
                    return Loss(found.value * math.nan, found.parts), state
                zero = (pyro.param("loc") - pyro.param("loc").detach()).abs()
                return Loss(found.value + zero.sqrt().sqrt()), state  # value as before, slope 0 * infinity at zero

        return Broken()


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("when", [1, 4, 6])
def test_a_nonfinite_step_rolls_back_to_the_last_finite_state(when: int, what: str) -> None:
    program = pg.Program(conjugate, conjugate_guide)
    with pytest.raises(
        pg.NonFiniteError, match=f"the {what} of player 'program' is not finite at step {when - 1}"
    ) as caught:
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


# ------------------------------------------------------------------------------ dtype, device, players
@pytest.mark.parametrize("data, dtype", [(X8, torch.float64), (X8.float(), torch.float32), ([1.0, 2.0], torch.float32)])
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
    with pytest.raises(TypeError, match="program: got the class Linear"):
        pg.fit(nn.Linear, X8, svi)
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

            def loss(self, player: str, batch: Any, state: Any) -> Any:
                setting.model(*batch.args)
                a, b = pyro.param("a"), pyro.param("b")
                return Loss((b - a.detach()) ** 2 if player == "chaser" else (a - batch.args[0].mean()) ** 2), state

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
    fit = pg.fit(
        conjugate,
        X8,
        SVI(steps=4),
        callbacks=[lambda s, info: seen.append((s, float(info["program_loss"])))],
        progress=False,
    )
    assert [step for step, _ in seen] == [1, 2, 3, 4]
    assert [value for _, value in seen] == fit.history["program_loss"].values.tolist()
    assert capsys.readouterr().err == ""
    pg.fit(conjugate, X8, SVI(steps=4), progress=True)
    assert "SVI(ELBO)" in capsys.readouterr().err
