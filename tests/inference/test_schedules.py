"""Players in turn and at once: on a bilinear game both paths are known in closed form."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import ppl_gen as pg
from ppl_gen.data.batching import Batch
from ppl_gen.inference import SVI, Adversarial, Game, Loss
from ppl_gen.inference.objectives.adversarial import _AdversarialGame
from ppl_gen.inference.objectives.game import GameState

#: Rows that all are alike get a warning.
pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")

RATE, STEPS = 0.1, 30
ZEROS = torch.zeros(8, 1, dtype=torch.float64)


def _point(x: torch.Tensor) -> None:
    """Rows all at theta; the critic T(x) = phi x makes the game theta phi, with its saddle at 0."""
    theta = pyro.param("theta", torch.tensor(1.0, dtype=torch.float64))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Delta(theta.expand(len(x), 1), event_dim=1), obs=x)


def _played(schedule: str, steps: int = STEPS, rate: float = RATE, averaging: float = 0.0) -> pg.Fit:
    critic = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(critic.weight, 0.5)
    objective = Adversarial(
        "wasserstein", critic=critic, penalty="none", critic_steps=1, schedule=schedule, averaging=averaging
    )
    return pg.fit(_point, ZEROS, SVI(objective, steps=steps, lr=rate, optimiser="sgd"), seed=0, compile="graph")


def _place(fit: pg.Fit) -> np.ndarray:
    return np.array([float(fit.module("critic").weight.detach()), float(fit.params["theta"])])


#: From (phi, theta) to the next: phi moves by -rate theta, theta by rate phi, before or after phi has moved.
TURNS = {
    "simultaneous": np.array([[1.0, -RATE], [RATE, 1.0]]),
    "alternating": np.array([[1.0, -RATE], [RATE, 1.0 - RATE**2]]),
}


@pytest.mark.parametrize("schedule", list(TURNS))
def test_the_path_on_a_bilinear_game_is_the_one_of_theory(schedule: str) -> None:
    fit = _played(schedule)
    begins = np.array([0.5, 1.0])
    np.testing.assert_allclose(_place(fit), np.linalg.matrix_power(TURNS[schedule], STEPS) @ begins, atol=1e-12)
    other = next(name for name in TURNS if name != schedule)
    assert np.abs(_place(fit) - np.linalg.matrix_power(TURNS[other], STEPS) @ begins).max() > 0.05
    assert fit.cost["path"] == "graph"
    # At once the distance from the saddle grows by sqrt(1 + rate^2) a step; in turn it stays on an ellipse.
    radii = np.hypot(*begins), np.hypot(*_place(fit))
    if schedule == "simultaneous":
        assert abs(radii[1] / radii[0] - (1 + RATE**2) ** (STEPS / 2)) < 1e-12
    else:
        phi, theta = _place(fit)
        assert abs(phi**2 + theta**2 - RATE * phi * theta - (1.25 - RATE * 0.5)) < 1e-12


@pytest.mark.parametrize("schedule", list(TURNS))
def test_who_looks_at_which_batch_from_where(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def noted(self: Game, player: str, batch: Batch, state: GameState) -> tuple[Loss, GameState]:
        at = float(self.modules["critic"].weight.detach())  # type: ignore[operator]
        seen.append((player, None if batch.index is None else batch.index.tolist(), at))
        return looked(self, player, batch, state)

    looked = _AdversarialGame.loss
    monkeypatch.setattr(_AdversarialGame, "loss", noted)
    objective = Adversarial("minimax", critic=nn.Linear(1, 1), schedule=schedule)
    fit = pg.fit(_point, torch.arange(8.0).double().unsqueeze(1), SVI(objective, steps=3, batch_size=2), seed=0)
    assert [player for player, _, _ in seen] == ["critic", "program"] * 3
    assert fit.cost["gradient_evaluations"] == 6
    rows = [index for _, index, _ in seen]
    places = [at for _, _, at in seen]
    for critic, program in zip(range(0, 6, 2), range(1, 6, 2), strict=True):
        assert (rows[critic] == rows[program]) is (schedule == "simultaneous")
        assert (places[critic] == places[program]) is (schedule == "simultaneous")
    assert len(set(places)) == (3 if schedule == "simultaneous" else 4)


def test_wasserstein_takes_one_step_of_the_critic_where_players_move_at_once() -> None:
    assert Adversarial("wasserstein", schedule="simultaneous").critic_updates == 1
    assert Adversarial("wasserstein").critic_updates == 5
    with pytest.raises(ValueError, match="critic_steps: players that move at once move once each, got 5"):
        Adversarial("wasserstein", schedule="simultaneous", critic_steps=5)
    with pytest.raises(ValueError, match="schedule: expected one of 'alternating', 'simultaneous'"):
        Adversarial(schedule="in turn")


def test_a_simultaneous_game_that_explodes_ends_where_one_step_left_both_players() -> None:
    rate, begins = 10.0, np.array([0.5, 1.0])
    with pytest.raises(pg.NonFiniteError) as caught:
        _played("simultaneous", steps=500, rate=rate)
    fit = caught.value.fit
    assert fit.status == "diverged" and np.isfinite(_place(fit)).all() and np.abs(_place(fit)).max() > 1e100
    # The distance grows by sqrt(101) a step, so it tells how many were made; both players stand where the last left them.
    steps = round(2 * np.log(np.hypot(*(_place(fit) / 1e100)) * 1e100 / np.hypot(*begins)) / np.log1p(rate**2))
    path = np.linalg.matrix_power(np.array([[1.0, -rate], [rate, 1.0]]), steps) @ begins
    np.testing.assert_allclose(_place(fit), path, rtol=1e-9)


def test_the_average_of_players_that_circle_lies_at_the_saddle() -> None:
    # The last iterate stays on an ellipse about 1.1 wide (above); a turn takes 63 steps, the average looks at 300.
    last, mean = _played("alternating", steps=600), _played("alternating", steps=600, averaging=0.997)
    phi, theta = _place(last)
    assert np.hypot(phi, theta) > 0.9
    assert abs(float(mean.params["theta"])) < 0.1
    assert _place(mean)[0] == phi, "the players themselves move as they would without"


def test_an_average_is_what_its_formula_says() -> None:
    found = [float(_played("alternating", steps, averaging=0.5).params["theta"]) for steps in range(1, 13)]
    mean, place = 1.0, np.array([0.5, 1.0])
    for count, value in enumerate(found, start=1):
        place = TURNS["alternating"] @ place
        mean += (1 - min(0.5, count / (count + 9))) * (place[1] - mean)
        assert abs(value - mean) < 1e-12
    assert "decay 0.5" in _played("alternating", 1, averaging=0.5).notes["averaging"]
    with pytest.raises(ValueError, match="averaging: expected a finite number of at least 0 and below 1, got 1"):
        Adversarial(averaging=1.0)
