"""Adversarial examples: the distance to the hyperplane, a network, an encoder."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from ppl_gen.looking import adversarial_example


def _linear(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(6, 3).double()


def test_of_a_linear_classifier_it_is_the_foot_of_the_perpendicular() -> None:
    line, x = _linear().requires_grad_(False), torch.rand(4, 6, dtype=torch.float64)
    scores = line(x)
    target = scores.argsort(1)[:, 1]  # the second best
    found = adversarial_example(line, x, target, low=None, high=None)
    assert bool(found.fooled.all())
    for row in range(4):
        # Over all rivals: the target has to beat the best; the plane against it bounds the distance from below.
        rival = scores[row].argmax()
        normal = line.weight[rival] - line.weight[target[row]]
        gap = scores[row, rival] - scores[row, target[row]]
        distance = float(gap / normal.norm())
        assert float(found.norm[row]) >= distance * (1 - 1e-6)
    assert torch.equal(found.x, x + found.change) or torch.allclose(found.x, x + found.change, atol=1e-15)
    assert torch.equal(line(found.x).argmax(1), target)


@pytest.mark.parametrize("bounded", [False, True])
def test_of_logistic_regression_it_is_the_distance_to_the_hyperplane(bounded: bool) -> None:
    odds = nn.Linear(6, 1).double().requires_grad_(False)
    torch.manual_seed(1)
    odds.weight.data = torch.randn(1, 6, dtype=torch.float64)
    x = 0.4 + 0.2 * torch.rand(5, 6, dtype=torch.float64)
    odds.bias.data = -(x @ odds.weight.T).mean(0) + 0.3
    target = (odds(x)[:, 0] <= 0).long()
    box = (0.0, 1.0) if bounded else (None, None)
    found = adversarial_example(odds, x, target, low=box[0], high=box[1])
    distance = odds(x)[:, 0].abs() / odds.weight.norm()
    assert bool(found.fooled.all())
    # The change is drawn back to 2 ** -12 of itself. Inside of the box the answer is the same.
    assert torch.allclose(found.norm, distance, rtol=1e-3), (found.norm / distance).tolist()
    unit = odds.weight / odds.weight.norm()
    along = (found.change @ unit.T)[:, 0].abs() / found.norm
    assert bool((along > 0.999).all()), "at right angles to the plane"


def test_in_a_box_it_is_the_nearest_point_of_the_plane_inside_of_it() -> None:
    odds = nn.Linear(2, 1).double()
    odds.weight.data, odds.bias.data = torch.tensor([[2.0, 1.0]]).double(), torch.tensor([-2.5]).double()
    # From (0.9, 0.2) the foot on 2 a + b = 2.5 is (1.1, 0.3), outside; inside of the box the nearest is (1, 0.5).
    found = adversarial_example(odds, torch.tensor([[0.9, 0.2]]).double(), 1)
    assert bool(found.fooled[0]) and torch.allclose(found.x, torch.tensor([[1.0, 0.5]]).double(), atol=5e-3)


def test_what_is_there_already_stays_and_what_cannot_be_reached_says_so() -> None:
    odds = nn.Linear(2, 1)
    odds.weight.data, odds.bias.data = torch.tensor([[1.0, 1.0]]), torch.tensor([-1.0])
    found = adversarial_example(odds, torch.tensor([[0.9, 0.9], [0.4, 0.4]]), 1)
    assert found.norm[0] == 0 and bool(found.fooled.all()) and found.c[0] == math.inf
    odds.bias.data.fill_(-3.0)  # 1 is nowhere in the box
    never = adversarial_example(odds, torch.tensor([[0.4, 0.4]]), 1)
    assert not never.fooled[0] and never.c.isnan().all() and "0 of 1 fool" in repr(never)


def test_one_weight_minimises_what_it_says() -> None:
    line, x = _linear(), torch.rand(2, 6, dtype=torch.float64)
    for c in (0.05, 0.3):
        target = line(x).argmin(1)
        found = adversarial_example(line, x, target, c=c, low=None, high=None)

        def loss(r: torch.Tensor, c: float = c, target: torch.Tensor = target) -> torch.Tensor:
            said = functional.cross_entropy(line(x + r), target, reduction="none")
            return c * r.norm(dim=1) + said

        with torch.no_grad():
            best = loss(found.change)
            for _ in range(200):
                other = found.change + 0.05 * torch.randn_like(x)
                # The loss is convex, so no other change is better; 1e-6 is where L-BFGS-B stops.
                assert bool((loss(other) >= best - 1e-6).all())


def test_an_encoder_is_led_to_the_code_of_another_row() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    x = torch.rand(6, 12, dtype=torch.float64)
    wanted = net(x).detach().flip(0)
    before = (net(x) - wanted).norm(dim=1)
    found = adversarial_example(net, x, wanted, within=0.2)
    after = (net(found.x) - wanted).norm(dim=1)
    reached = found.fooled
    assert int(reached.sum()) >= 4 and bool((after[reached] <= 0.2 * before[reached] + 1e-9).all())
    assert bool((before > 0).all()), "none was there before"
    apart = (x - x.flip(0)).norm(dim=1)
    assert bool((found.norm[reached] < apart[reached]).all()), "nearer than the row whose code it has"
    assert bool(((found.x >= 0) & (found.x <= 1)).all())
