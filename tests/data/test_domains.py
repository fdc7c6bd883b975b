"""Values that no observed site can have, in rows that a look at the first ones does not see."""

from __future__ import annotations

import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import ppl_gen as pg
import ppl_gen.data.dataset as dataset
from ppl_gen.capture.domains import domains_of
from ppl_gen.data.batching import as_dataset
from ppl_gen.errors import NonFiniteError
from ppl_gen.inference import SVI, Laplace, Walkback
from ppl_gen.models import gsn, vae

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")  # runs are short on purpose

N, BAD = 60, 47


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Small data are treated as large ones are: the first eight rows are looked at."""
    monkeypatch.setattr(dataset, "LARGE", 10)
    monkeypatch.setattr(dataset, "FEW", 8)


def observing(likelihood, *, mask=None):
    """A program whose rows (N x 2) follow ``likelihood`` at one latent number."""

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            with pyro.poutine.mask(mask=torch.ones(len(x)).bool() if mask is None else mask(x)):
                pyro.sample("x", likelihood(z), obs=x)

    return model


def poisson(z):
    return dist.Poisson(z.exp() * torch.ones(2)).to_event(1)


#: Likelihood, a value that it has, one that it has not.
KINDS = {
    "fraction of a count": (poisson, 2.0, 2.5),
    "negative count": (poisson, 2.0, -1.0),
    "grey coin": (lambda z: dist.Bernoulli(logits=z * torch.ones(2)).to_event(1), 1.0, 0.5),
    "label beyond": (lambda z: dist.Categorical(logits=z * torch.ones(2, 3)).to_event(1), 1.0, 3.0),
    "share above one": (lambda z: dist.Beta(z.exp() * torch.ones(2), 1.0).to_event(1), 0.4, 1.5),
    "negative length": (lambda z: dist.Gamma(z.exp() * torch.ones(2), 1.0).to_event(1), 0.4, -0.2),
    "beyond a fixed bound": (lambda z: dist.Uniform(-torch.ones(2), 3.0).to_event(1), 0.4, 3.5),
}


def rows(kind):
    _, fine, wrong = KINDS[kind]
    x = torch.full((N, 2), fine)
    x[BAD, 1] = wrong
    return x


def said(kind):
    return rf"{KINDS[kind][2]:g} lies outside of the support of 'x'"


def mapped(tmp_path, x):
    np.save(tmp_path / "x.npy", x.numpy())
    return np.load(tmp_path / "x.npy", mmap_mode="r")


@pytest.mark.parametrize("kind", KINDS)
def test_rows_in_memory_are_looked_at_before_anything_runs(kind):
    model, x = observing(KINDS[kind][0]), rows(kind)
    steps = []
    for algorithm in (SVI(steps=3), SVI(steps=3, batch_size=10), Laplace()):
        with pytest.raises(ValueError, match=rf"data: row {BAD} of the data: {said(kind)}"):
            pg.fit(model, x, algorithm, callbacks=[lambda *_: steps.append(1)])
    assert not steps
    good = torch.cat([x[:BAD], x[BAD + 1 :]])
    fit = pg.fit(model, good, SVI(steps=3, batch_size=10))
    assert fit.cost["steps"] == 3
    with pytest.raises(ValueError, match=rf"row {BAD} of the data: {said(kind)}"):
        fit.evidence(x)
    with pytest.raises(ValueError, match=rf"validation: row {BAD} of the data: {said(kind)}"):
        pg.fit(model, good, SVI(steps=3, batch_size=10), validation=x)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_come_late_end_the_fit_which_is_kept(kind, tmp_path):
    model, x = observing(KINDS[kind][0]), rows(kind)
    with pytest.raises(NonFiniteError, match=f"at step 5: row 7 of the batch: {said(kind)}") as found:
        pg.fit(model, pg.stream(list(x.split(10)), rows=N), SVI(steps=12))
    assert found.value.fit.cost["steps"] == 4
    with pytest.raises(NonFiniteError, match=f"at step [1-6]: row {BAD} of the data: {said(kind)}"):
        pg.fit(model, mapped(tmp_path, x), SVI(steps=12, batch_size=10), seed=1)


def test_batches_of_any_size_are_looked_at_whole():
    x = rows("grey coin")
    model = observing(KINDS["grey coin"][0])
    data = as_dataset(x, model)
    domains = domains_of(model, data, "data")
    assert domains is not None and domains.rows == 8
    for size in range(1, 20):
        for index in torch.arange(N).split(size):
            found = domains(data, data.batch(index))
            assert bool(found) is (BAD in index.tolist()) and (not found or found.startswith(f"row {BAD} "))
    copy = pickle.loads(pickle.dumps(domains))
    assert copy(data, data.batch(torch.tensor([3, BAD]))).startswith(f"row {BAD} ")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))

    def forward(self, x):
        return self.layers(x)


def test_values_are_those_that_the_site_observes():
    """Computed ones count as computed; a bound that a latent site or a parameter moves is none to look at."""
    net = Net()

    def model(x):
        pyro.module("net", net)
        most = pyro.param("most", torch.tensor(90.0), constraint=dist.constraints.positive)
        z = pyro.sample("z", dist.Gamma(9.0, 9.0))
        with pyro.plate("data", len(x)):
            pyro.sample("coins", dist.Bernoulli(logits=net(x)).to_event(1), obs=(x > 0.5).float())
            pyro.sample("below", dist.Uniform(0.0, 100.0 + z * torch.ones(2)).to_event(1), obs=x.abs())
            pyro.sample("learned", dist.Uniform(0.0, most * torch.ones(2)).to_event(1), obs=x.abs())
            pyro.sample("as it is", dist.Bernoulli(logits=net(x), validate_args=False).to_event(1), obs=x)

    x = torch.rand(N, 2)
    x[BAD, 1] = 70.0
    fit = pg.fit(model, x, SVI(steps=3, batch_size=10))
    assert fit.cost["steps"] == 3 and [s.name for s in fit.data.domains.sites] == ["coins"]


def test_a_program_that_reads_numbers_into_python_is_run_instead(tmp_path):
    """It cannot be recorded; late rows, for which a run is too long, are a note."""

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        shift = 1.0 if float(x.sum()) > 0 else 2.0
        with pyro.plate("data", len(x)):
            pyro.sample("x", poisson(z * shift), obs=x)
            pyro.sample("moved", dist.Uniform(0.0, 100.0 + z.exp() * torch.ones(2)).to_event(1), obs=x.abs())

    x = rows("fraction of a count")
    with pytest.raises(ValueError, match=rf"data: row {BAD} of the data: {said('fraction of a count')}"):
        pg.fit(model, x, SVI(steps=3, batch_size=10))
    fit = pg.fit(model, x.round(), SVI(steps=3, batch_size=10))
    assert "rows" not in fit.notes
    with pytest.raises(ValueError, match=rf"row {BAD} of the data: {said('fraction of a count')}"):
        fit.evidence(x)
    late = pg.fit(model, pg.stream(list(x.split(10)), rows=N), SVI(steps=3))
    assert "values of x in rows after the first are not held against its support" in late.notes["rows"]


def test_masked_values_are_none():
    x = rows("grey coin")
    model = observing(KINDS["grey coin"][0], mask=lambda x: ((x == 0) | (x == 1)).all(-1))
    assert pg.fit(model, x, SVI(steps=3, batch_size=10)).cost["steps"] == 3


def test_networks_of_the_zoo_take_no_grey_rows_late():
    x = torch.zeros(N, 2)
    x[::2] = 1.0
    bad = x.clone()
    bad[BAD] = 0.3
    made = vae(latent=1, hidden=(2,), likelihood="bernoulli")
    with pytest.raises(NonFiniteError, match="row 7 of the batch: 0.3 lies outside of the support of 'x', a Bernoulli"):
        pg.fit(made, pg.stream(list(bad.split(10)), rows=N), SVI(steps=12))
    with pytest.raises(ValueError, match="the chain of a gsn makes zeros and ones"):
        pg.fit(gsn(hidden=(2,)), bad, SVI(Walkback(), steps=3))
    walker = gsn(hidden=(2,), likelihood="bernoulli")
    with pytest.raises(NonFiniteError, match="row 7 of the batch: 0.3 lies outside of the support of 'x', a ChainRows"):
        pg.fit(walker, pg.stream(list(bad.split(10)), rows=N), SVI(Walkback(), steps=12))
    fit = pg.fit(walker, x, SVI(Walkback(), steps=3))
    with pytest.raises(ValueError, match=r"observed values lie outside: make them zeros and ones"):
        fit.predict(bad[BAD:])
