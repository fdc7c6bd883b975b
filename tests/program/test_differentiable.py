"""Whether draws carry a gradient is tried, as a simulator inside a program may stop it."""

from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import ppl_gen as pg
from ppl_gen.data.batching import Batch, as_dataset
from ppl_gen.fits import preparing
from ppl_gen.inference import SVI, Adversarial
from ppl_gen.program.differentiable import why_not_differentiable
from ppl_gen.workspace.isolation import without_side_effects

X = torch.arange(6.0)


def looped(z: Tensor) -> Tensor:
    return torch.tensor([3.0 * value.item() for value in z])


def through_numpy(z: Tensor) -> Tensor:
    return torch.from_numpy(np.tanh(z.numpy()))


SIMULATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "rounded": torch.round,
    "loop": looped,
    "numpy": through_numpy,
    "detached": lambda z: z.detach(),
    "compared": lambda z: (z > 0).to(z.dtype),
    "smooth": torch.tanh,
    "straight through": lambda z: z + (torch.round(z) - z).detach(),
}
WHY = {
    "rounded": "is zero, as behind torch.round",
    "loop": "no gradient connects draws of x with",
    "numpy": "values leave torch for numpy",
    "detached": "no gradient connects draws of x with",
    "compared": "no gradient connects draws of x with",
}


def program(name: str, *, learned: bool) -> Callable[[Tensor], None]:
    simulator = SIMULATORS[name]

    def model(x: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(2.0)) if learned else torch.tensor(2.0)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(simulator(scale * z), 1.0), obs=x)

    return model


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("name", SIMULATORS)
def test_the_offer_is_what_a_run_with_gradients_shows(name: str, learned: bool) -> None:
    model, before = program(name, learned=learned), torch.get_rng_state()
    info = pg.check(model, X)
    assert torch.equal(torch.get_rng_state(), before) and not list(pyro.get_param_store())
    assert ("differentiable samples" in info.offers) == (name not in WHY)
    assert ("not differentiable" in str(info)) == (name in WHY) == bool(info.undifferentiable)
    if name in WHY:
        assert pytest.raises(pg.IncompatibleError, pg.fit, model, X, SVI(objective=Adversarial(), steps=1)).match(
            f"needs: *differentiable samples(?s:.*)offers: (?s:.*)missing: *differentiable samples(?s:.*){WHY[name]}"
        )
        assert info.undifferentiable in info._repr_html_()


def test_a_gradient_counts_even_where_the_first_weights_are_zero() -> None:
    """A last layer that starts at zero stops the gradient of the layers before it, and has one itself."""
    net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    torch.nn.init.zeros_(net[2].weight)

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Delta(net(z)[:, 0]), obs=x)

    assert "differentiable samples" in pg.check(model, X).offers
    assert all(p.grad is None for p in net.parameters())


def test_categories_and_what_cannot_be_run_keep_the_offer() -> None:
    calls = []

    def model(x: Tensor, *, fails: bool = False) -> None:
        calls.append(fails)
        probs = torch.softmax(pyro.param("weights", torch.zeros(3)), -1)
        if fails:
            raise RuntimeError("not today")
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Categorical(probs), obs=x)

    labels = torch.tensor([0, 1, 2, 2])
    assert "differentiable samples" in pg.check(model, labels).offers
    batch = as_dataset(labels, model).batch()
    calls.clear()
    with without_side_effects(), pyro.get_param_store().scope():
        failing: Callable[..., None] = lambda x: model(x, fails=True)  # noqa: E731
        assert why_not_differentiable(failing, batch, ["x"], []) == "" and calls == [True]


def test_the_refusal_is_kept_by_a_fit() -> None:
    fit = pg.fit(program("rounded", learned=True), X, SVI(steps=2), seed=0)
    assert fit.info.undifferentiable and "differentiable samples" not in fit.info.offers


def test_nothing_observed_means_nothing_to_predict() -> None:
    def potential() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("pull", torch.tensor(0.0))

    fit = pg.fit(potential, {}, SVI(steps=2), seed=0)
    with pytest.raises(pg.IncompatibleError, match=r"no observed sites.*fit\.posterior\(\) draws"):
        fit.predict()


def test_a_look_holds_gradients_of_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network on all rows, and a chain of steps on each, would fill the memory with its graph."""
    looks: list[tuple[int | None, str]] = []

    def noted(model: Callable[..., None], batch: Batch, *rest: list[str]) -> str:
        why = why_not_differentiable(model, batch, *rest)
        looks.append((batch.rows, why))
        return why

    monkeypatch.setattr(preparing, "why_not_differentiable", noted)
    assert "differentiable samples" in pg.check(program("smooth", learned=True), torch.randn(3000)).offers
    assert looks == [(8, "")]
    looks.clear()
    assert "differentiable samples" not in pg.check(program("rounded", learned=True), torch.randn(3000)).offers
    assert [rows for rows, _ in looks] == [8, 3000], "few rows alone condemn nothing"
