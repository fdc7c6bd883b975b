"""Terms that a program brings along: unbiased on minibatches, recorded, paid by the program alone; tied weights."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import X8, local, local_exact_guide, network
from torch import Tensor, nn

import ppl_gen as pg
from ppl_gen.data.batching import as_dataset
from ppl_gen.inference import ELBO, NUTS, SVI, Adversarial
from ppl_gen.inference.objectives.base import started
from ppl_gen.inference.objectives.game import Setting
from ppl_gen.program.dry_run import dry_run
from ppl_gen.workspace.isolation import isolated
from ppl_gen.workspace.workspace import Workspace

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")  # chains and guides are short on purpose

STILL = SVI(steps=1, lr=1e-30)  # one step too small to change anything


def fixed(x: Tensor) -> None:
    """Nothing is drawn, so losses are numbers."""
    loc = pyro.param("loc", torch.tensor(0.5, dtype=x.dtype))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def cubes(x: Tensor) -> Tensor:
    return pyro.param("loc", torch.tensor(0.5, dtype=x.dtype)) * x**3


def test_the_minibatch_loss_with_terms_is_unbiased_for_the_full_one() -> None:
    program = pg.Program(fixed, terms={"cubes": cubes, "constant": lambda x: torch.full((len(x),), 0.25).to(x)})
    dataset = as_dataset(X8, fixed)
    with isolated(0, dtype=dataset.dtype), Workspace(dtype=dataset.dtype):
        info = dry_run(program, dataset.batch(), guide=None)
        game = started(ELBO(), Setting(program, fixed, None, info, dataset.batch(), True))
        plain = started(ELBO(), Setting(pg.Program(fixed), fixed, None, info, dataset.batch(), True))
        full = game.loss("program", dataset.batch(), game.init(dataset.batch()))[0]
        expected = 0.5 * float((X8**3).mean())
        assert full.parts["cubes"].item() == pytest.approx(expected, abs=1e-12)
        assert full.parts["constant"].item() == pytest.approx(0.25, abs=1e-12)
        without = plain.loss("program", dataset.batch(), plain.init(dataset.batch()))[0].value
        assert (full.value - without).item() == pytest.approx(expected + 0.25, abs=1e-12)
        (slope,) = torch.autograd.grad(full.value, list(pyro.get_param_store()._params.values()))
        for size in (1, 3, 4):
            batches = [dataset.batch(index) for index in torch.arange(8).split(size)]
            some = [
                game.loss("program", batch, game.init(batch))[0].value * (len(batch.index) / 8) for batch in batches
            ]
            assert sum(some).item() == pytest.approx(full.value.item(), abs=1e-12)
            (found,) = torch.autograd.grad(sum(some), list(pyro.get_param_store()._params.values()))
            assert found.item() == pytest.approx(slope.item(), abs=1e-12)


def test_terms_are_recorded_and_are_no_part_of_the_evidence() -> None:
    algorithm = SVI(steps=400, lr=0.02)
    fits = {
        weight: pg.fit(
            pg.Program(fixed, terms={"pull": lambda x, w=weight: w * pyro.param("loc") ** 2 + 0.0 * x}),
            X8,
            algorithm,
            seed=0,
        )
        for weight in (0.0, 1.0)
    }
    # (loc - mean)^2 / 2 + weight loc^2 is least at mean / (1 + 2 weight).
    for weight, fit in fits.items():
        assert float(fit.params["loc"]) == pytest.approx(float(X8.mean()) / (1 + 2 * weight), abs=0.02)
        assert fit.records["pull"][-1] == pytest.approx(weight * float(fit.params["loc"]) ** 2, abs=0.01)
        loc = fit.params["loc"].detach()
        assert fit.evidence().mean == pytest.approx(float(dist.Normal(loc, 1.0).log_prob(X8).mean()), abs=1e-12)
        assert fit.notes["terms"] == "added to the loss: pull"
    assert abs(0.5 - float(X8.mean()) / 3) > 0.1, "it does not start at the answer"


def test_an_algorithm_without_a_loss_says_that_it_leaves_them_out() -> None:
    def normal(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    program = pg.Program(normal, terms={"pull": lambda x: torch.zeros(len(x))})
    settings = NUTS(draws=4, warmup=4, chains=1)
    fit = pg.fit(program, X8, settings, seed=0, progress=False)
    assert fit.notes["terms"] == "left out: pull; NUTS works on the density alone"
    assert "terms" not in pg.fit(normal, X8, settings, seed=0, progress=False).notes


def test_every_objective_pays_them_and_so_do_pyros() -> None:
    program = pg.Program(local, local_exact_guide, terms={"three": lambda x: torch.full_like(x, 3.0)})
    for objective in (ELBO(), ELBO(beta=2.0), pg.inference.IWAE(2), pyro.infer.Trace_ELBO()):
        paid = pg.fit(program, X8, SVI(objective, steps=1, lr=1e-30), seed=0)
        free = pg.fit(pg.Program(local, local_exact_guide), X8, SVI(objective, steps=1, lr=1e-30), seed=0)
        gap = paid.records["program_loss"][0] - free.records["program_loss"][0]
        assert gap == pytest.approx(3.0, abs=1e-9)


def test_an_adversarial_critic_does_not_pay() -> None:
    def generator(x: Tensor) -> None:
        shift = pyro.param("shift", torch.zeros(()))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Delta(z + shift), obs=x)

    losses = {}
    for name, terms in (("paid", {"seven": lambda x: torch.full_like(x, 7.0)}), ("free", {})):
        fit = pg.fit(pg.Program(generator, terms=terms), X8.float(), SVI(Adversarial(), steps=3), seed=0)
        losses[name] = {key: fit.records[key] for key in ("critic_loss", "program_loss")}
    assert losses["paid"]["critic_loss"] == losses["free"]["critic_loss"]
    gaps = [a - b for a, b in zip(losses["paid"]["program_loss"], losses["free"]["program_loss"], strict=True)]
    assert gaps == pytest.approx([7.0] * 3, abs=1e-5)


def test_terms_see_the_entries_that_they_name() -> None:
    def model(x: Tensor, weight: Tensor) -> None:
        fixed(x)

    program = pg.Program(model, terms={"seen": lambda weight: 2.0 * weight})
    fit = pg.fit(program, {"x": X8, "weight": X8.abs()}, STILL)
    assert fit.records["seen"][0] == pytest.approx(2.0 * float(X8.abs().mean()), abs=1e-12)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"sum": lambda x: x.sum()}, r"terms: 'sum' has to give one number for each of 8 rows .*, got shape \(\)"),
        ({"wide": lambda x: x[:, None]}, r"'wide' .* got shape \(8, 1\)"),
        ({"few": lambda x: x[:3]}, r"'few' .* got shape \(3,\)"),
        ({"number": lambda x: 1.0}, "'number' .* got float"),
        ({"program_loss": lambda x: x}, "'program_loss' is what the history calls a part of the loss"),
        ({"kl": lambda x: x}, "'kl' is what the history calls a part of the loss"),
    ],
)
def test_terms_that_would_be_miscounted_are_refused(terms: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pg.fit(pg.Program(fixed, terms=terms), X8, SVI(steps=2))


def test_terms_are_functions_by_name() -> None:
    for wrong in ([cubes], cubes, {"cubes": 3.0}):
        with pytest.raises(TypeError, match="terms: expected"):
            pg.Program(fixed, terms=wrong)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------ tied weights
def test_a_weight_known_by_two_names_is_optimised_once() -> None:
    layer = network(nn.Linear(1, 1, bias=False))
    for parameter in layer.parameters():
        start = float(parameter.detach())

    def model(names: list[str]) -> Any:
        def tied(x: Tensor) -> None:
            for name in names:
                pyro.module(name, layer)
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(layer(torch.ones(len(x), 1, dtype=x.dtype)).squeeze(-1), 1.0), obs=x)

        return tied

    once = pg.fit(model(["one"]), X8, SVI(steps=30, lr=0.02, optimiser="sgd"), seed=0)
    twice = pg.fit(model(["one", "two"]), X8, SVI(steps=30, lr=0.02, optimiser="sgd"), seed=0)
    target = float(X8.mean()) + (start - float(X8.mean())) * 0.98**30  # the gradient of (w - mean)^2 / 2
    assert float(once.params["one$$$weight"]) == pytest.approx(target, abs=1e-9)
    for name in ("one", "two"):
        assert float(twice.params[f"{name}$$$weight"]) == pytest.approx(target, abs=1e-9)
    adam = [pg.fit(model(names), X8, SVI(steps=30, lr=0.02), seed=0) for names in (["one"], ["one", "two"])]
    assert float(adam[0].params["one$$$weight"]) == float(adam[1].params["two$$$weight"])
