"""SVI: it learns, in the steps it was told, and refuses settings out of range."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from programs import (
    X8,
    conjugate,
    conjugate_guide,
    conjugate_posterior,
    eight_schools,
    local,
    local_exact_guide,
    local_guide,
    losses,
    playing,
    switch,
    switch_guide,
)

import ppl_gen as pg
from ppl_gen.inference import ELBO, SVI


def test_svi_finds_the_exact_posterior_and_does_not_start_there() -> None:
    program = pg.Program(conjugate, conjugate_guide)
    exact = conjugate_posterior(X8)
    start = pg.fit(program, X8, SVI(steps=1, lr=1e-9), seed=0)
    fit = pg.fit(program, X8, SVI(ELBO(particles=4), steps=600, lr=0.02), seed=0)

    def far(one: pg.Fit) -> float:
        off = (one.params["loc"] - exact.loc).abs() / exact.scale
        return float(off + (one.params["scale"] / exact.scale).log().abs())

    assert far(start) > 0.5 > 0.25 > far(fit)
    drawn = fit.posterior(draws=4000)["theta"]
    assert float(drawn.mean()) == pytest.approx(float(fit.params["loc"]), abs=5 * float(exact.scale) / math.sqrt(4000))


def test_an_amortised_guide_learns_the_exact_line() -> None:
    fit = pg.fit(
        pg.Program(local, local_guide), torch.randn(200) * math.sqrt(2.0), SVI(epochs=60, batch_size=50, lr=0.02)
    )
    start = pg.fit(pg.Program(local, local_guide), torch.randn(200), SVI(steps=1, lr=1e-9))
    for name, exact in (("slope", 0.5), ("scale", math.sqrt(0.5))):
        # The noise of Adam at 0.02 is about 0.02; the start is off by 0.3.
        assert abs(float(fit.params[name]) - exact) < 0.1 < abs(float(start.params[name]) - exact), name
    assert fit.cost["steps"] == 240


def test_the_gradients_of_a_player_are_clipped_together() -> None:
    def model(x: torch.Tensor) -> None:
        a = pyro.param("a", torch.zeros((), dtype=x.dtype))
        b = pyro.param("b", torch.zeros((), dtype=x.dtype))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    x = torch.full((4,), 100.0, dtype=torch.float64)
    fit = pg.fit(model, x, SVI(steps=1, optimiser="sgd", lr=1.0, clip_norm=1.0))
    # Equal gradients of -100 each: clipped together to norm one, each moves by 1 / sqrt 2 (each alone would move by 1).
    assert [float(fit.params[name]) for name in "ab"] == pytest.approx([math.sqrt(0.5)] * 2, abs=1e-6)
    free = pg.fit(model, x, SVI(steps=1, optimiser="sgd", lr=1e-3, clip_norm=1e6))
    assert [float(free.params[name]) for name in "ab"] == pytest.approx([0.1, 0.1], abs=1e-9)


def test_schedules_and_optimisers() -> None:
    def moved(**options: Any) -> float:
        fit = pg.fit(pg.Program(switch, switch_guide), X8, SVI(steps=3, **options))
        return float(fit.params["a"]) - 0.7

    def halve(optimiser: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.5)

    plain = moved(optimiser="sgd", lr=0.1)
    assert moved(optimiser=torch.optim.SGD, lr=0.1) == pytest.approx(plain, abs=1e-15)
    assert moved(optimiser=lambda ps: torch.optim.SGD(ps, lr=0.1)) == pytest.approx(plain, abs=1e-15)
    assert moved(optimiser={"program": "sgd"}, lr={"program": 0.1}) == pytest.approx(plain, abs=1e-15)
    # Nothing is drawn here, and the loss is nearly linear over such steps: 1 + 1/2 + 1/4 of a step against three.
    assert moved(optimiser="sgd", lr=1e-5, schedule=halve) / moved(optimiser="sgd", lr=1e-5) == pytest.approx(
        1.75 / 3, rel=1e-3
    )
    for kind in ("adam", "adamw", "adamax", "rmsprop"):
        assert abs(moved(optimiser=kind, lr=0.01)) > 1e-3


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps": 5, "epochs": 5}, "steps or epochs, not both"),
        *[
            ({name: bad}, f"{name}: expected a whole number")
            for name in ("steps", "epochs", "batch_size")
            for bad in (0, -1, 2.5, True, "3")
        ],
        *[
            ({"lr": bad}, "lr: expected a positive number")
            for bad in (0, -0.1, math.nan, math.inf, "fast", {"program": 0})
        ],
        *[({"clip_norm": bad}, "clip_norm: expected a positive number") for bad in (0, -1.0, math.nan)],
        ({"optimiser": "adm"}, "optimiser: expected one of adam, .*got 'adm'"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SVI(**options)


@pytest.mark.parametrize("bad", [0, -2, 1.5, "2", None, True])
def test_particles_are_counted_in_whole_numbers(bad: Any) -> None:
    for objective in (ELBO, pg.inference.IWAE):
        with pytest.raises(ValueError, match="particles: expected a whole number of at least 1"):
            objective(particles=bad)


def test_other_mistakes_in_the_settings() -> None:
    with pytest.raises(TypeError, match="objective: expected an objective such as ELBO"):
        SVI(objective="elbo")
    with pytest.raises(TypeError, match="stop_rule: expected a function, got int"):
        SVI(stop_rule=3)
    with pytest.raises(ValueError, match=r"lr: ELBO has no player \['critic'\]; it has \['program'\]"):
        pg.fit(conjugate, X8, SVI(steps=2, lr={"critic": 0.1}))
    with pytest.raises(TypeError, match="optimiser: expected a function.*torch.optim"):
        pg.fit(conjugate, X8, SVI(steps=2, optimiser=pyro.optim.Adam({"lr": 0.1})))
    with pytest.raises(ValueError, match="stratify: no entry 'label'.*there is x"):
        pg.fit(conjugate, X8, SVI(steps=2, batch_size=4, stratify="label"))
    with pytest.raises(ValueError, match="time_step: expected one of 'sampled', 'all'"):
        ELBO(time_step="some")
    with pytest.raises(pg.IncompatibleError, match="nothing to learn in 'local'"):
        pg.fit(
            pg.Program(local, lambda x: pyro.sample("z", dist.Normal(x, 1.0).mask(False)) if False else _free(x)),
            X8,
            SVI(steps=1),
        )


def _free(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 1.0))


def test_autoguides_are_made_new_for_every_fit() -> None:
    from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

    instance = AutoNormal(conjugate)
    first = pg.fit(pg.Program(conjugate, instance), X8, SVI(steps=30, lr=0.1), seed=0)
    second = pg.fit(pg.Program(conjugate, instance), X8, SVI(steps=30, lr=0.1), seed=0)
    assert first.params.keys() == second.params.keys() and first.params
    assert all(torch.equal(first.params[name], second.params[name]) for name in first.params)
    assert not list(instance.parameters()), "the user's instance is not even set up"
    for kind in (AutoMultivariateNormal, AutoNormal):
        fit = pg.fit(pg.Program(eight_schools, kind), {"sigma": X8.abs().float() + 1, "y": X8.float()}, SVI(steps=3))
        assert fit.notes["guide"].startswith(kind.__name__)
    assert pg.fit(conjugate, X8, SVI(steps=1)).notes["guide"] == "AutoNormal over theta (default)"


def test_the_bound_is_tight_with_the_exact_guide() -> None:
    with playing(local, local_exact_guide, ELBO(), X8) as (game, dataset):
        mean = losses(game, dataset.batch(), 400)
    exact = -float(dist.Normal(torch.zeros((), dtype=torch.float64), math.sqrt(2.0)).log_prob(X8).mean())
    z = (mean.mean() - exact) / (mean.std() / 20)  # the divergence is analytic, so the loss itself varies
    assert abs(float(z)) < 4.5  # two-sided 7e-6


def test_gradients_that_autograd_expands_reach_the_optimiser_whole() -> None:
    """The gradient of a sum is one number expanded: a fused optimiser that reads raw memory would see the neighbours."""

    def model(x: torch.Tensor) -> None:
        parts = pyro.param("parts", torch.zeros(5))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(parts.sum(), 1.0), obs=x)

    for kind in ("adam", "adamw", "sgd", "rmsprop"):
        fit = pg.fit(model, X8.float() + 3.0, SVI(steps=5, lr=0.01, optimiser=kind))
        parts = fit.params["parts"]
        assert float(parts.min()) == float(parts.max()) > 0.01, kind


def test_a_loss_without_gradient_is_said_so() -> None:
    def guide(x: torch.Tensor) -> None:
        pyro.param("unused", torch.zeros(()))

    with pytest.raises(pg.IncompatibleError, match="depends on none of its parameters"):
        pg.fit(pg.Program(switch, guide), X8, SVI(steps=2))
