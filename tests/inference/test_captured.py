"""Captured steps: the same numbers as the program's own, for every kind of thing that a graph could freeze."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoMultivariateNormal
from torch import nn

import ppl_gen as pg
from ppl_gen.inference import ELBO, IWAE, SVI, Adversarial, ContrastiveDivergence, Divergence
from ppl_gen.inference.captured import EAGER, LOOK, SHAPES
from ppl_gen.inference.objectives import adversarial
from ppl_gen.models import gan, rbm

X = torch.randn(30, 2, generator=torch.Generator().manual_seed(1))
STEPS = 12


def both(program: Any, data: Any = X, steps: int = STEPS, compile: str = "graph", **settings: Any) -> list[pg.Fit]:
    """A fit by the program itself, and one of the same seed by what was captured of it."""
    run = {name: settings.pop(name) for name in ("callbacks",) if name in settings}
    algorithm = SVI(steps=steps, **settings)
    return [pg.fit(program(), data, algorithm, seed=3, compile=how, progress=False, **run) for how in (False, compile)]


def check_equal(own: pg.Fit, captured: pg.Fit, path: str = "graph") -> None:
    """Bit for bit: a replay makes the same operations in the same order, with the same random numbers."""
    assert (own.cost["path"], captured.cost["path"]) == ("eager", path), captured.cost
    assert captured.cost["capture_seconds"] > 0
    assert own.records == captured.records
    assert all(torch.equal(own.params[name], captured.params[name]) for name in own.params)
    assert all(torch.equal(value, captured.state.buffers[name]) for name, value in own.state.buffers.items())
    losses = own.records["program_loss"]
    assert len({float(loss) for loss in losses}) > STEPS // 2, "a loss that does not move would show nothing"


def normal(x: torch.Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)


def mixture(x: torch.Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    locs = pyro.sample("locs", dist.Normal(0.0, 2.0).expand([3, 2]).to_event(2))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(locs[k], 1.0).to_event(1), obs=x)


def scaled() -> pg.Program:
    def model(x: torch.Tensor, beta: float) -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 3.0 * beta).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0 + beta).to_event(1), obs=x)

    return pg.Program(model)


def coder(layers: Callable[[], list[nn.Module]] = list) -> Callable[[], pg.Program]:
    """An autoencoder whose encoder has further layers."""

    def program() -> pg.Program:
        torch.manual_seed(0)
        encode = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), *layers(), nn.Linear(8, 2))
        decode = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 2))

        def model(x: torch.Tensor, beta: float = 1.0) -> None:
            pyro.module("decode", decode)
            with pyro.plate("data", len(x)):
                with pyro.poutine.scale(scale=beta):
                    z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(decode(z), 0.5).to_event(1), obs=x)

        def guide(x: torch.Tensor, beta: float = 1.0) -> None:
            pyro.module("encode", encode)
            with pyro.plate("data", len(x)), pyro.poutine.scale(scale=beta):
                loc, log_scale = encode(x).split(1, -1)
                pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

        return pg.Program(model, guide)

    return program


def _score() -> pg.Program:
    def guide(x: torch.Tensor) -> None:
        logits = pyro.param("logits", torch.zeros(3))
        pyro.sample("weights", dist.Delta(torch.ones(3) / 3.0).to_event(1))
        pyro.sample("locs", dist.Delta(pyro.param("at", torch.randn(3, 2))).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(logits=logits))

    return pg.Program(mixture, guide)


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "global latents": (lambda: normal, {}),
    "full covariance": (lambda: pg.Program(normal, AutoMultivariateNormal), {}),
    "low rank, minibatches": (lambda: pg.Program(normal, AutoLowRankMultivariateNormal), {"batch_size": 8}),
    "several particles": (lambda: normal, {"objective": ELBO(particles=3)}),
    "sum in the model": (lambda: mixture, {"batch_size": 7}),
    "sum in the guide": (_score, {}),
    "score function": (_score, {"objective": ELBO(enumerate=False)}),
    "network, last batch smaller": (coder(), {"batch_size": 8}),
    "importance weighted": (coder(), {"objective": IWAE(particles=5), "batch_size": 8}),
    "dropout": (coder(lambda: [nn.Dropout(0.5)]), {"batch_size": 10}),
    "batch normalisation": (coder(lambda: [nn.BatchNorm1d(8)]), {"batch_size": 10}),
    "clipped, scheduled": (
        coder(),
        {"clip_norm": 0.1, "schedule": lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.5), "optimiser": "rmsprop"},
    ),
    "two players": (lambda: gan(), {"objective": Adversarial(), "batch_size": 10}),
    "gradient penalty": (lambda: gan(), {"objective": Adversarial("wasserstein", penalty="gradient")}),
    "clipped critic": (lambda: gan(), {"objective": Adversarial("wasserstein", penalty="clip")}),
    "players at once": (lambda: gan(), {"objective": Adversarial("kl", schedule="simultaneous"), "batch_size": 10}),
    "projected critic": (lambda: gan(), {"objective": Adversarial("wasserstein", penalty="projection")}),
    "a divergence of one's own": (lambda: gan(), {"objective": Adversarial(Divergence(lambda u: u * u.log()))}),
    "persistent chains": (
        lambda: rbm(hidden=3),
        {"objective": ContrastiveDivergence(persistent=True, chains=4), "batch_size": 8},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_captured_step_is_the_program_s(case: str) -> None:
    program, settings = CASES[case]
    data = (X > 0).float() if case == "persistent chains" else X
    check_equal(*both(program, data, **settings))


def test_noise_is_fresh_at_every_step() -> None:
    """At a learning rate of nothing only the noise differs from step to step."""
    fit = pg.fit(normal, X, SVI(steps=40, lr=1e-12), seed=0, compile="graph", progress=False)
    assert fit.cost["path"] == "graph" and len(set(fit.records["program_loss"])) == 40


def test_what_changes_by_step_is_an_input() -> None:
    data = {"x": X, "beta": pg.by_step(lambda step: min(1.0, 0.1 + step / 8), final=1.0)}
    own, captured = both(scaled, data, batch_size=10)
    assert captured.cost["path"] == "graph" and "path_reason" not in captured.cost
    # beta is a tensor of the fit's dtype here and a Python number there: float32 rounds both to the same 24 bits.
    assert torch.allclose(torch.tensor(own.records["program_loss"]), torch.tensor(captured.records["program_loss"]))
    flat = both(scaled, {"x": X, "beta": 1.0}, batch_size=10)[1]
    assert abs(flat.records["program_loss"][4] - own.records["program_loss"][4]) > 1e-3, "beta matters"


def test_where_a_tensor_would_change_the_program_it_runs_until_the_number_holds_still() -> None:
    """With a weight that is a tensor nobody can tell whether both sides of a divergence have the same."""
    data = {"x": X, "beta": pg.by_step(lambda step: min(1.0, 0.1 + step / 8), final=1.0)}
    own, captured = both(coder(), data, steps=12 + 2 * LOOK)
    check_equal(own, captured)
    assert captured.cost["path_reason"] == "the program ran while beta changed by step"


def _annealed(settings: dict[str, float]) -> Callable[[], pg.Program]:
    def program() -> pg.Program:
        made = coder()()
        settings["beta"] = 1.0

        def model(x: torch.Tensor) -> None:
            made.model(x, settings["beta"])

        def guide(x: torch.Tensor) -> None:
            assert made.guide is not None
            made.guide(x, settings["beta"])

        return pg.Program(model, guide)

    return program


def test_a_closure_that_a_callback_changes_is_seen() -> None:
    """Captured anew when it changes, and left to the program when it keeps changing."""
    settings = {"beta": 1.0}

    def once(step: int, info: Any) -> None:
        settings["beta"] = 1.0 if step < 6 else 0.3

    def always(step: int, info: Any) -> None:
        settings["beta"] = 1.0 / step

    own, captured = both(_annealed(settings), callbacks=[once])
    check_equal(own, captured)
    own, captured = both(_annealed(settings), steps=20, callbacks=[always])
    assert own.records == captured.records and captured.cost["path"] == "eager"
    assert "settings" in captured.cost["path_reason"] and "pg.by_step" in captured.cost["path_reason"]


def test_a_mode_or_a_number_of_a_module_that_changes_is_seen() -> None:
    class Scaled(nn.Module):
        factor = 1.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.factor

    for change in (lambda part: part.eval(), lambda part: setattr(part, "factor", 0.5)):
        parts: list[nn.Module] = []

        def layers(parts: list[nn.Module] = parts) -> list[nn.Module]:
            parts[:] = [nn.Dropout(0.5), Scaled()]
            return parts

        def late(step: int, info: Any, parts: list[nn.Module] = parts, change: Any = change) -> None:
            if step == 6:
                for part in parts:
                    change(part)

        check_equal(*both(coder(layers), callbacks=[late]))


def test_modules_that_are_first_called_later_shift_nothing() -> None:
    others: list[nn.Module] = []

    def late(step: int, info: Any) -> None:
        if step == 5:
            others.append(nn.BatchNorm1d(2))
            others[-1](X)

    check_equal(*both(coder(lambda: [nn.BatchNorm1d(8)]), batch_size=10, callbacks=[late]))


def test_a_tensor_from_outside_that_is_written_into_is_seen() -> None:
    outside = torch.tensor(1.0)

    def model(x: torch.Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), outside).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def late(step: int, info: Any) -> None:
        outside.fill_(1.0 if step < 5 else 0.01)

    check_equal(*both(lambda: outside.fill_(1.0) is None or model, callbacks=[late]))


def _counting() -> Callable[[torch.Tensor], None]:
    calls: list[int] = []

    def model(x: torch.Tensor) -> None:
        calls.append(1)
        loc = pyro.param("loc", torch.zeros(2))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0 + len(calls) % 3).to_event(1), obs=x)

    return model


def _reading(x: torch.Tensor) -> None:
    loc = pyro.param("loc", torch.ones(2))
    scale = 2.0 if loc.sum() > 0.5 else 1.0
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)


def _drawing(x: torch.Tensor) -> None:
    import numpy as np

    loc = pyro.param("loc", torch.ones(2))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc + float(np.random.rand()), 1.0).to_event(1), obs=x)


def _growing() -> pg.Program:
    def model(x: torch.Tensor, width: int) -> None:
        loc = pyro.param("loc", torch.zeros(2))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc.repeat(width).view(width, 2).mean(0), 1.0).to_event(1), obs=x)

    return pg.Program(model)


REFUSED: dict[str, tuple[Callable[[], Any], Any, str]] = {
    "counter": (_counting, X, "calls changes from step to step"),
    "if": (lambda: _reading, X, r"read into Python, by if, float\(\) or .item\(\) in test_captured, line"),
    "NumPy's draws": (lambda: _drawing, X, "NumPy's or Python's random numbers"),
    "shapes": (_growing, {"x": X, "width": pg.by_step(lambda step: step + 1, final=1)}, "differ in shape"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_captured_runs_as_it_is_and_says_why(case: str) -> None:
    program, data, reason = REFUSED[case]
    own, captured = both(program, data)
    assert captured.cost["path"] == "eager" and own.records == captured.records
    assert re.search(reason, str(captured.cost["path_reason"]))
    assert own.cost["path_reason"] == "compile=False"


def test_a_few_steps_are_not_worth_it() -> None:
    fit = pg.fit(normal, X, SVI(steps=20), seed=0, progress=False)
    assert fit.cost["path"] == "eager" and "20 steps" in str(fit.cost["path_reason"])
    assert pg.fit(normal, X, SVI(steps=150), seed=0, progress=False).cost["path"] == "graph"
    assert EAGER < LOOK and SHAPES > 2, "an epoch has two shapes"


@pytest.mark.parametrize("value", [True, "jit", None, 1])
def test_other_paths_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match='compile: expected "auto", "graph", "inductor" or False'):
        pg.fit(normal, X, SVI(steps=2), compile=value)


def test_a_network_that_is_first_called_in_the_first_step_is_captured_with_its_own_memory(monkeypatch):
    monkeypatch.setattr(adversarial, "check_output", lambda *arguments: None)  # the one who calls it before
    check_equal(*both(lambda: gan(2, hidden=(4,)), objective=Adversarial(penalty="none")))
