"""What a program brings along is asked once before anything runs: other shapes were summed or averaged all the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import ppl_gen as pg
from ppl_gen.inference import ELBO, SVI, ContrastiveDivergence, Walkback
from ppl_gen.program.extensions import Energy, TimeSteps, Transition

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")  # runs are short on purpose

ROWS, STILL = 12, {"steps": 1, "lr": 1e-12}
X = 2.0 + torch.randn(ROWS, 2, generator=torch.Generator().manual_seed(0))


def _model(x: Tensor) -> None:
    loc = pyro.param("loc", torch.tensor(0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0).expand([2]).to_event(1), obs=x)


def _loc() -> Tensor:
    value: Tensor = pyro.param("loc", torch.tensor(0.5))
    return value


def _squares(x: Tensor) -> Tensor:
    return 0.5 * (x - _loc()).square()


def _moved(x: Tensor, steps: int) -> Tensor:
    return _loc().detach() + torch.randn_like(x)


def _energy(free_energy: Callable[[Tensor], Tensor], gibbs: Callable[[Tensor, int], Tensor] = _moved) -> pg.Fit:
    program = pg.Program(_model, energy=Energy(free_energy, gibbs, lambda: torch.tensor(math.log(2 * math.pi))))
    return pg.fit(program, X, SVI(ContrastiveDivergence(), **STILL), seed=0)


def test_energies_are_numbers_of_rows_and_chains_keep_their_shape() -> None:
    fit = _energy(lambda x: _squares(x).sum(-1))
    assert float(fit.history["free_energy"][0]) == pytest.approx(
        float(0.5 * (X - 0.5).square().sum(1).mean()), rel=1e-6
    )
    for wrong, shape in (
        (_squares, r"\(12, 2\)"),
        (lambda x: _squares(x).sum(-1, keepdim=True), r"\(12, 1\)"),
        (lambda x: _squares(x).sum(), r"\(\)"),
    ):
        with pytest.raises(ValueError, match=f"energy: `free_energy` has to give one number for.*{ROWS} rows.*{shape}"):
            _energy(wrong)
    for chain in (lambda x, steps: x[:, :1], lambda x, steps: x[:3], lambda x, steps: x[0]):
        with pytest.raises(ValueError, match=r"energy: `gibbs` has to give rows of the shape it takes, \(12, 2\), got"):
            _energy(lambda x: _squares(x).sum(-1), chain)


def _chain(denoise: Callable[[Tensor], Any], corrupt: Callable[[Tensor], Tensor] = lambda x: x + 1.0) -> pg.Fit:
    return pg.fit(pg.Program(_model, transition=Transition(corrupt, denoise)), X, SVI(Walkback(1), **STILL), seed=0)


def test_rows_are_restored_as_one_event_each() -> None:
    right = dist.Normal(0.5 * (X + 1.0), 1.0).to_event(1).log_prob(X).mean()
    found = _chain(lambda c: dist.Normal(_loc() * c, 1.0).to_event(1)).history["program_loss"][0]
    assert float(found) == pytest.approx(-float(right), rel=1e-6)
    for denoise in (
        lambda c: dist.Normal(_loc() * c, 1.0),
        lambda c: dist.Normal(_loc() * c, 1.0).to_event(2),
        lambda c: dist.Normal(_loc() * c[:, :1], 1.0).to_event(1),
    ):
        with pytest.raises(ValueError, match=r"transition: `denoise` has to give a distribution.*`.to_event\(1\)`"):
            _chain(denoise)
    with pytest.raises(ValueError, match="transition: `corrupt` has to give one of each of 12 rows"):
        _chain(lambda c: dist.Normal(_loc() * c, 1.0).to_event(1), lambda x: x[:1])


def _steps(
    term: Callable[[Tensor, Tensor], Tensor], constant: Callable[[Tensor], Tensor] = lambda x: x[:, 0]
) -> pg.Fit:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(_loc() * z[:, None], 1.0).expand([len(x), 2]).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    program = pg.Program(model, guide, time_steps=TimeSteps(4, term, constant))
    return pg.fit(program, X, SVI(ELBO(), **STILL), seed=0)


def test_terms_of_time_steps_are_numbers_of_rows() -> None:
    found = _steps(lambda t, x: _squares(x).sum(1)).history["program_loss"][0]
    right = (4 * 0.5 * (X - 0.5).square().sum(1) + X[:, 0]).mean()
    assert float(found) == pytest.approx(float(right), rel=1e-6)
    for term in (lambda t, x: _squares(x), lambda t, x: _squares(x).sum()):
        with pytest.raises(ValueError, match="time_steps: `term` has to give one number for each of 12 rows"):
            _steps(term)
    with pytest.raises(ValueError, match="time_steps: `constant` has to give one number for each of 12 rows"):
        _steps(lambda t, x: _squares(x).sum(1), lambda x: x)


@pytest.mark.parametrize("shape", [(ROWS, 1), (ROWS, 2), ()])
def test_evidence_is_a_number_for_each_row(shape: tuple[int, ...]) -> None:
    program = pg.Program(_model, evidence=lambda x: torch.zeros(shape))
    with pytest.raises(ValueError, match="evidence: the function has to give one number for each of 12 rows"):
        pg.fit(program, X, SVI(**STILL), seed=0).evidence()


def test_completed_rows_keep_what_is_seen() -> None:
    seen = X > 2.0

    def asked(imputes: Callable[..., Any]) -> Mapping[str, Tensor]:
        fit = pg.fit(pg.Program(_model, imputes=imputes), X, SVI(**STILL), seed=0)
        return fit.predict({"x": X, "mask": seen}, draws=3)

    made = asked(lambda values, mask, x: {"x": torch.where(mask, x, 7.0)})["x"]
    assert torch.equal(made[2], torch.where(seen, X, 7.0))
    with pytest.raises(ValueError, match="imputes: it has to leave what the mask says is seen as it is"):
        asked(lambda values, mask, x: {"x": x + 1.0})
    for wrong in (lambda v, mask, x: x, lambda v, mask, x: {"y": x}, lambda v, mask, x: {"x": x[:1]}):
        with pytest.raises(ValueError, match="imputes: it has to give a mapping with completed rows of shape"):
            asked(wrong)
