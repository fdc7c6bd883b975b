"""Programs written for enumeration alone run, or are told what they are, and not that their plates are wrong."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import config_enumerate

import ppl_gen as pg
from ppl_gen.inference import SVI

X = torch.cat([torch.randn(20, generator=torch.Generator().manual_seed(0)) + at for at in (-3.0, 3.0)])
LOCS = torch.tensor([-3.0, 3.0])


def program(loc_of):
    @config_enumerate
    def model(x):
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(loc_of(z), 1.0), obs=x)

    return model


def asserting(z):
    assert z.shape == (2, 1)
    return LOCS[z]


def unpacking(z):
    _values, _rows = z.shape
    return LOCS[z]


def squeezing(z):
    return LOCS[z.squeeze(-1)].unsqueeze(-1)


@pytest.mark.parametrize("loc_of", [asserting, unpacking, squeezing])
def test_a_program_that_runs_only_enumerated_runs(loc_of):
    site = pg.check(program(loc_of), X).sites["z"]
    assert site.finite and site.batch_shape == (40,)
    assert "z" in pg.fit(program(loc_of), X, SVI(steps=2)).notes["enumerated"]


def test_a_program_that_runs_only_on_deeper_dims_says_so():
    """It asks for more plates than it has, as with TraceEnum_ELBO(max_plate_nesting=2), and no other run gives that."""

    def deeper(z):
        assert z.shape == (2, 1, 1)
        return LOCS[z]

    for call in (lambda: pg.check(program(deeper), X), lambda: pg.fit(program(deeper), X, SVI(steps=2))):
        with pytest.raises(pg.IncompatibleError, match="runs with 'z' enumerated, and not with them drawn"):
            call()


def test_a_mistake_of_plates_beside_a_finite_site_is_one_still():
    with pytest.raises(ValueError, match="invalid log_prob shape") as caught:
        pg.check(program(lambda z: LOCS[z].unsqueeze(-1)), X)
    assert not isinstance(caught.value, pg.IncompatibleError)


def test_a_program_that_runs_either_way_runs():
    assert pg.check(program(lambda z: LOCS[z]), X).sites["z"].finite
