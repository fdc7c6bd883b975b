"""A fit by an algorithm of one's own comes back with it, whole or not at all; networks of players come back too."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import conjugate, generator
from pyro.infer.autoguide import AutoDiagonalNormal, AutoLaplaceApproximation, AutoNormal

import ppl_gen as pg
from ppl_gen.fitting.algorithm import Algorithm, Iterative
from ppl_gen.fitting.posteriors.base import Posterior
from ppl_gen.fitting.posteriors.guides import GuidePosterior
from ppl_gen.fitting.posteriors.points import PointPosterior
from ppl_gen.fitting.run import Outcome
from ppl_gen.inference import SVI, Adversarial

X = torch.linspace(-1.0, 2.0, 12)


def own_guide(x: Any) -> None:
    """Its parameters bear the names of AutoNormal's: a guide taken for that one would load without a word."""
    loc = pyro.param("AutoNormal.locs.theta", torch.zeros(()))
    scale = pyro.param("AutoNormal.scales.theta", torch.ones(()), constraint=dist.constraints.softplus_positive)
    pyro.sample("theta", dist.Laplace(loc, scale))


class OutsideParameters(Posterior):
    """What it draws is the number that it was given."""

    kind = "variational"

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value

    def draw(self, count: int, batch: Any) -> list[dict[str, torch.Tensor]]:
        return [{"theta": self.value + torch.randn(())} for _ in range(count)]


class OfParameters(OutsideParameters):
    def __init__(self) -> None: ...

    def draw(self, count: int, batch: Any) -> list[dict[str, torch.Tensor]]:
        loc = pyro.param("AutoNormal.locs.theta")
        return [{"theta": (loc + torch.randn(())).detach()} for _ in range(count)]


@dataclass(frozen=True)
class Own(Iterative):
    """Moves the location of a guide half the way to the mean of the rows at every step."""

    posterior: str = "guide"
    steps: int = 3
    needs = ()

    def init(self, run: Any) -> Any:
        run.workspace.collect(partial(own_guide, run.data.batch().args[0]))
        return torch.zeros(())

    def step(self, state: Any, source: Any) -> Any:
        loc = pyro.get_param_store()._params["AutoNormal.locs.theta"]
        state = state + (source.next().args[0].mean() - state) / 2
        loc.data.copy_(state)
        return state, {"loc": state}

    def limit(self, run: Any) -> int:
        return self.steps

    def outcome(self, state: Any, run: Any) -> Outcome:
        values = run.workspace.snapshot()
        if self.posterior == "guide":
            return Outcome(GuidePosterior(own_guide), values)
        if self.posterior == "point":
            return Outcome(PointPosterior({"theta": state}), modules={})
        return Outcome(OfParameters() if self.posterior == "parameters" else OutsideParameters(state), values)


@dataclass(frozen=True)
class OwnLoop(Algorithm):
    """The same in a loop of its own, without an outline."""

    needs = ()

    def run(self, run: Any) -> Outcome:
        return Own().run(run)


def saved(fit: pg.Fit, folder: Path) -> Path:
    return fit.save(folder / "kept")


def same(back: pg.Fit, fit: pg.Fit) -> None:
    assert back.params.keys() == fit.params.keys()
    assert all(torch.equal(back.params[name], value) for name, value in fit.params.items())
    ours, theirs = fit.posterior(draws=20), back.posterior(draws=20)
    assert ours.keys() == theirs.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_a_guide_of_an_algorithm_of_ones_own_comes_back_with_it_and_is_never_taken_for_another(tmp_path: Path) -> None:
    fit = pg.fit(conjugate, X, Own(), seed=3)
    assert torch.isclose(fit.params["AutoNormal.locs.theta"], X.mean() * (1 - 0.5**3)), "halfway, three times"
    path = saved(fit, tmp_path)
    back = pg.load(path, program=conjugate, algorithm=Own())
    same(back, fit)
    assert back.evidence(draws=5, particles=5).mean == fit.evidence(draws=5, particles=5).mean
    same(pg.load(back.save(tmp_path / "again"), program=conjugate, algorithm=Own()), fit)
    with pytest.raises(
        ValueError, match=r"algorithm: Own made the guide .* algorithm=Own\(posterior='guide', steps=3\)"
    ):
        pg.load(path, program=conjugate)
    with pytest.raises(ValueError, match=r"made by Own: Own\(.*steps=3\); got Own: Own\(.*steps=4\)"):
        pg.load(path, program=conjugate, algorithm=Own(steps=4))
    with pytest.raises(ValueError, match="made by Own"):
        pg.load(path, program=conjugate, algorithm=SVI(steps=3))
    with pytest.raises(TypeError, match="algorithm: expected an instance"):
        pg.load(path, program=conjugate, algorithm=Own)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pass program="):
        pg.load(path, algorithm=Own())


@pytest.mark.parametrize("algorithm", [None, Own("point")])
def test_points_of_an_algorithm_of_ones_own_come_back(algorithm: Any, tmp_path: Path) -> None:
    fit = pg.fit(conjugate, X, Own("point"), seed=3)
    back = pg.load(saved(fit, tmp_path), program=conjugate, algorithm=algorithm)
    same(back, fit)
    assert back.point is not None and torch.isclose(back.point["theta"], X.mean() * (1 - 0.5**3))


def test_a_posterior_of_ones_own_comes_back_if_parameters_hold_it_and_is_refused_otherwise(tmp_path: Path) -> None:
    fit = pg.fit(conjugate, X, Own("parameters"), seed=3)
    with pytest.warns(UserWarning, match="is code and is not saved"):
        path = saved(fit, tmp_path)
    same(pg.load(path, program=conjugate, algorithm=Own("parameters")), fit)
    with pytest.raises(ValueError, match="algorithm: Own made"):
        pg.load(path, program=conjugate)
    fit = pg.fit(conjugate, X, Own("outside"), seed=3)
    with pytest.warns(UserWarning, match="is code and is not saved"):
        path = saved(fit, tmp_path)
    with pytest.raises(ValueError, match="other values of 'theta' than were saved"):
        pg.load(path, program=conjugate, algorithm=Own("outside"))


def test_an_algorithm_with_a_loop_and_a_guide_of_its_own_says_at_once_that_it_will_not_load(tmp_path: Path) -> None:
    fit = pg.fit(conjugate, X, OwnLoop(), seed=3)
    with pytest.warns(UserWarning, match=r"made by OwnLoop, which does not implement outline\(run\)"):
        path = saved(fit, tmp_path)
    for algorithm in (None, OwnLoop()):
        with pytest.raises(ValueError, match="algorithm: .* cannot be made again"):
            pg.load(path, program=conjugate, algorithm=algorithm)
    assert "theta" in pg.load(path).to_arviz().posterior


def test_a_critic_comes_back_with_its_algorithm_and_is_explained_without(tmp_path: Path) -> None:
    program, _ = generator()
    algorithm = SVI(objective=Adversarial("non-saturating"), steps=3)
    fit = pg.fit(program, torch.randn(20, 1, generator=torch.Generator().manual_seed(0)), algorithm, seed=2)
    path = saved(fit, tmp_path)
    back = pg.load(path, program=program, algorithm=algorithm)
    ours, theirs = fit.module("critic").state_dict(), back.module("critic").state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)
    assert all(torch.equal(back.params[name], value) for name, value in fit.params.items())
    assert "not loaded" not in back.notes
    with pytest.raises(KeyError, match=r"network 'critic' of a player; pass algorithm=\.\.\. to pg\.load"):
        pg.load(path, program=program).module("critic")


@pytest.mark.parametrize(
    "guide", [None, AutoDiagonalNormal, AutoNormal(conjugate), AutoLaplaceApproximation, "function"]
)
def test_guides_that_the_program_leads_to_need_no_algorithm_and_may_have_it(guide: Any, tmp_path: Path) -> None:
    program = pg.Program(conjugate, own_guide if guide == "function" else guide)
    algorithm = SVI(steps=5, optimiser=lambda ps: torch.optim.Adam(ps, lr=0.1))
    fit = pg.fit(program, X, algorithm, seed=3)
    path = saved(fit, tmp_path)
    for given in (None, algorithm):
        back = pg.load(path, program=program, algorithm=given)
        same(back, fit)
        assert back.evidence(draws=5, particles=5).mean == fit.evidence(draws=5, particles=5).mean
