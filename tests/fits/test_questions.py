"""No question changes the next: every question gets the same answer, whatever was asked before."""

import itertools
import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.contrib.easyguide import EasyGuide
from pyro.infer.autoguide import AutoNormal
from torch import nn

import ppl_gen as pg
from ppl_gen.inference import EM, NUTS, SVI
from ppl_gen.models import gaussian_mixture

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")  # chains and guides are short on purpose

X = torch.tensor([[1.2, 0.4], [0.3, -0.8], [-0.6, 1.1], [0.9, 0.2], [1.5, -1.0], [-0.2, 0.1]])


def plain(x):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(m, 1.0).expand([2]).to_event(1), obs=x)


def coded(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.expand(z.shape[:-1] + (2,)), 1.0).to_event(1), obs=x)


class EasyRows(EasyGuide):
    """Locals with parameters per row: on other rows the guide fails, its plate of three rows still in its cache."""

    def guide(self, x):
        loc, scale = pyro.param("loc", torch.zeros(6, 1)), pyro.param("scale", torch.tensor(0.5))
        with self.plate("data", len(x)):
            middle = (loc + 0.1 * x[:, :1]).mean()
            pyro.sample("z", dist.Normal(middle.reshape(1), scale.exp()).to_event(1))


class EasyCoded(EasyGuide):
    def guide(self, x):
        weight = pyro.param("weight", torch.tensor(0.3))
        with self.plate("data", len(x)):
            pyro.sample("z", dist.Normal(weight * x.sum(-1, keepdim=True), 0.6).to_event(1))


class Counting(nn.Module):
    """An encoder with running statistics, and with a memory of its own that shifts what it gives."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
        self.calls, self.seen = 0, []

    def forward(self, x):
        self.calls += 1
        self.seen.append(len(x))
        loc, scale = self.layers(x).chunk(2, -1)
        return loc + 1e-3 * (self.calls > 400), scale.exp()


def vae(x):
    encoder = Counting()

    def guide(x):
        pyro.module("encoder", encoder)
        loc, scale = encoder(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    return pg.Program(coded, guide)


def by_hand(x):
    pyro.sample("m", dist.Normal(pyro.param("m_loc", torch.tensor(0.0)), 0.3))


FITS = {
    "autoguide": (pg.Program(plain, AutoNormal), SVI(steps=30, lr=0.05)),
    "local autoguide": (pg.Program(coded, AutoNormal), SVI(steps=30, lr=0.05)),
    "easy": (pg.Program(coded, EasyCoded(coded)), SVI(steps=30, lr=0.05)),
    "easy rows": (pg.Program(coded, EasyRows(coded)), SVI(steps=30, lr=0.05)),
    "by hand": (pg.Program(plain, by_hand), SVI(steps=30, lr=0.05)),
    "vae": (pg.Recipe(vae, name="vae"), SVI(steps=10, lr=0.01)),
    "chains": (plain, NUTS(draws=30, warmup=20, chains=1)),
    "mixture": (gaussian_mixture(2), EM(steps=20)),
}


def numbers(value):
    """Any answer as one flat list of numbers."""
    if isinstance(value, dict):
        return [number for name in sorted(value) for number in numbers(value[name])]
    if isinstance(value, nn.Module):
        return numbers(value.state_dict())
    return np.asarray(value.detach() if isinstance(value, torch.Tensor) else value, dtype=np.float64).ravel().tolist()


def exported(fit):
    tree = fit.to_arviz(draws=12)
    return {name: np.asarray(values) for name, values in tree["sample_stats"].items()}


def questions(fit, folder):
    asked = {
        "posterior": lambda: fit.posterior(draws=4),
        "posterior of rows": lambda: fit.posterior(X[:2] + 0.1, draws=4),
        "predict": lambda: fit.predict(draws=3),
        "sample": lambda: fit.sample(4),
        "evidence": lambda: fit.evidence(X[:4], particles=6, draws=3).values,
        "marginal": lambda: fit.marginal_likelihood(draws=5, particles=4).mean,
        "export": lambda: exported(fit),
        "diagnose": lambda: fit.diagnose(draws=30)["mean"].to_numpy(),
        "params": lambda: fit.params,
        "module": lambda: fit.module("encoder"),
        "bad rows": lambda: fit.evidence(torch.zeros(2, 5)).mean,
        "save": lambda: numbers(pg.load(fit.save(folder / "fit")).diagnose()["mean"].to_numpy()),
    }

    def answer(name):
        try:
            return numbers(asked[name]())
        except (ValueError, KeyError) as error:  # refusals are answers, and stay what they were
            return f"{type(error).__name__}: {error}"

    return asked, answer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FITS)
def test_answers_do_not_depend_on_what_was_asked_before(kind, tmp_path):
    program, algorithm = FITS[kind]
    fit = pg.fit(program, X, algorithm)
    asked, answer = questions(fit, tmp_path)
    dear = {"save", "diagnose"}  # they come once: first, or last
    first = {name: answer(name) for name in sorted(asked)}
    orders = [
        random.Random(seed).sample([n for n in asked if n not in dear], len(asked) - len(dear)) for seed in (0, 1)
    ]
    for order in orders:
        for name in order:
            assert answer(name) == first[name], f"{name} in {order}"
    for name in dear:
        assert answer(name) == first[name]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FITS)
def test_no_question_changes_any_other(kind, tmp_path):
    program, algorithm = FITS[kind]
    alone = {}
    for name in questions(None, tmp_path)[0]:
        alone[name] = questions(pg.fit(program, X, algorithm), tmp_path)[1](name)
    fit = pg.fit(program, X, algorithm)
    _, answer = questions(fit, tmp_path)
    for one, other in itertools.permutations([n for n in alone if n != "save"], 2):
        answer(one)
        assert answer(other) == alone[other], f"{other} after {one}"


def test_a_guide_is_left_as_it_was_by_fits_and_questions():
    guide = EasyRows(coded)
    fit = pg.fit(pg.Program(coded, guide), X, SVI(steps=3))
    assert guide.prototype_trace is None and not guide.plates
    before = fit.posterior(draws=2)["z"]
    for _ in range(2):
        fit.evidence(X[:2], particles=3)
        assert torch.equal(fit.posterior(draws=2)["z"], before)
