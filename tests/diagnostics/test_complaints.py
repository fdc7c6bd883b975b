"""One warning for a bad fit, none for a good one or inside a comparison; and the verdict where a fit is shown."""

from __future__ import annotations

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

import ppl_gen as pg
from ppl_gen.inference import NUTS, SVI

X = torch.linspace(3.0, 5.0, 8, dtype=torch.float64)


def two_modes(x):
    t = pyro.sample("t", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(t**2, 1.0), obs=x)


def normal_mean(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


BAD = NUTS(draws=60, warmup=60, chains=4, processes=1)


def test_a_bad_fit_warns_once_and_says_all_of_it() -> None:
    with pytest.warns(pg.FitWarning) as caught:
        pg.fit(two_modes, X, BAD, seed=0)
    assert len(caught) == 1
    text = str(caught[0].message)
    assert text.startswith("NUTS on 'two_modes': do not trust: the chains disagree on t (r_hat 1.")
    assert issubclass(pg.FitWarning, UserWarning)


def test_a_good_fit_does_not_warn() -> None:
    """800 draws of 2 chains on a Normal posterior: an effective sample size near 400 a chain, and R-hat near 1.002."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", pg.FitWarning)
        pg.fit(normal_mean, X, NUTS(draws=800, warmup=200, chains=2, processes=1), seed=0)
        pg.fit(normal_mean, X, SVI(steps=3), seed=0)
        pg.compare(two_modes, X, {"NUTS": BAD})  # whose rows have verdicts


def test_starts_and_columns_are_named() -> None:
    def regression(z, y):
        slope = pyro.sample("slope", dist.Normal(torch.zeros(2), 10.0).to_event(1))
        with pyro.plate("data", len(z)):
            pyro.sample("y", dist.Normal(z @ slope, 1.0), obs=y)

    program = pg.Program(regression, start=lambda: {"slope": torch.zeros(2)})
    data = {"z": torch.stack([1e4 * X, X], 1), "y": X}
    with pytest.warns(pg.FitWarning, match="Note on starts: all 2 chains(.|\n)*Note on unscaled columns: z") as caught:
        pg.fit(program, data, NUTS(draws=20, warmup=5, chains=2, jitter=0.1, max_tree_depth=3, processes=1), seed=0)
    assert len(caught) == 1


def slopes(z, y):
    slope = pyro.sample("slope", dist.Normal(torch.zeros(z.shape[1], dtype=z.dtype), 10.0).to_event(1))
    with pyro.plate("data", len(z)):
        pyro.sample("y", dist.Normal(z @ slope, 1.0), obs=y)


def table(frame):
    """Of a pandas.DataFrame, a model reads the columns."""
    slope = pyro.sample("slope", dist.Normal(torch.zeros(frame.shape[1]), 10.0).to_event(1))
    with pyro.plate("data", len(frame)):
        pyro.sample("y", dist.Normal(frame[:, :-1] @ slope[:-1], 1.0), obs=frame[:, -1])


SHORT = SVI(steps=2)


def said_of(program, data, algorithm=SHORT) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pg.fit(program, data, algorithm, seed=0)
    return [str(one.message) for one in caught if issubclass(one.category, pg.FitWarning)]


COLUMNS = torch.stack([1e4 * X, X, torch.full_like(X, 3.0)], 1)


@pytest.mark.parametrize("kind", ["dict", "dict of arrays", "tensor", "array", "frame"])
def test_columns_are_named_in_one_warning_whatever_holds_them(kind: str) -> None:
    import pandas

    if kind.startswith("dict"):
        data = {"z": COLUMNS, "y": X}
        found = said_of(slopes, {k: v.numpy() for k, v in data.items()} if "arrays" in kind else data)
        constant, unscaled = "z[:, 2] (all 3)", "z[:, 0] (mean 4e+04"
    else:
        made = {"tensor": COLUMNS, "array": COLUMNS.numpy(), "frame": pandas.DataFrame(COLUMNS.numpy())}
        found = said_of(table, made[kind])
        constant, unscaled = "frame[:, 2] (all 3)", "frame[:, 0] (mean 4e+04"
    assert len(found) == 1, found
    assert constant in found[0] and "leave them out" in found[0]
    assert unscaled in found[0] and "standardise: subtract the mean, divide by the sd" in found[0]


def test_columns_that_are_as_they_should_be_give_no_warning() -> None:
    zero_one = (torch.arange(8) % 2).double()
    valid = torch.stack([torch.ones(8).double(), zero_one, X], 1)
    assert not said_of(slopes, {"z": valid, "y": X}), "an intercept and an indicator"
    images = torch.zeros(8, 6, 6)
    images[:, 2:4, 2:4] = torch.rand(8, 2, 2, generator=torch.Generator().manual_seed(0))

    def pixels(x):
        grey = pyro.sample("grey", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(grey, 1.0).expand(x.shape[1:]).to_event(x.dim() - 1), obs=x)

    assert not said_of(pixels, images) and not said_of(pixels, images.flatten(1)), "the border of images is black"
    good = NUTS(draws=800, warmup=200, chains=2, processes=1)
    assert not said_of(normal_mean, 2e3 + X, good), "chains that manage are not told to rescale"


def test_a_guide_warns_when_it_is_first_looked_at_and_only_then() -> None:
    def narrow(x):
        pyro.sample("loc", dist.Normal(pyro.param("mean", x.mean()), 0.03))

    def right(x):
        pyro.sample("loc", dist.Normal(pyro.param("mean", x.sum() / (len(x) + 0.01)), (len(x) + 0.01) ** -0.5))

    assert not said_of(pg.Program(normal_mean, narrow), X, SVI(steps=1, lr=1e-9)), "weights cost more than such a fit"
    for ask in (lambda fit: fit.verdict, lambda fit: fit.diagnose()):
        fit = pg.fit(pg.Program(normal_mean, narrow), X, SVI(steps=1, lr=1e-9), seed=0)
        with pytest.warns(pg.FitWarning, match=r"^SVI\(ELBO.*\) on 'normal_mean': do not trust: (.|\n)*loc") as caught:
            ask(fit)
        assert len(caught) == 1 and not caught[0].filename.endswith("result.py"), "it points at who asked"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ask(fit)
            fit.diagnose()
            assert fit.verdict.grade == "do not trust"
    with warnings.catch_warnings():
        warnings.simplefilter("error", pg.FitWarning)
        assert pg.fit(pg.Program(normal_mean, right), X, SVI(steps=1, lr=1e-9), seed=0).verdict.trusted
        pg.compare(pg.Program(normal_mean, narrow), X, {"narrow": SVI(steps=1, lr=1e-9)}).table()


def test_a_fit_shows_its_verdict_once_it_is_known() -> None:
    fit = pg.fit(normal_mean, X, SVI(steps=400, lr=0.05), seed=0)
    assert "not diagnosed yet" in repr(fit) and "not diagnosed yet" in fit._repr_html_()
    found = fit.verdict
    assert f"verdict: {found.grade}: " in repr(fit) and found.grade in fit._repr_html_()
