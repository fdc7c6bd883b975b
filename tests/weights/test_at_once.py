"""Several draws of a program in one run: only where each comes to what it comes to alone, and nothing stays behind."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.nn import functional

from ppl_gen.weights.at_once import at_once, can_go_at_once

WEIGHT = torch.tensor([0.5, 2.0, 1.0])


@pytest.mark.parametrize(
    "drawn",
    [
        lambda: torch.randn(4),
        lambda: torch.normal(torch.randn(4), torch.ones(4)),
        lambda: torch.empty(4).normal_().exp(),
        lambda: torch.softmax(torch.randn(3, 2) @ torch.randn(2, 3), dim=1),  # dims are counted without the runs
        lambda: dist.Gamma(WEIGHT, 1.0).rsample(),
        lambda: dist.Laplace(torch.zeros(3), WEIGHT).rsample(),
        lambda: dist.Exponential(WEIGHT).rsample(),
        lambda: dist.Poisson(WEIGHT).sample(),
        lambda: dist.Categorical(WEIGHT.expand(5, 3)).sample(),
        lambda: dist.Bernoulli(0.3 * torch.ones(4)).sample(),
        lambda: functional.dropout(WEIGHT, 0.5),
        lambda: functional.conv1d(torch.randn(2, 1, 8), torch.ones(1, 1, 3)),
        lambda: torch.linalg.cholesky(torch.eye(2) + torch.rand(2, 1).square() @ torch.ones(1, 2)).sum(),
    ],
)
def test_draws_go_at_once_and_are_independent(drawn: Any) -> None:
    assert can_go_at_once(drawn, [])
    torch.manual_seed(0)
    found = at_once(drawn, 400).double()
    alone = torch.stack([drawn() for _ in range(400)]).double()
    assert found.shape == alone.shape
    # Means of 400 draws, at most 15 of each kind: 6 errors are 2e-9 each (heavy tails and few counts: below 1e-6).
    error = (found.var(0) + alone.var(0)).div(400).sqrt()
    assert bool(((found.mean(0) - alone.mean(0)).abs() < 6 * error).all())
    assert bool((found.var(0) > 0).all()), "every run has random numbers of its own"


def test_what_reads_numbers_is_run_one_by_one() -> None:
    refused = [
        lambda: torch.tensor(torch.randn(()).item()),
        lambda: torch.randn(2) if bool(torch.randn(()) > 0) else torch.zeros(2),
        lambda: torch.as_tensor(torch.randn(3).numpy()),
        lambda: torch.randn(3)[torch.randn(3) > 0].sum(),
        lambda: torch.randperm(5)[:2],  # three draws of it, where a run alone has one
    ]
    assert [can_go_at_once(one, []) for one in refused] == [False] * len(refused)


def test_what_is_drawn_elsewhere_would_be_shared_and_is_not() -> None:
    for one in (lambda: torch.randn(2) * random.random(), lambda: torch.randn(2) * np.random.rand()):
        assert not can_go_at_once(one, [one])
    own = torch.Generator().manual_seed(0)
    kept = own.get_state()

    def generated() -> torch.Tensor:
        return torch.randn(2, generator=own)

    assert not can_go_at_once(generated, [generated])
    assert torch.equal(own.get_state(), kept), "a look changes nothing"


def test_what_stays_behind_would_move_once_and_not_once_a_run() -> None:
    calls: list[int] = []
    running = torch.zeros(())

    class Remembers(nn.Module):
        def forward(self, z: torch.Tensor) -> torch.Tensor:
            self.last = z
            return z

    norm, remembers = nn.BatchNorm1d(3), Remembers()

    def counting() -> torch.Tensor:
        calls.append(1)
        return torch.randn(2) / len(calls)

    def writing() -> torch.Tensor:
        running.mul_(0.9).add_(0.1)
        return torch.randn(2) * running

    def normed() -> torch.Tensor:
        return norm(WEIGHT.expand(4, 3)).sum() + torch.randn(())

    def kept() -> torch.Tensor:
        return remembers(torch.randn(2))

    before = {name: value.clone() for name, value in norm.state_dict().items()}
    for one in (counting, writing, normed, kept):
        assert not can_go_at_once(one, [one]), one.__name__
    assert calls == [] and float(running) == 0.0
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    assert not hasattr(remembers, "last")
    norm.eval()
    assert can_go_at_once(normed, [normed]), "it writes nothing now"


def test_a_plates_own_choice_of_rows_is_made_run_by_run() -> None:
    def program() -> torch.Tensor:
        with pyro.plate("rows", 6, subsample_size=2) as chosen:
            return torch.arange(6.0)[chosen]

    assert not can_go_at_once(program, [program])


def test_looking_draws_nothing() -> None:
    torch.manual_seed(3)
    expected = torch.randn(2)
    torch.manual_seed(3)
    assert can_go_at_once(lambda: torch.randn(4), [])
    assert torch.equal(torch.randn(2), expected)
