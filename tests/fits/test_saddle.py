"""What players of a game could still win alone: on a bilinear game the gain is known in closed form."""

from __future__ import annotations

import copy

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

import ppl_gen as pg
from ppl_gen.inference import (
    EBGAN,
    ELBO,
    EM,
    IWAE,
    SVI,
    Adversarial,
    AdversarialTraining,
    Divergence,
    DomainAdversarial,
    Objective,
)

#: Rows that all are alike get a warning.
pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")

RATE = 0.01
ZEROS = torch.zeros(8, 1, dtype=torch.float64)


def _at(theta: float) -> object:
    def point(x: torch.Tensor) -> None:
        place = pyro.param("theta", torch.tensor(theta, dtype=torch.float64))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Delta(place.expand(len(x), 1), event_dim=1), obs=x)

    return point


def _algorithm(phi: float, rate: float) -> SVI:
    critic = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(critic.weight, phi)
    objective = Adversarial("wasserstein", critic=critic, penalty="none", critic_steps=1)
    return SVI(objective, steps=1, lr=rate, optimiser="sgd")


@pytest.mark.parametrize(("phi", "theta"), [(0.5, 1.0), (0.0, 1.0), (0.0, 0.0)])
def test_the_gap_of_a_bilinear_game_is_the_one_of_theory(phi: float, theta: float) -> None:
    # The value is theta phi. Alone for k steps the critic moves by -k rate theta and gains k rate theta^2; so does
    # the program with phi. At the saddle nobody gains.
    fit = pg.fit(_at(theta), ZEROS, _algorithm(phi, 1e-300), seed=0)  # type: ignore[arg-type]
    before = {**fit.params, **fit.module("critic").state_dict()}
    found = pg.exploitability(fit, _algorithm(phi, RATE), steps=50, looks=3)
    assert found.gains["critic"] == pytest.approx(50 * RATE * theta**2, abs=1e-12)
    assert found.gains["program"] == pytest.approx(50 * RATE * phi**2, abs=1e-12)
    assert found.total == pytest.approx(50 * RATE * (theta**2 + phi**2), abs=1e-12)
    assert found.winners == [name for name, at in (("critic", theta), ("program", phi)) if at]
    assert ("nothing speaks against a saddle point" in str(found)) is (theta == phi == 0)
    after = {**fit.params, **fit.module("critic").state_dict()}
    assert all(torch.equal(before[name], after[name]) for name in before), "the fit stays as it is"
    assert list(found.table().columns) == ["gain", "stderr"]


def _shift(x: torch.Tensor) -> None:
    loc = pyro.param("loc", torch.tensor(0.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Delta(loc + z), obs=x)


def test_training_closes_the_gap_and_a_seed_repeats_it() -> None:
    x = 3.0 + torch.randn(1000, generator=torch.Generator().manual_seed(0))
    rates = {"critic": 1e-2, "program": 1e-2}

    critic = nn.Linear(1, 1)

    def algorithm(steps: int) -> SVI:
        return SVI(Adversarial("minimax", critic=critic), steps=steps, lr=rates)

    gaps = [pg.exploitability(pg.fit(_shift, x, algorithm(n), seed=0), algorithm(n), steps=100) for n in (1, 1500)]
    assert gaps[0].total > 0.3 and gaps[0].winners
    assert gaps[1].total < 0.2 * gaps[0].total
    fit = pg.fit(_shift, x, algorithm(1), seed=0)
    again = pg.exploitability(fit, algorithm(1), steps=100)
    assert again.gains == gaps[0].gains


def test_held_out_rows_and_what_is_refused() -> None:
    algorithm = _algorithm(0.5, RATE)
    fit = pg.fit(_at(1.0), ZEROS, algorithm, seed=0)  # type: ignore[arg-type]
    assert (
        pg.exploitability(fit, algorithm, ZEROS + 1.0, steps=5).gains["critic"] < 0.01
    )  # data where the made rows are
    with pytest.raises(TypeError, match="algorithm: expected the SVI that played the game, got EM"):
        pg.exploitability(fit, EM())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="fit: expected a fit"):
        pg.exploitability("fit", algorithm)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="looks: expected a whole number of at least 2"):
        pg.exploitability(fit, algorithm, looks=1)


def test_the_gap_of_another_game_is_refused() -> None:
    fit = pg.fit(_at(1.0), ZEROS, _algorithm(0.5, RATE), seed=0)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"algorithm: expected one of the game that was played, SVI\(Adversarial\), got"
    ):
        pg.exploitability(fit, SVI(EBGAN(), steps=1))


def test_the_gap_of_the_same_objective_with_other_settings_is_refused() -> None:
    """Its gains would be those in another game, under the name of the one that was played."""
    x = torch.randn(50, generator=torch.Generator().manual_seed(0))
    played, others = Adversarial("kl", penalty="none"), [Adversarial("hellinger", penalty="none"), Adversarial("kl")]
    fit = pg.fit(_shift, x, SVI(played, steps=1), seed=0)
    assert fit.notes["objective"] == "Adversarial(kind='kl', penalty='none')"
    for other in others:
        with pytest.raises(ValueError, match=r"Adversarial\(kind='kl', penalty='none'\), got Adversarial"):
            pg.exploitability(fit, SVI(other, steps=1))
    assert set(pg.exploitability(fit, SVI(played, steps=1, lr=1e-3), steps=2).gains) == {"critic", "program"}


@pytest.mark.parametrize(
    ("played", "other"),
    [
        (DomainAdversarial(objective=ELBO(beta=0.5)), DomainAdversarial(objective=ELBO())),
        (AdversarialTraining(objective=IWAE(3)), AdversarialTraining(objective=IWAE(4))),
        (AdversarialTraining(objective=Trace_ELBO(2)), AdversarialTraining(objective=Trace_ELBO())),
        (Adversarial(weight=np.float32(2)), Adversarial(weight=np.float32(3))),
        (
            Adversarial(Divergence(lambda u: u * u.log())),
            Adversarial(Divergence(lambda u: 2 * u * u.log())),
        ),
        (
            EBGAN(energy=nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))),
            EBGAN(energy=nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1))),
        ),
    ],
    ids=["nested", "particles", "of Pyro", "numpy", "divergence", "layers"],
)
def test_other_settings_are_other_words(played: Objective, other: Objective) -> None:
    """`exploitability` knows by them whether it is the game that was played."""
    assert played.call != other.call and played.call == copy.deepcopy(played).call


def test_equal_settings_are_the_same_words() -> None:
    assert Adversarial(weight=2).call == Adversarial(weight=np.float64(2.0)).call == "Adversarial(weight=2)"
    assert AdversarialTraining(bounds=(0, 1)).call == AdversarialTraining(bounds=[0.0, 1.0]).call
    assert AdversarialTraining(objective=ELBO()).call == AdversarialTraining().call


def test_the_gap_of_a_game_around_another_objective_is_refused() -> None:
    numbers = torch.Generator().manual_seed(0)
    x, net, head = torch.randn(60, 3, generator=numbers), nn.Linear(3, 4), nn.Linear(4, 1)

    def model(x: torch.Tensor, y: torch.Tensor, domain: torch.Tensor) -> None:
        pyro.module("net", net)
        pyro.module("head", head)
        with pyro.plate("data", len(x)):
            h = pyro.deterministic("features", net(x), event_dim=1)
            pyro.sample("y", dist.Bernoulli(logits=head(h).squeeze(-1)), obs=y)

    data = {"x": x, "y": (x[:, 0] > 0).float(), "domain": torch.arange(60) % 2}
    fit = pg.fit(model, data, SVI(DomainAdversarial(objective=ELBO(beta=0.5)), steps=1), seed=0)
    with pytest.raises(ValueError, match=r"got DomainAdversarial\(objective=ELBO\(\)\)"):
        pg.exploitability(fit, SVI(DomainAdversarial(), steps=1))
