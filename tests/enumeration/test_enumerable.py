"""Programs whose code does not broadcast over enumerated values: named by the check, never summed to a wrong answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import ppl_gen as pg
from ppl_gen.inference import ELBO, EM, IWAE, NUTS, SVI

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")  # chains and guides are short on purpose

torch.manual_seed(0)
X = torch.linspace(-1.0, 2.0, 40)
FEATURES = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
OUTCOME = FEATURES @ torch.tensor([2.0, 0.0, -1.0, 0.0])
HALF = torch.tensor(0.5)


def matrix_product(x: Tensor, y: Tensor) -> None:
    with pyro.plate("coef", 4):
        b = pyro.sample("b", dist.Normal(0.0, 2.0))
        g = pyro.sample("g", dist.Bernoulli(HALF))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ (b * g), 0.5), obs=y)


def members_together(x: Tensor, y: Tensor) -> None:
    with pyro.plate("coef", 4):
        b = pyro.sample("b", dist.Normal(0.0, 2.0))
        g = pyro.sample("g", dist.Bernoulli(HALF))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * (b * g).unsqueeze(-2)).sum(-1), 0.5), obs=y)


def rows_given(read: Callable[[Tensor], Any], name: str) -> Callable[[Tensor], None]:
    """A global indicator, read in some way."""

    def model(x: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        g = pyro.sample("g", dist.Bernoulli(HALF))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(a + read(g), 1.0), obs=x)

    model.__name__ = name
    return model


def local(read: Callable[[Tensor], Tensor], name: str) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            g = pyro.sample("g", dist.Bernoulli(HALF))
            pyro.sample("x", dist.Normal(a + read(g), 1.0), obs=x)

    model.__name__ = name
    return model


WRONG = [
    rows_given(lambda g: g.sum(), "sum_of_all"),
    rows_given(lambda g: g.reshape(-1)[0], "first_of_all"),
    rows_given(lambda g: g.flatten()[-1], "last_of_all"),
    rows_given(lambda g: float(g.max()), "a_number"),
    rows_given(lambda g: 1.0 if g.any() else -1.0, "any"),
    rows_given(lambda g: g.mean(), "mean_of_all"),
    local(lambda g: g - g.mean(), "less_their_mean"),
    local(lambda g: torch.softmax(g, 0), "softmax_from_the_left"),
    local(lambda g: g.cumsum(-1), "sum_so_far"),
    local(lambda g: g.flip(-1), "another_rows"),
]
FAILS = [
    rows_given(lambda g: 1.0 if g else -1.0, "python_if"),
    rows_given(lambda g: g.item(), "item"),
    local(lambda g: g @ g.new_ones(len(g), len(g)), "product"),
]
RIGHT = [
    rows_given(lambda g: g, "plain"),
    rows_given(lambda g: torch.where(g > 0, 1.0, -1.0), "where"),
    rows_given(lambda g: torch.tensor([-1.0, 1.0])[g.long()], "indexed"),
    local(lambda g: torch.tensor([-1.0, 1.0])[g.long()], "indexed_rows"),
]


def refused(model: Callable[..., None], data: Any, algorithm: Any) -> str:
    with pytest.raises(pg.IncompatibleError) as caught:
        pg.fit(model, data, algorithm)
    return str(caught.value)


@pytest.mark.parametrize("model", [*WRONG, *FAILS], ids=lambda m: m.__name__)
def test_what_does_not_broadcast_is_named_before_anything_is_summed(model: Callable[..., None]) -> None:
    info = pg.check(model, X)
    assert "'g' enumerated" in info.unenumerable and f"not enumerable: {info.unenumerable}" in str(info)
    assert "differentiable latents" not in info.offers and "finite local latents" not in info.offers
    for algorithm in (SVI(steps=1), SVI(IWAE(2), steps=1), NUTS(draws=2, warmup=2, chains=1), EM()):
        assert info.unenumerable in refused(model, X, algorithm), algorithm.label


@pytest.mark.parametrize("model", RIGHT, ids=lambda m: m.__name__)
def test_what_broadcasts_is_left_alone(model: Callable[..., None]) -> None:
    info = pg.check(model, X)
    assert not info.unenumerable and "differentiable latents" in info.offers


def test_a_matrix_product_over_a_plate() -> None:
    data = {"x": FEATURES, "y": OUTCOME}
    said = refused(matrix_product, data, SVI(steps=1))
    for part in ("'g' enumerated in `", "x @ (b * g)", "mat1 and mat2 shapes", "a site of its own"):
        assert part in said
    # Summed in parallel, all members of the plate would share one value.
    assert "give each member a site of its own" in refused(members_together, data, NUTS(draws=2, warmup=2, chains=1))


def test_the_edit_mends_it() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("coef", 4):
            b = pyro.sample("b", dist.Normal(0.0, 2.0))
        terms = [x[:, j] * b[..., j] * pyro.sample(f"g_{j}", dist.Bernoulli(HALF)) for j in range(4)]
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(sum(terms), 0.5), obs=y)

    data = {"x": FEATURES, "y": OUTCOME}
    assert not pg.check(model, data).unenumerable
    pg.fit(model, data, SVI(steps=2))


def test_a_guide_that_draws_them_needs_no_sum() -> None:
    model = WRONG[0]

    def guide(x: Tensor) -> None:
        pyro.sample("a", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 0.1))
        pyro.sample("g", dist.Bernoulli(logits=pyro.param("logits", torch.tensor(0.0))))

    for objective in (ELBO(), ELBO(enumerate=False)):
        fit = pg.fit(pg.Program(model, guide), X, SVI(objective, steps=2))
        assert "score function with baseline: g" in fit.notes["gradients"]
    # log p(x_i | a, g) at the guide's draws, nothing summed.
    draws = fit.posterior(draws=400)
    means = (draws["a"] + draws["g"])[:, None]
    exact = torch.logsumexp(dist.Normal(means, 1.0).log_prob(X), 0) - torch.tensor(400.0).log()
    # sd of p(x | a, g) over g is at most 0.5 of its mean here; 100 draws and 400: 4.5 * 0.5 / sqrt(80).
    assert torch.allclose(fit.evidence(draws=100).values.float(), exact, atol=0.26)


def test_local_sites_drawn_by_a_guide_are_not_summed_by_evidence() -> None:
    def guide(x: Tensor) -> None:
        pyro.sample("a", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("g", dist.Bernoulli(logits=pyro.param("logits", torch.tensor(0.0))))

    fit = pg.fit(pg.Program(WRONG[6], guide), X, SVI(steps=2))
    with pytest.raises(pg.IncompatibleError, match="cannot be summed out: with 'g' enumerated"):
        fit.evidence()


def test_the_last_rows_of_a_program_of_a_fixed_number_of_rows() -> None:
    def model(x: Tensor) -> None:
        g = pyro.sample("g", dist.Bernoulli(HALF))
        with pyro.plate("data", 40):
            pyro.sample("x", dist.Normal(g.sum() + torch.zeros(40), 1.0), obs=x)

    assert "'g' enumerated" in pg.check(model, X).unenumerable


def test_a_density_that_is_random_by_itself_is_not_held_against_enumeration() -> None:
    def model(x: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            g = pyro.sample("g", dist.Bernoulli(HALF))
            pyro.sample("x", dist.Normal(a + g + torch.rand(()), 1.0), obs=x)

    assert not pg.check(model, X).unenumerable
