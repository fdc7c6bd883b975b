"""Handlers of Pyro around a model, as decorators too: its arguments are known, and its networks stay the user's."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.reparam import LatentStableReparam, LocScaleReparam
from pyro.nn import PyroModule
from torch import nn

import ppl_gen as pg
from ppl_gen.inference import SVI

X = torch.linspace(-1.0, 1.0, 20)
ROWS = (X, 2 * X + 1)


def line(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(slope * x + 1, 0.5), obs=y)


class Line(PyroModule):
    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.tensor(0.0))

    def forward(self, x, y=None):
        slope = pyro.sample("slope", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(slope * x + self.offset, 0.5), obs=y)


AROUND = {
    "scale": poutine.scale(scale=1.0),
    "reparam": poutine.reparam(config={"slope": LocScaleReparam(0.0)}),
    "two": lambda model: poutine.mask(mask=True)(poutine.block(hide=[])(model)),
    "by a call": config_enumerate,
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("model", [line, Line])
def test_a_handler_around_a_model_hides_neither_its_arguments_nor_its_parameters(model, around, tmp_path):
    made = model() if isinstance(model, type) else model
    program = AROUND[around](made)
    plain = pg.fit(made, ROWS, SVI(steps=5), seed=0)
    fit = pg.fit(program, ROWS, SVI(steps=5), seed=0)
    assert fit.program.name == plain.program.name
    assert set(plain.params) - {n for n in plain.params if "slope" in n} <= set(fit.params)
    if around != "reparam":
        torch.testing.assert_close(fit.params, plain.params)
    if made is not line:
        assert float(made.offset.detach()) == 0.0 and float(fit.params["offset"]) != 0.0
    assert fit.predict((X[:3], None), draws=4)["y"].shape == (4, 3)
    again = pg.load(fit.save(tmp_path / "fit"), program)
    torch.testing.assert_close(again.params, fit.params)


def test_what_a_handler_does_still_happens():
    halved = pg.fit(poutine.scale(scale=0.5)(Line()), ROWS, SVI(steps=1), seed=0)
    whole = pg.fit(Line(), ROWS, SVI(steps=1), seed=0)
    assert float(halved.history["program_loss"][0]) != float(whole.history["program_loss"][0])


def test_a_handler_around_a_guide():
    def guide(x, y=None):
        mean = pyro.param("mean", torch.tensor(0.0))
        pyro.sample("slope", dist.Normal(mean, 0.1))

    bare = pg.fit(pg.Program(line, guide), ROWS, SVI(steps=5), seed=0)
    inside = pg.fit(pg.Program(line, poutine.scale(scale=1.0)(guide)), ROWS, SVI(steps=5), seed=0)
    torch.testing.assert_close(inside.params, bare.params)


def test_a_reparameterisation_that_takes_no_observations_is_named_with_those_that_do():
    def stable(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Stable(1.5, 0.0), obs=x)

    with pytest.raises(NotImplementedError, match="model of 'stable'.*'x'.*SymmetricStableReparam") as caught:
        pg.check(poutine.reparam(stable, {"x": LatentStableReparam()}), torch.zeros(3))
    assert "Trace Shapes" not in str(caught.value)
