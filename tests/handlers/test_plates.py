"""Plates whose size is their own: row counts written out are refused, subsampled plates are whole for every question."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.poutine.subsample_messenger import SubsampleMessenger
from torch import Tensor

import ppl_gen as pg
from ppl_gen.handlers.whole_plates import whole_plates
from ppl_gen.inference import EM, IWAE, NUTS, SVI

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")  # chains and guides are short on purpose

X = torch.linspace(-1.0, 2.0, 12)
N = len(X)
TABLE = torch.arange(12)
CHAIN = NUTS(draws=20, warmup=20, chains=1, processes=1)


# ------------------------------------------------------------------------------------------------ written out
def number(x: Tensor) -> None:
    m = pyro.sample("m", dist.Normal(0.0, 3.0))
    with pyro.plate("data", 12):
        pyro.sample("x", dist.Normal(m, 1.0), obs=x)


def closure(x: Tensor, y: Tensor | None = None) -> None:
    m = pyro.sample("m", dist.Normal(0.0, 3.0))
    with pyro.plate("data", N):
        pyro.sample("y", dist.Normal(m, 1.0), obs=y)


def table(x: Tensor) -> None:
    m = pyro.sample("m", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(TABLE)):
        z = pyro.sample("z", dist.Normal(m, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def numbered(x: Tensor) -> None:
    m = pyro.sample("m", dist.Normal(0.0, 3.0))
    with pyro.plate("data", 12, subsample_size=4) as rows:
        pyro.sample("x", dist.Normal(m, 1.0), obs=x[rows])


WRITTEN: list[tuple[Callable[..., None], Any, Any]] = [
    (number, X, X[:3]),
    (closure, {"x": X, "y": X}, {"x": X[:3]}),
    (table, X, X[:3]),
    (numbered, X, X[:3]),
]


@pytest.mark.parametrize(("model", "data", "new"), WRITTEN, ids=[model.__name__ for model, _, _ in WRITTEN])
@pytest.mark.parametrize("algorithm", [SVI(steps=2), CHAIN], ids=["SVI", "NUTS"])
def test_a_row_count_written_out_takes_no_other(
    algorithm: Any, model: Callable[..., None], data: Any, new: Any
) -> None:
    fit = pg.fit(model, data, algorithm)
    for question in (lambda: fit.predict(new, draws=2), lambda: fit.posterior(new, draws=2), lambda: fit.evidence(new)):
        with pytest.raises(ValueError, match=r"pyro.plate\('data'\) has 12 rows, written out[\s\S]*write .*len\(x\)\)"):
            question()
    for n in (3, 20):
        with pytest.raises(ValueError, match=rf"pyro.plate\('data'\) has 12 rows, .*the sample has {n}; write"):
            fit.sample(n)
    assert len(fit.sample(12)[next(iter(fit.info.select(kind="observed"))).name]) == 12
    assert fit.evidence(draws=3, chunk=5).rows == 12, "rows that cannot be taken apart are taken together"
    assert torch.equal(fit.evidence(draws=3, chunk=5).values, fit.evidence(draws=3).values)


@pytest.mark.parametrize("model", [number, numbered])
def test_minibatches_of_a_row_count_written_out_are_refused(model: Callable[..., None]) -> None:
    with pytest.raises(ValueError, match=r"size is written out|has size 12, but the data has 5 rows"):
        pg.fit(model, X, SVI(steps=2, batch_size=5))


# ------------------------------------------------------------------------------------------------ subsampled
def rows_alone(x: Tensor, few: int | None = 4) -> None:
    m = pyro.sample("m", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(x), subsample_size=few) as i:
        pyro.sample("x", dist.Normal(m, 1.0), obs=x[i])


def locals_too(x: Tensor, few: int | None = 4) -> None:
    m = pyro.sample("m", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(x), subsample_size=few) as i:
        z = pyro.sample("z", dist.Normal(m, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])


def finite(x: Tensor, few: int | None = 4) -> None:
    m = pyro.sample("m", dist.Normal(torch.tensor([-1.0, 1.0]), 3.0).to_event(1))
    with pyro.plate("data", len(x), subsample_size=few) as i:
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])))
        pyro.sample("x", dist.Normal(m[k], 1.0), obs=x[i])


def grouped(x: Tensor, few: int | None = 2) -> None:
    with pyro.plate("groups", 3, subsample_size=few):
        pyro.sample("g", dist.Normal(0.0, 1.0))
    m = pyro.sample("m", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(m, 1.0), obs=x)


def nested(x: Tensor, few: int | None = 4) -> None:
    m = pyro.sample("m", dist.Normal(0.0, 3.0))
    with (
        pyro.plate("columns", 2, subsample_size=1 if few else None, dim=-2) as j,
        pyro.plate("data", len(x), subsample_size=few, dim=-1) as i,
    ):
        pyro.sample("x", dist.Normal(m, 1.0), obs=torch.stack([x, x + 1])[j][:, i])


def whole(model: Callable[..., None]) -> Callable[[Tensor], None]:
    def plain(x: Tensor) -> None:
        model(x, None)

    plain.__name__ = model.__name__
    return plain


SUBSAMPLED = [rows_alone, locals_too, finite, grouped, nested]
PAIRS = [(model, SVI(steps=3)) for model in SUBSAMPLED]
PAIRS += [(locals_too, SVI(IWAE(3), steps=2)), (locals_too, CHAIN), (finite, EM(restarts=1)), (grouped, CHAIN)]


@pytest.mark.parametrize(("model", "algorithm"), PAIRS, ids=[f"{m.__name__}-{a.label}" for m, a in PAIRS])
def test_every_question_covers_all_rows_of_a_subsampled_plate(model: Callable[..., None], algorithm: Any) -> None:
    """The answers are bit for bit those of the program without subsampling at the same parameters."""
    fit, plain = pg.fit(model, X, algorithm), pg.fit(whole(model), X, algorithm)
    if isinstance(algorithm, SVI):  # training may subsample; what was learned may differ, what is made of it may not
        plain = dataclasses.replace(plain, state=fit.state)
    evidence = fit.evidence(draws=5, particles=5)
    assert torch.equal(evidence.values, plain.evidence(draws=5, particles=5).values) and evidence.rows == 12
    for one, other in (
        (fit.posterior(draws=3), plain.posterior(draws=3)),
        (fit.predict(draws=3), plain.predict(draws=3)),
        (fit.sample(5), plain.sample(5)),
    ):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    if isinstance(algorithm, SVI):
        marginal = fit.marginal_likelihood(draws=20, particles=5)
        assert marginal.mean == plain.marginal_likelihood(draws=20, particles=5).mean
    assert fit.to_arviz(draws=3).observed_data["x"].shape == plain.to_arviz(draws=3).observed_data["x"].shape
    assert fit.diagnose(draws=100).equals(plain.diagnose(draws=100))


def test_the_chains_of_a_subsampled_program_know_all_rows() -> None:
    draws = pg.fit(rows_alone, X, NUTS(draws=300, warmup=150, chains=1, processes=1), seed=0).posterior(draws=300)["m"]
    precision = 1 / 9 + 12
    # 75 effective draws of 300 or more: 4.5 / sqrt(75) = 0.52 sd. The mean of four rows would miss by 1.7 sd and more.
    assert abs(float(draws.mean()) - float(X.sum()) / precision) < 0.52 * precision**-0.5


def test_training_still_subsamples() -> None:
    seen: set[int] = set()
    note = seen.add  # of the set itself a question would put back what was in it

    def model(x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(x), subsample_size=4) as i:
            note(len(i))
            pyro.sample("x", dist.Normal(m, 1.0), obs=x[i])

    fit = pg.fit(model, X, SVI(steps=3))
    assert seen == {4}
    seen.clear()
    fit.evidence(draws=2)
    assert seen == {12}


def test_prior_predictive_covers_all_rows() -> None:
    assert pg.prior_predictive(rows_alone, X, draws=2)["x"].shape == (2, 12)


def test_rows_that_a_plate_is_handed_are_not_all_rows() -> None:
    def model(x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 3.0))
        i = torch.arange(4)
        with pyro.plate("data", len(x), subsample=i):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x[i])

    fit = pg.fit(model, X, SVI(steps=2))
    for question in (fit.evidence, fit.predict, lambda: fit.sample(3), fit.to_arviz, fit.marginal_likelihood):
        with pytest.raises(
            pg.IncompatibleError, match=r"subsample=...\) is handed 4 of its \d+ rows[\s\S]*leave subsam"
        ) as e:
            question()
        assert "Trace Shapes" not in str(e.value)


def test_pyros_plates_are_put_back() -> None:
    kept = SubsampleMessenger.__dict__["_subsample"]
    with pytest.raises(ZeroDivisionError), whole_plates():
        assert pyro.plate("p", 5, subsample_size=2).subsample_size == 5
        raise ZeroDivisionError
    assert SubsampleMessenger.__dict__["_subsample"] is kept
    assert pyro.plate("p", 5, subsample_size=2).subsample_size == 2, "a canary: Pyro settles the size of a plate there"
