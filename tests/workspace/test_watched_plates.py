"""Whole plates that an autoguide makes anew for every call are no change of the program; other plates are."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import nn

import ppl_gen as pg
from ppl_gen.inference import SVI
from ppl_gen.workspace.watch import Watch


def rows(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal])
def test_steps_of_an_autoguide_over_rows_are_captured(guide) -> None:
    x = torch.linspace(-1.0, 2.0, 6, dtype=torch.float64)
    fits = [pg.fit(pg.Program(rows, guide), x, SVI(steps=60, lr=0.02), seed=0, compile=c) for c in (False, "graph")]
    assert [fit.cost["path"] for fit in fits] == ["eager", "graph"], fits[1].cost
    # The same operations in the same order; fused ones may differ in the last digits of float64.
    for name, value in fits[0].params.items():
        assert torch.allclose(value, fits[1].params[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("other", [pyro.plate("rows", 5), pyro.plate("rows", 6, subsample_size=2), "no plate"])
def test_another_plate_is_a_change(other) -> None:
    module = nn.Module()
    module.plates = {"rows": pyro.plate("rows", 6)}
    watch = Watch([], [module])
    module.plates = {"rows": pyro.plate("rows", 6)}
    assert watch.changed() == []
    module.plates = {"rows": other}
    assert watch.changed() == ["Module.plates"]
