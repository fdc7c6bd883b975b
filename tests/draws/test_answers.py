"""What a fit answers: draws of what is latent, missing, new or given."""

from __future__ import annotations

import copy
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import (
    X8,
    conjugate,
    conjugate_guide,
    conjugate_posterior,
    eight_schools,
    local,
    local_guide,
    mixture,
    no_plate,
    regression,
    same,
    sine_rows,
)
from pyro.infer.autoguide import AutoNormal

import ppl_gen as pg
from ppl_gen.data.batching import as_dataset
from ppl_gen.data.rows import Rows
from ppl_gen.inference import SVI, Laplace

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")  # chains and guides are short on purpose


def test_a_fit_says_what_it_is() -> None:
    fit = pg.fit(conjugate, X8, SVI(steps=3), seed=7)
    assert repr(fit).startswith("Fit(conjugate, SVI(ELBO), seed=7: finished") and "ran all 3 steps" in repr(fit)
    assert fit.status is pg.Status.FINISHED and fit == fit and hash(fit) == hash(fit) and fit != copy.copy(fit)
    with pytest.raises(AttributeError):
        fit.seed = 3  # type: ignore[misc]
    fit.params["AutoNormal.locs.theta"].zero_()
    assert float(fit.params["AutoNormal.locs.theta"]) != 0.0, "params are copies"
    with pytest.raises(KeyError, match="no network named 'net' in this fit"):
        fit.module("net")
    for name, value in (("draws", 0), ("draws", 1.5), ("draws", True)):
        with pytest.raises(ValueError, match=f"{name}: expected a whole number of at least 1"):
            fit.posterior(**{name: value})
    with pytest.raises(ValueError, match="n: expected a whole number"):
        fit.sample(0)


def test_posterior_and_predict_have_draws_first() -> None:
    exact = conjugate_posterior(X8)
    fit = pg.fit(pg.Program(conjugate, conjugate_guide), X8, SVI(steps=400, lr=0.03))
    theta = fit.posterior(draws=3000)["theta"]
    assert theta.shape == (3000,)
    predicted = fit.predict(draws=3000)["x"]
    assert predicted.shape == (3000, 8)
    variance = float(fit.params["scale"] ** 2 + 1.0)
    # Rows share theta: the variance of one column has a relative error of sqrt(2 / 3000) = 0.026.
    assert float(predicted[:, 0].var()) == pytest.approx(variance, rel=0.13)
    assert float(theta.mean()) == pytest.approx(float(exact.loc), abs=0.12)
    assert fit.predict(X8[:3], draws=5)["x"].shape == (5, 3)


def test_predict_draws_what_is_missing_and_posterior_what_is_latent_then() -> None:
    model, net = regression()
    fit = pg.fit(model, sine_rows(), SVI(steps=20, lr=0.05))
    new = {"t": torch.linspace(0.0, 1.0, 5)[:, None]}
    assert fit.predict(new, draws=6)["y"].shape == (6, 5)
    assert set(fit.sample(3)) == {"noise", "y"}
    given = fit.sample(3, given={"t": torch.zeros(3, 1), "noise": 1e-4})
    expected = fit.module("net")(torch.zeros(3, 1)).squeeze(-1).detach()
    assert torch.allclose(given["y"], expected, atol=1e-3) and float(given["noise"]) == pytest.approx(1e-4)
    with pytest.raises(ValueError, match=r"given: no site or input named \['q'\]"):
        fit.sample(3, given={"q": 1})
    with pytest.raises(ValueError, match=r"given: 't' has shape \(2, 1\), expected \(3, 1\)"):
        fit.sample(3, given={"t": torch.zeros(2, 1)})


def test_given_values_may_be_plain_numbers() -> None:
    fit = pg.fit(conjugate, X8, SVI(steps=2))
    drawn = fit.sample(2000, given={"theta": 5})["x"]
    assert float(drawn.mean()) == pytest.approx(5.0, abs=5 / math.sqrt(2000))
    assert fit.sample(3, given={"x": 1})["x"].tolist() == [1.0, 1.0, 1.0]


def test_new_rows_can_be_made_conditionally() -> None:
    def labelled(x: torch.Tensor, y: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=torch.zeros(3)), obs=y)
            pyro.sample("x", dist.Normal(10.0 * y, pyro.param("s", torch.tensor(1.0))), obs=x)

    y = torch.arange(9) % 3
    fit = pg.fit(labelled, {"x": 10.0 * y + 0.1, "y": y}, SVI(steps=2), seed=0)
    rows = fit.sample(50, given={"y": 2})
    assert (rows["y"] == 2).all() and abs(float(rows["x"].mean()) - 20.0) < 1.5  # sd 1 / sqrt 50: 10 sd
    with pytest.raises(ValueError, match="no site or input"):
        fit.sample(5, given={"label": 1})


def test_an_amortised_guide_follows_new_rows_and_a_guide_by_row_does_not() -> None:
    fit = pg.fit(pg.Program(local, local_guide), X8, SVI(steps=2))
    far = X8 + 100.0
    assert float(fit.posterior(far, draws=20)["z"].mean()) > 15.0, "slope 0.2"

    def by_row(x: torch.Tensor) -> None:
        loc = pyro.param("loc", lambda: 50.0 + torch.zeros(len(x), dtype=x.dtype))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0))

    for guide in (by_row, AutoNormal):
        fit = pg.fit(pg.Program(local, guide), X8, SVI(steps=2))
        draws = fit.posterior(far, draws=40)["z"]  # as many rows as there were, but other ones
        assert draws.shape == (40, 8) and abs(float(draws.mean() - far.mean() / 2)) < 5 / math.sqrt(640), "z | x"


def test_a_program_that_reads_x_to_make_x_cannot_be_run_forward() -> None:
    def chain(x: torch.Tensor) -> None:
        slope = pyro.param("slope", torch.tensor(0.5, dtype=x.dtype))
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(slope * before, 1.0).to_event(1), obs=x)

    def logged(x: torch.Tensor) -> None:  # the observation is not the entry itself
        chain(x.exp().log())

    x = torch.randn(10, 3)
    for model in (chain, logged):
        fit = pg.fit(model, x, SVI(steps=2))
        assert fit.evidence().exact
        with pytest.raises(pg.IncompatibleError, match=r"reads its own observation of x to generate it"):
            fit.sample(4)

    def tokens(x: torch.Tensor) -> None:  # from 1 to 3, of which no other is in the table
        table = pyro.param("table", 9.0 * torch.eye(3))
        if not bool(((x >= 1) & (x <= 3)).all()):
            raise IndexError("tokens count from 1 to 3")
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Categorical(logits=table[x[:, :-1] - 1]).to_event(1), obs=x[:, 1:] - 1)

    with pytest.raises(pg.IncompatibleError, match=r"reads its own observation of x to generate it"):
        pg.fit(tokens, torch.tensor([[1, 2, 3, 1], [2, 2, 1, 3]]), SVI(steps=2, lr=0.1)).sample(4)

    def standardised(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.param("a", torch.zeros(())), 1.0), obs=(x - 3.0) / 2.0)

    assert pg.fit(standardised, x[:, 0], SVI(steps=2)).sample(4)["x"].shape == (4,)


def test_finite_latents_are_drawn_exactly_from_their_conditional() -> None:
    fit = pg.fit(mixture, torch.cat([X8 - 6.0, X8 + 6.0]), SVI(steps=300, lr=0.05), seed=1)
    draws = fit.posterior(draws=50)
    assert draws["k"].shape == (50, 16) and draws["means"].shape == (50, 2)
    side = draws["k"].double().mean(0)
    assert float((side[:8] - side[8:]).abs().min()) > 0.9, "rows 12 standard deviations apart are distinguished"


def test_prior_predictive_needs_no_fit() -> None:
    drawn = pg.prior_predictive(conjugate, X8, draws=2000, seed=3)
    assert drawn["theta"].shape == (2000,) and drawn["x"].shape == (2000, 8)
    assert float(drawn["x"][:, 0].var()) == pytest.approx(2.0, rel=0.16)  # relative error sqrt(2 / 2000): 5 of them
    assert same(drawn, pg.prior_predictive(conjugate, X8, draws=2000, seed=3))


def test_programs_of_every_kind_answer_without_a_crash() -> None:
    schools = pg.fit(eight_schools, {"sigma": X8.abs().float() + 1.0, "y": 10 * X8.float()}, SVI(steps=20))
    whole = pg.fit(no_plate, X8, SVI(steps=20))
    free = pg.fit(pg.Program(lambda x: _free(x)), X8, SVI(steps=20))
    for fit in (schools, whole, free):
        assert "verdict" in fit.diagnose(draws=60).attrs and fit.to_arviz(draws=60) is not None and fit.sample(8)
        assert math.isfinite(fit.evidence(draws=30, particles=30).mean)
    with pytest.raises(pg.IncompatibleError, match="has no latent sites"):
        free.posterior()


def _free(x: torch.Tensor) -> None:
    """No latent site at all: maximum likelihood."""
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(pyro.param("loc", torch.zeros((), dtype=x.dtype)), 1.0), obs=x)


def test_a_subset_gives_a_recipe_what_the_user_would_have_passed() -> None:
    images = torch.rand(30, 4)
    rows = Rows({"x": images, "y": torch.arange(30)}, on_batch=lambda b: {**b, "x": torch.bernoulli(b["x"])})

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Bernoulli(pyro.param("p", torch.full((4,), 0.5))).to_event(1), obs=x)

    seen: list[Any] = []

    def build(data: Any) -> pg.Program:
        seen.append(data)
        return pg.Program(model)

    held = as_dataset(rows, model).subset(torch.arange(10, 20))
    for data in (held, held.original):
        fit = pg.fit(pg.Recipe(build), data, SVI(steps=3, batch_size=5))
        assert fit.data.on_batch is not None and isinstance(seen[-1], Rows)
        assert torch.equal(seen[-1]["x"], images[10:20]) and seen[-1]["y"].tolist() == list(range(10, 20))


class _Silent(dist.Normal):  # type: ignore[misc]
    has_rsample = False

    def sample(self, sample_shape: Any = ()) -> torch.Tensor:
        raise NotImplementedError("TODO: draws")


def test_what_cannot_be_drawn_is_refused_by_the_name_of_its_site() -> None:
    def model(x: torch.Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("track", _Silent(loc, 1.0), obs=x)

    fit = pg.fit(model, torch.zeros(4), SVI(steps=2))
    assert fit.posterior(draws=3)["loc"].shape == (3,)
    questions = [
        lambda: fit.predict(draws=3),
        lambda: fit.sample(3),
        lambda: pg.prior_predictive(model, torch.zeros(4), draws=2),
    ]
    for question in questions:
        with pytest.raises(pg.IncompatibleError, match=r"at site 'track': .* no draws \(TODO: draws\)"):
            question()
    assert fit.verdict.grade and "posterior" in fit.to_arviz(draws=3)


def test_given_values_stand_along_the_rows_wherever_the_data_plate_has_them() -> None:
    """One value for each row of a plate at dimension -2, as many as there are columns, went along the columns."""
    scale = torch.tensor(1e-4)

    def in_front(x):
        with pyro.plate("data", len(x), dim=-2):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            with pyro.plate("columns", x.shape[1], dim=-1):
                pyro.sample("x", dist.Normal(a, scale), obs=x)

    def behind(x):
        with pyro.plate("data", len(x), dim=-1):
            with pyro.plate("columns", 3, dim=-2):
                b = pyro.sample("b", dist.Normal(0.0, 1.0))
                pyro.sample("y", dist.Normal(b, scale), obs=x.T)

    rows, columns = torch.arange(3.0), torch.arange(3.0)[:, None]
    fit = pg.fit(in_front, torch.randn(5, 3), Laplace(), seed=0)
    with pytest.raises(ValueError, match=r"'a' has shape \(3,\), expected \(3, 1\)"):
        fit.sample(3, given={"a": rows})
    assert torch.allclose(fit.sample(3, given={"a": rows[:, None]})["x"].float(), rows[:, None].expand(3, 3), atol=1e-3)
    assert torch.allclose(fit.sample(5, given={"a": 2.0})["x"].float(), torch.full((5, 3), 2.0), atol=1e-3)
    fit = pg.fit(behind, torch.randn(5, 3), Laplace(), seed=0)
    assert torch.allclose(fit.sample(3, given={"b": rows})["y"].float(), rows.expand(3, 3), atol=1e-3)
    assert torch.allclose(fit.sample(4, given={"b": columns})["y"].float(), columns.expand(3, 4), atol=1e-3)
    with pytest.raises(ValueError, match=r"'b' has shape \(4, 3\), expected \(3, 4\)"):
        fit.sample(4, given={"b": torch.zeros(4, 3)})


def test_inputs_of_whole_numbers_are_not_rounded() -> None:
    """1.7 was cut to 1 where all x of the data are whole; `fit.predict` took it as it is."""

    def model(x, count, shown):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(1.0 * count * shown, pyro.param("s", torch.tensor(1e-4))), obs=x)

    data = {"x": torch.randn(4), "count": torch.tensor([0, 1, 2, 0]), "shown": torch.ones(4, dtype=torch.bool)}
    fit = pg.fit(model, data, SVI(steps=1, lr=1e-9), seed=0)
    for value in (1.0, 1.7):
        assert torch.allclose(fit.sample(2, given={"count": value})["x"], torch.full((2,), value), atol=1e-3)
    with pytest.raises(ValueError, match=r"given: 'shown' holds truth values in the data, got \[2.0"):
        fit.sample(2, given={"shown": 2.0})


def test_what_is_given_and_decides_nothing_is_refused() -> None:
    def model(x, t):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            e = pyro.sample("e", dist.Normal(0.0, 1.0))
            theta = pyro.deterministic("theta", mu + e + t)
            pyro.sample("seen", dist.Normal(theta, 1e-4), obs=x)

    fit = pg.fit(model, {"x": torch.randn(4), "t": torch.zeros(4)}, SVI(steps=1), seed=0)
    assert torch.allclose(fit.sample(3, given={"mu": 1.0, "e": 2.0, "t": 3.0})["seen"], torch.tensor(6.0), atol=1e-3)
    assert fit.sample(3, given={"seen": 2.0})["seen"].tolist() == [2.0, 2.0, 2.0]
    with pytest.raises(ValueError, match="given: 'theta' is computed by the program, so it cannot be fixed"):
        fit.sample(3, given={"theta": 2.0})
    with pytest.raises(ValueError, match=r"given: 'x' is what is observed at 'seen'.*give {'seen': ...}"):
        fit.sample(3, given={"x": 2.0})
