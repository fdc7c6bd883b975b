"""Losses as `pyro.infer.SVI` takes them: functions of model and guide, and every class of Pyro's that has gradients."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import (
    EnergyDistance,
    JitTrace_ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTMC_ELBO,
    config_enumerate,
)

import ppl_gen as pg
from ppl_gen.inference import SVI

X = torch.randn(40, generator=torch.Generator().manual_seed(2)) + 1.0
#: The exact posterior of the mean: precision 40 + 1 / 25.
SD = (40 + 1 / 25) ** -0.5
EXACT = float(X.sum()) * SD**2


def model(x, weight=1.0):
    loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def guide(x, weight=1.0):
    loc = pyro.param("m", torch.tensor(0.0))
    scale = pyro.param("s", torch.tensor(0.3), constraint=dist.constraints.positive)
    pyro.sample("loc", dist.Normal(loc, scale))


def by_hand(model, guide, *args, **kwargs):
    """The ELBO of one draw, as the tutorial on custom objectives writes it."""
    q = pyro.poutine.trace(guide).get_trace(*args, **kwargs)
    p = pyro.poutine.trace(pyro.poutine.replay(model, trace=q)).get_trace(*args, **kwargs)
    return -(p.log_prob_sum() - q.log_prob_sum())


class Weighted:
    """A callable object."""

    def __call__(self, model, guide, *args, **kwargs):
        return by_hand(model, guide, *args, **kwargs)


LOSSES = {
    "function": by_hand,
    "object": Weighted(),
    "differentiable_loss": Trace_ELBO().differentiable_loss,
    "TraceGraph_ELBO": TraceGraph_ELBO(),
    "TraceMeanField_ELBO": TraceMeanField_ELBO(),
    "RenyiELBO": RenyiELBO(alpha=0.5, num_particles=2),
    "JitTrace_ELBO": JitTrace_ELBO(),
    "ReweightedWakeSleep": ReweightedWakeSleep(num_particles=4),
    "EnergyDistance": EnergyDistance(num_particles=4),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_finds_the_mean(name: str) -> None:
    """From more than 4 posterior sd away; EnergyDistance has a prior's weight of its own and less precise gradients."""
    fit = pg.fit(pg.Program(model, guide), X, SVI(LOSSES[name], steps=700, lr=0.02), seed=0)
    assert abs(float(fit.params["m"]) - EXACT) < (2.0 if name == "EnergyDistance" else 1.0) * SD
    assert EXACT > 4 * SD


@pytest.mark.parametrize("loss", [by_hand, EnergyDistance(num_particles=3)], ids=["function", "EnergyDistance"])
def test_minibatches_of_a_function_are_scaled(loss) -> None:
    fit = pg.fit(pg.Program(model, guide), X, SVI(loss, steps=1200, lr=0.01, batch_size=10), seed=0)
    assert abs(float(fit.params["m"]) - EXACT) < 2.0 * SD  # a batch's mean alone has 2 posterior sd
    if loss is by_hand:  # unscaled, the guide would be twice as wide
        assert 0.7 < float(fit.params["s"]) / SD < 1.4


def test_the_loss_is_the_one_pyro_gives() -> None:
    """Equal seeds: the numbers of every step are those of Pyro's class, and a total is divided by the rows."""

    def squares(model, guide, x):
        guide(x)
        return (x - pyro.param("m")).square().sum()

    ours, theirs, total = (
        pg.fit(pg.Program(model, guide), X, SVI(loss, steps=5, lr=0.02), seed=3).records["program_loss"]
        for loss in (by_hand, Trace_ELBO(), squares)
    )
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert total[0] == pytest.approx(float(X.square().mean()), rel=1e-6)


def mixture(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
        pyro.sample("x", dist.Normal(loc + torch.tensor([-2.0, 2.0])[z], 1.0), obs=x)


@pytest.mark.parametrize("elbo", [TraceTMC_ELBO(), TraceEnum_ELBO(max_plate_nesting=1)], ids=["tmc", "enum"])
def test_enumerated_and_tensor_monte_carlo(elbo) -> None:
    shifted = torch.cat([X - 2, X + 2])
    fit = pg.fit(pg.Program(config_enumerate(mixture), guide), shifted, SVI(elbo, steps=700, lr=0.02), seed=0)
    assert abs(float(fit.params["m"]) - float(X.mean())) < 0.35  # the posterior sd is 0.11; Adam's noise beside it


def test_tensor_monte_carlo_on_minibatches_is_said_to_be_no_bound() -> None:
    """Its sums are over densities to the power N / B, so that its loss is another than on all rows; exact sums agree."""
    for elbo, same in ((TraceTMC_ELBO(max_plate_nesting=1), False), (TraceEnum_ELBO(max_plate_nesting=1), True)):
        whole, parts = (
            pg.fit(pg.Program(mixture, guide), X, SVI(elbo, steps=60, lr=1e-6, batch_size=size), seed=0)
            for size in (None, 10)
        )
        one, two = (sum(fit.records["program_loss"]) / 60 for fit in (whole, parts))
        assert (abs(one - two) < 0.25) is same
        assert ("N / B inside its logsumexp" in parts.notes.get("bound", "")) is not same and "bound" not in whole.notes


def no_gradient(model, guide, *args):
    return torch.tensor(1.0)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (no_gradient, r"no_gradient\(model, guide, \*data\) has to return one number as a tensor with gradients"),
        (Trace_ELBO().loss, r"loss\(model, guide, \*data\) has to return one number .* got float"),
        (lambda: 1.0, r"is called as .*\(model, guide, \*data\), and cannot be"),
    ],
)
def test_what_is_no_loss_is_refused(loss, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        pg.fit(pg.Program(model, guide), X, SVI(loss, steps=2))
    with pytest.raises(TypeError, match="expected an objective such as ELBO"):
        SVI("elbo")


# ------------------------------------------------------------------------------------ arguments that change by step
def test_an_annealing_factor_changes_by_step_and_ends_where_it_is_told(tmp_path) -> None:
    seen: list[float] = []
    note = seen.append  # of the list itself a question would put back what was in it

    def annealed(x, factor=1.0):
        note(float(factor))
        loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(x)), pyro.poutine.scale(scale=factor):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    factor = pg.by_step(lambda step: (step + 1) / 4, final=1.0)
    fit = pg.fit(annealed, (X, factor), SVI(steps=4), seed=0)
    assert list(dict.fromkeys(v for v in seen if v < 1.0)) == [0.25, 0.5, 0.75]  # set-up runs at the first step's value
    seen.clear()
    fit.evidence(particles=2)
    assert set(seen) == {1.0}
    assert pg.load(fit.save(tmp_path / "fit"), program=annealed).data.constants["factor"] == 1.0
    for batch_size in (None, 10):
        seen.clear()
        pg.fit(annealed, {"x": X, "factor": factor}, SVI(steps=4, batch_size=batch_size), seed=0)
        assert list(dict.fromkeys(v for v in seen if v < 1.0)) == [
            0.25,
            0.5,
            0.75,
        ]  # set-up runs at the first step's value


def test_a_function_of_the_step_must_give_a_number() -> None:
    with pytest.raises(TypeError, match="expected a number or a tensor for step 0, got NoneType"):
        pg.fit(model, (X, pg.by_step(lambda step: None, final=1.0)), SVI(steps=2))
    with pytest.raises(TypeError, match="function: expected a function of the step"):
        pg.by_step(0.5, final=1.0)
