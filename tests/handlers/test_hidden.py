"""Parameters that a program hides by `poutine.block` stay as they are, as under Pyro's own SVI."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import X8
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam

import ppl_gen as pg
from ppl_gen.inference import EM, SVI

HIDDEN: dict[str, Any] = {"hide_types": ["param"]}


def model(x: torch.Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, pyro.param("noise", torch.tensor(1.0))), obs=x)


def guide(x: torch.Tensor) -> None:
    with poutine.block(**HIDDEN):
        scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
    pyro.sample("loc", dist.Normal(pyro.param("at", torch.tensor(0.0)), scale))


def test_svi_moves_what_pyros_svi_moves() -> None:
    """Oracle: three steps of Pyro's own Adam on the same noise; the rate of Adam is free of the scale of the loss."""
    x = X8.float()
    with pyro.get_param_store().scope():
        pyro.set_rng_seed(0)
        svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), pyro.infer.Trace_ELBO())
        for _ in range(3):
            svi.step(x)
        moved = {name: bool(value != {"scale": 0.5, "at": 0.0, "noise": 1.0}[name]) for name, value in _store()}
    fit = pg.fit(pg.Program(model, guide), x, SVI(pyro.infer.Trace_ELBO(), steps=3, lr=0.1))
    assert moved == {"scale": False, "at": True, "noise": True}
    assert {n: bool(v != {"scale": 0.5, "at": 0.0, "noise": 1.0}[n]) for n, v in fit.params.items()} == moved
    assert fit.notes["kept fixed"] == "scale: hidden from inference by poutine.block"
    again = pg.fit(fit.program, x, SVI(steps=3, lr=0.1), start=fit)
    assert again.params["scale"] == 0.5 and again.params["at"] != fit.params["at"]


def _store() -> list[tuple[str, torch.Tensor]]:
    return [(name, value.detach()) for name, value in pyro.get_param_store().items()]


def test_a_hidden_network_and_a_hidden_pyro_module_stay() -> None:
    network = torch.nn.Linear(1, 1)

    class Part(PyroModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.shift = PyroParam(torch.tensor(0.25))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.shift

    part, free = Part(), torch.nn.Linear(1, 1)

    def nets(x: torch.Tensor) -> None:
        with poutine.block(**HIDDEN):
            pyro.module("network", network)
            mean = network(part(torch.ones(1)))
        pyro.module("free", free)
        loc = pyro.sample("loc", dist.Normal(free(mean).squeeze(), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    fit = pg.fit(pg.Program(nets, AutoNormal), X8.float(), SVI(steps=2, lr=0.1))
    assert fit.params["shift"] == 0.25 and torch.equal(fit.params["network$$$weight"], network.weight)
    assert not torch.equal(fit.params["free$$$weight"], free.weight)
    assert fit.notes["kept fixed"].startswith("network$$$weight, network$$$bias, shift: hidden")


def test_what_one_of_model_and_guide_shows_is_trained_and_branches_not_taken_are_not_hidden() -> None:
    def shown(x: torch.Tensor) -> None:
        pyro.sample("loc", dist.Normal(pyro.param("at", torch.tensor(0.0)), 0.5))
        with poutine.block(**HIDDEN):
            pyro.param("noise")

    fit = pg.fit(pg.Program(model, shown), X8.float(), SVI(steps=2, lr=0.1))
    assert fit.params["noise"] != 1.0 and "kept fixed" not in fit.notes

    def branching(x: torch.Tensor, late: bool) -> None:
        at = pyro.param("late", torch.tensor(0.0)) if late else pyro.param("early", torch.tensor(0.0))
        pyro.sample("loc", dist.Normal(at, 0.5))

    def two(x: torch.Tensor, late: bool) -> None:
        model(x)

    first = pg.fit(pg.Program(two, branching), {"x": X8.float(), "late": True}, SVI(steps=2, lr=0.1))
    then = pg.fit(first.program, {"x": X8.float(), "late": False}, SVI(steps=2, lr=0.1), start=first)
    assert "kept fixed" not in then.notes and then.params["late"] == first.params["late"]


def test_em_moves_no_hidden_parameter() -> None:
    def coins(x: torch.Tensor) -> None:
        with poutine.block(**HIDDEN):
            noise = pyro.param("noise", torch.tensor(2.0), constraint=dist.constraints.positive)
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            side = pyro.sample("side", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(loc + 0.0 * side, noise), obs=x)

    fit = pg.fit(coins, X8, EM())
    assert fit.params["noise"] == 2.0 and fit.notes["kept fixed"].startswith("noise: hidden")
    torch.testing.assert_close(fit.params["loc"], X8.double().mean(), rtol=0, atol=1e-6)


def test_nothing_but_hidden_parameters_is_nothing_to_learn() -> None:
    def fixed(x: torch.Tensor) -> None:
        with poutine.block(**HIDDEN):
            noise = pyro.param("noise", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, noise), obs=x)

    with pytest.raises(pg.IncompatibleError, match=r"but those it keeps fixed .*noise"):
        pg.fit(fixed, X8.float(), SVI(steps=2))
