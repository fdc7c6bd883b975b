"""Rows inside a dict, restated parameters, gradients that are cut, marks of enumeration, indices with dims of their own."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoDelta
from pyro.ops.indexing import Vindex

import ppl_gen as pg
from ppl_gen.inference import EM, NUTS, SVI, Adversarial

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")

X = torch.randn(12, generator=torch.Generator().manual_seed(1)) + 1.0
NET = torch.nn.Linear(1, 1)


def packed(batch):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(batch["y"])):
        pyro.sample("y", dist.Normal(mu * batch["x"], 1.0), obs=batch["y"])


def test_rows_inside_a_dict() -> None:
    fit = pg.fit(packed, {"batch": {"x": X, "y": X}}, SVI(steps=5), seed=0)
    assert fit.sample(12)["y"].shape == (12,)
    with pytest.raises(ValueError, match=r"12 rows and the sample has 5: the rows .* come inside batch \(dict\)"):
        fit.sample(5)
    with pytest.raises(ValueError, match="batch is passed whole"):
        fit.sample(12, given={"batch": {}})
    few = {"batch": {"x": X[:5], "y": X[:5]}}
    assert fit.predict(few, draws=3)["y"].shape == (3, 5) and fit.evidence(few, draws=2).rows == 5
    copied = fit.dataset({"batch": {"x": X.clone(), "y": X.clone()}})
    assert fit.data.same_rows(copied) and not fit.data.same_rows(fit.dataset(few))


def plain(y):
    w = pyro.param("w", torch.tensor(0.5), constraint=dist.constraints.positive)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(w, 1.0), obs=y)


def restated(y):
    w = pyro.param("w", torch.tensor(0.5), constraint=dist.constraints.positive)
    pyro.sample("same", dist.Delta(w), obs=w)
    pyro.sample("anew", dist.Delta(torch.log(w)), obs=torch.log(w))
    pyro.sample("pair", dist.Delta(w * torch.ones(2)).to_event(1), obs=w * torch.ones(2))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(w, 1.0), obs=y)


def through_a_network(y):
    net = pyro.module("net", NET)
    w = net(torch.ones(1))[0]
    pyro.sample("anew", dist.Delta(w), obs=net(torch.ones(1))[0])
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(w, 1.0), obs=y)


def tied(y):
    a, b = (pyro.param(name, torch.tensor(0.5)) for name in "ab")
    pyro.sample("tie", dist.Delta(1 * a), obs=1 * b)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(a, 1.0), obs=y)


def test_a_parameter_restated_is_deterministic_and_two_that_are_equal_at_first_are_not() -> None:
    one, other = (pg.fit(model, X, SVI(steps=20), seed=0) for model in (plain, restated))
    assert one.params == other.params and one.evidence().mean == other.evidence().mean
    kinds = {name: site.kind for name, site in other.info.sites.items()}
    assert kinds == {"same": "deterministic", "anew": "deterministic", "pair": "deterministic", "y": "observed"}
    assert pg.fit(through_a_network, X, SVI(steps=2), seed=0).info.sites["anew"].kind == "deterministic"
    with pytest.raises(pg.IncompatibleError, match="density"):
        pg.fit(tied, X, SVI(steps=2))


def latent(y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(w, 1.0), obs=y)


def point(y):
    pyro.sample("w", dist.Delta(1 * pyro.param("v", torch.tensor(0.0))))


def test_a_guide_of_a_parameter_is_maximum_a_posteriori() -> None:
    for guide in (point, AutoDelta(latent)):
        fit = pg.fit(pg.Program(latent, guide), X, SVI(steps=1500, lr=0.02), seed=0)
        w = float(fit.posterior(draws=2)["w"][0])
        assert abs(w - float(X.sum()) / 13) < 1e-2 and "not moved" not in fit.notes


def cut(y):
    w, s = pyro.param("w", torch.ones(1)), pyro.param("s", torch.ones(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(w.detach(), s.exp()).to_event(1), obs=y)


def cut_whole(y):
    w = pyro.param("w", torch.ones(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(w.detach(), 1.0).to_event(1), obs=y)


def test_gradients_that_are_cut() -> None:
    assert "differentiable samples" not in pg.check(cut_whole, X[:, None]).offers
    for objective in ({"objective": Adversarial()}, {}):
        fit = pg.fit(cut, X[:, None], SVI(steps=3, **objective), seed=0)
        assert fit.notes["not moved"].startswith("w:") and float(fit.params["w"]) == 1.0
    assert "not moved" not in pg.fit(plain, X, SVI(steps=3), seed=0).notes


def mixture(x):
    with pyro.plate("components", 2):
        mu = pyro.sample("mu", dist.Normal(torch.tensor([-1.0, 1.0]), 3.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])))
        pyro.sample("x", dist.Normal(Vindex(mu)[..., z], 1.0), obs=x)


@pytest.mark.parametrize(
    "algorithm", [SVI(steps=5), EM(), NUTS(draws=10, warmup=10, chains=1, processes=1)], ids=["svi", "em", "nuts"]
)
def test_expanded_enumeration_changes_nothing(algorithm) -> None:
    one, other = (pg.fit(model, X, algorithm, seed=0) for model in (mixture, config_enumerate(mixture, expand=True)))
    for ask in (lambda f: f.evidence(X[:4], seed=0).values, lambda f: f.posterior(X[:4], draws=5, seed=0)["z"]):
        torch.testing.assert_close(ask(one), ask(other))


def test_an_index_with_a_dim_of_its_own_is_explained() -> None:
    table = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8]])

    def model(x, index=lambda m: m.unsqueeze(-1)):
        m = pyro.sample("m", dist.Categorical(torch.ones(2)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Categorical(Vindex(table)[index(m), :]), obs=x)

    rows = torch.arange(12) % 3
    said = pg.check(model, rows).unenumerable
    for part in ("'m' enumerated", "site 'x'", "(2, 1, 12)", "dim -3", "-1 (plate 'data')", "Vindex(p)[m, :]"):
        assert part in said
    assert not pg.check(lambda x: model(x, lambda m: m), rows).unenumerable
