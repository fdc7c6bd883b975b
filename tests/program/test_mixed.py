"""Float64 algorithms and float64 data against priors, networks and constants made outside in float32."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroSample

import ppl_gen as pg
from ppl_gen.inference import EM, NUTS, SVI

GENERATOR = torch.Generator().manual_seed(4)
X = torch.randn(30, 2, generator=GENERATOR)
Y = X @ torch.tensor([1.0, -1.0]) + 0.3 * torch.randn(30, generator=GENERATOR)
DATA = {"x": X, "y": Y}
CHAIN = NUTS(draws=300, warmup=150, chains=1, processes=1)
TURN = torch.tensor([[1.0, 0.5], [0.0, 1.0]])


class Regression(PyroModule):
    """The prior's tensors are made here, before any fit has settled its dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.line = PyroModule[torch.nn.Linear](2, 1, bias=False)
        self.line.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))

    def forward(self, x, y=None):
        mean = self.line(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.3), obs=y)


NORMAL = dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)
MULTIVARIATE = dist.MultivariateNormal(torch.zeros(2), torch.eye(2))


def outside(prior):
    def model(x, y):
        w = pyro.sample("w", prior)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.3), obs=y)

    return model


def turned(x, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ (TURN @ w), 0.3), obs=y)


def exact(turn):
    """Conjugate regression: precision 1 + (XT)'(XT) / 0.09."""
    x = (X @ turn).double()
    covariance = torch.linalg.inv(torch.eye(2) + x.T @ x / 0.09)
    return covariance @ x.T @ Y.double() / 0.09, covariance.diagonal().sqrt()


PROGRAMS = {
    "module": (Regression(), "line.weight", torch.eye(2), torch.float64),
    "normal": (outside(NORMAL), "w", torch.eye(2), torch.float64),
    "constant": (turned, "w", TURN, torch.float32),
}


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")
def test_chains_take_priors_in_double_precision_and_follow_constants(name: str) -> None:
    program, site, turn, dtype = PROGRAMS[name]
    fit = pg.fit(program, DATA, CHAIN, seed=0)
    draws = fit.posterior()[site].flatten(1)
    mean, sd = exact(turn)
    assert draws.dtype is dtype and ("dtype" in fit.notes) == (dtype is torch.float32)
    assert ((draws.double().mean(0) - mean).abs() < 0.5 * sd).all()  # 4.6 se at an effective size of 85
    assert fit.evidence({"x": X[:4], "y": Y[:4]}, particles=4).rows == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")
def test_a_dtype_that_is_asked_for_stays(dtype) -> None:
    quick = NUTS(draws=5, warmup=5, chains=1, processes=1)
    assert pg.fit(outside(NORMAL), DATA, quick, dtype=dtype).posterior(draws=2)["w"].dtype is dtype
    if dtype is torch.float32:
        assert "dtype" not in pg.fit(turned, DATA, quick, dtype=dtype).notes
        return
    with pytest.raises(TypeError, match=r"made outside of the model: TURN \(torch.float32\).*dtype=torch.float32"):
        pg.fit(turned, DATA, quick, dtype=dtype)


def mixture(y):
    shares = pyro.sample("shares", dist.Dirichlet(torch.ones(2)))
    locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(shares))
        pyro.sample("y", dist.Normal((TURN @ locs)[z], 0.3), obs=y)


def test_em_follows_constants_too() -> None:
    fit = pg.fit(mixture, Y, EM(steps=5), seed=0)
    assert fit.point["locs"].dtype is torch.float32 and "dtype" in fit.notes


@pytest.mark.parametrize("prior", [NORMAL, MULTIVARIATE], ids=["normal", "multivariate"])
def test_double_data_and_an_autoguide(prior) -> None:
    """The autoguide's own run of the model reads the prior as all others do."""
    data = {"x": X.double(), "y": Y.double()}
    fit = pg.fit(outside(prior), data, SVI(steps=700, lr=0.02), seed=0)
    mean, sd = exact(torch.eye(2))
    draws = fit.posterior(draws=400)["w"]
    assert draws.dtype is torch.float64 and ((draws.mean(0) - mean).abs() < 0.8 * sd).all()
    with pytest.raises(TypeError, match="TURN"):  # what the data hold is no default, and is not thrown away
        pg.fit(turned, data, SVI(steps=2))


START = torch.zeros(2)


def test_a_guide_whose_parameters_start_at_a_tensor_of_single_precision() -> None:
    def guide(x, y):
        loc = pyro.param("loc", START)
        pyro.sample("w", dist.MultivariateNormal(loc, 0.01 * torch.eye(2)))

    program = pg.Program(outside(NORMAL), guide)
    fit = pg.fit(program, {"x": X.double(), "y": Y.double()}, SVI(steps=5), seed=0)
    assert fit.params["loc"].dtype is torch.float64 and START.dtype is torch.float32
