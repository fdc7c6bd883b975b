"""Bounds that depend on latent sites: right programs whose data are impossible at most draws of the prior."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

import ppl_gen as pg
from ppl_gen.data.batching import as_dataset
from ppl_gen.errors import NonFiniteError
from ppl_gen.inference import NUTS, SVI
from ppl_gen.inference.impossible import impossible

X = 2.2 * torch.rand(20, generator=torch.Generator().manual_seed(0))
CHAINS = NUTS(draws=500, warmup=300, chains=2, processes=1)


def width(x):
    a = pyro.sample("a", dist.Uniform(0.0, 3.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Uniform(0.0, a), obs=x)


def count(x):
    n = pyro.sample("n", dist.Categorical(torch.ones(40) / 40))
    p = pyro.sample("p", dist.Beta(1.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Binomial(n.float(), p), obs=x)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")
def test_a_right_program_is_looked_at_where_its_data_are_possible(seed: int) -> None:
    assert "x     observed" in str(pg.check(width, X))
    fit = pg.fit(width, X, NUTS(draws=3, warmup=3, chains=1, processes=1), seed=seed)
    assert float(fit.info.inside.get("a", X.max())) >= float(X.max())
    assert pg.check(count, torch.tensor([18.0, 16.0, 22.0, 25.0])).finite_latents == ["n"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")
def test_chains_draw_from_the_truncated_posterior() -> None:
    """a | x has the density a^-20 on [max x, 3]; integrated on a grid."""
    grid = torch.linspace(float(X.max()), 3.0, 100_001, dtype=torch.float64)
    weights = grid**-20 / (grid**-20).sum()
    mean = float((weights * grid).sum())
    sd = float((weights * (grid - mean) ** 2).sum()) ** 0.5
    draws = pg.fit(width, X, CHAINS, seed=0).posterior()["a"]
    # The hard edge makes chains slow: 4.5 standard errors at an effective size of 46.
    assert abs(float(draws.mean()) - mean) < 0.67 * sd and float(draws.min()) >= float(X.max())
    assert 0.6 < float(draws.std()) / sd < 1.5
    assert abs(1.5 - mean) > 5 * sd  # the prior's mean


def test_a_bound_of_minus_infinity_is_said_in_words() -> None:
    with pytest.raises(NonFiniteError, match=r"'x' are impossible.* \(at a = 1.9.*every guide that reaches there"):
        pg.fit(width, X, SVI(steps=400, lr=0.02), seed=0)


@pytest.mark.parametrize("hidden", [True, False])
def test_entries_that_a_mask_hides_are_not_blamed(hidden: bool) -> None:
    def model(x, seen):
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=seen):
            pyro.sample("x", dist.Uniform(0.0, 3.0, validate_args=False), obs=x)

    rows = {"x": torch.tensor([1.0, 9.0]), "seen": torch.tensor([True, not hidden])}
    assert bool(impossible(model, None, as_dataset(rows, model).batch())) is not hidden


def keeping(x):
    end = pyro.param("end", torch.tensor(2.5), constraint=dist.constraints.interval(float(X.max()), 3.0))
    pyro.sample("a", dist.Uniform(x.max(), end))


def test_a_guide_that_keeps_to_the_possible_is_trained() -> None:
    fit = pg.fit(pg.Program(width, keeping), X, SVI(steps=100, lr=0.02), seed=0)
    assert len(fit.records["program_loss"]) == 100 and float(fit.params["end"]) < 2.5


def narrow(x):
    lo = pyro.sample("lo", dist.Normal(0.0, 100.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Uniform(lo, lo + 2.1), obs=x)


def test_start_is_looked_at_where_draws_fail() -> None:
    with pytest.raises(ValueError, match=r"at site 'x'.*at none of 100 draws of the prior.*start="):
        pg.check(narrow, X)
    assert pg.check(pg.Program(narrow, start=lambda: {"lo": torch.tensor(0.0)}), X).rows == 20
    with pytest.raises(ValueError, match="at site 'x'.*observed values lie outside") as error:
        pg.check(lambda x: fixed(x), X)
    assert "start=" not in str(error.value)  # no latent site moves that support


def fixed(x):
    a = pyro.sample("a", dist.Uniform(0.0, 3.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Bernoulli(a / 3), obs=x)
