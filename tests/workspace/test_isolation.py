"""A fit changes nothing it was given, whether it ends well or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import (
    X8,
    conjugate,
    local_guide,
    network,
    regression,
    same,
    sine_rows,
)
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn

import ppl_gen as pg
from ppl_gen.inference import SVI


@pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")
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
    assert torch.equal(trained[2].bias, net[2].bias) and not trained[2].bias.requires_grad, (
        "a frozen layer stays frozen"
    )
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
    seen = {"steps": 0}

    def fragile(t: torch.Tensor, y: torch.Tensor | None = None) -> None:
        if seen["steps"] == 3:
            raise error
        model(t, y)

    def count(step: int, info: Any) -> None:
        seen["steps"] += 1

    store = pyro.get_param_store()
    mine = pyro.param("mine", torch.ones(2))
    try:
        pg.fit(fragile, sine_rows(), SVI(steps=20), callbacks=[count], compile=False)
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
    assert (
        abs(float(fit.posterior(draws=200)["theta"].mean()) - sum(map(float, fit.params.values()))) < 0.12
    )  # 5 errors


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


# -------------------------------------------------------------------------------------- Pyro's modules
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


def test_an_autoguide_survives_being_copied_and_sent_to_another_process() -> None:
    """Pyro lets an autoguide drop its model when it is pickled, on the sender's side too."""
    import pickle

    from pyro.infer.autoguide import AutoGuideList, AutoNormal
    from pyro.poutine import block

    def few() -> SVI:
        return SVI(steps=3, lr=0.1)

    instance = AutoNormal(conjugate)
    program = pg.Program(conjugate, instance)
    first = pg.fit(program, X8, few())
    sent = pickle.loads(pickle.dumps(program))
    assert instance.model is not None
    assert same(first.params, pg.fit(program, X8, few()).params)
    assert same(first.params, pg.fit(sent, X8, few()).params), "its starting values come along"
    parts = AutoGuideList(conjugate)
    parts.append(AutoNormal(block(conjugate, expose=["theta"])))
    listed = pg.Program(conjugate, parts)
    assert same(pg.fit(listed, X8, few()).params, pg.fit(listed, X8, few()).params)
    with pytest.raises(pg.IncompatibleError, match="AutoGuideList forget their models.*Recipe"):
        pg.fit(pickle.loads(pickle.dumps(listed)), X8, few())
