"""What several processes draw: rows their share of one draw, globals the same; all in one process, one after another."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

from ppl_gen.handlers.rank_noise import RankNoise
from ppl_gen.runtime.ranks import Ranks, Share
from ppl_gen.workspace.streams import Streams

ROWS = 7


class _One(Ranks):
    """One of several processes, of which only the numbers are asked."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world


def law(kind: str, rows: int, first: int) -> Any:
    """A distribution whose parameters differ from row to row: those of rows ``first`` and on."""
    at = (torch.arange(rows) + first).float().unsqueeze(-1)
    wide = at + torch.arange(3.0)
    return {
        "normal": dist.Normal(wide, 1.0 + wide).to_event(1),
        "one number": dist.Normal(at.squeeze(-1), 2.0),
        "laplace": dist.Laplace(wide, 1.0).to_event(1),
        "uniform": dist.Uniform(wide, wide + 1.0).to_event(1),
        "exponential": dist.Exponential(wide + 1.0).to_event(1),
        "cauchy": dist.Cauchy(wide, 1.0).to_event(1),
        "log normal": dist.LogNormal(wide, 1.0).to_event(1),
        "multivariate": dist.MultivariateNormal(wide, torch.eye(3)),
        "low rank": dist.LowRankMultivariateNormal(wide, torch.ones(3, 2), torch.ones(3)),
        "bernoulli": dist.Bernoulli((at + 1.0) / (ROWS + 2) * torch.ones(3)).to_event(1),
        "categorical": dist.Categorical((wide + 1.0) / (wide + 1.0).sum(-1, keepdim=True)),
        "gamma": dist.Gamma(wide + 1.0, 1.0).to_event(1),
    }[kind]


def drawn(kind: str, rank: int, world: int, *, deeper: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A global before and after the draw of one process's rows, and that draw."""
    share = _One(rank, world).share(ROWS)
    streams = Streams(5, rank, None)
    torch.manual_seed(0)
    with streams.own(3), RankNoise("data", share, streams):
        before = pyro.sample("before", dist.Normal(0.0, 1.0))
        fn = law(kind, share.count, 0 if kind == "gamma" else share.first)
        if deeper:
            with pyro.plate("data", share.count, dim=-2), pyro.plate("inside", 4, dim=-1):
                value = pyro.sample("z", dist.Normal(fn.mean.unsqueeze(-1), 1.0))
        else:
            with pyro.plate("data", share.count):
                value = pyro.sample("z", fn)
        after = pyro.sample("after", dist.Normal(0.0, 1.0))
    return before, value, after


SLICED = [
    "normal",
    "one number",
    "laplace",
    "uniform",
    "exponential",
    "cauchy",
    "log normal",
    "multivariate",
    "low rank",
    "bernoulli",
    "categorical",
]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("kind", SLICED)
def test_the_processes_draw_the_rows_of_one_draw(kind: str, world: int) -> None:
    torch.manual_seed(0)
    before = pyro.sample("before", dist.Normal(0.0, 1.0))
    with pyro.plate("data", ROWS):
        whole = pyro.sample("z", law(kind, ROWS, 0))
    after = pyro.sample("after", dist.Normal(0.0, 1.0))
    parts = [drawn(kind, rank, world) for rank in range(world)]
    assert torch.equal(torch.cat([part[1] for part in parts]), whole)
    for part in parts:
        assert torch.equal(part[0], before) and torch.equal(part[2], after)  # as one process would


def test_a_plate_inside_of_that_of_the_rows_is_drawn_whole() -> None:
    torch.manual_seed(0)
    pyro.sample("before", dist.Normal(0.0, 1.0))
    with pyro.plate("data", ROWS, dim=-2), pyro.plate("inside", 4, dim=-1):
        whole = pyro.sample("z", dist.Normal(law("one number", ROWS, 0).mean.unsqueeze(-1), 1.0))
    parts = [drawn("one number", rank, 2, deeper=True)[1] for rank in (0, 1)]
    assert torch.equal(torch.cat(parts), whole)


def test_draws_that_reject_are_each_process_s_own_and_leave_globals_common() -> None:
    first, second = (drawn("gamma", rank, 2) for rank in (0, 1))
    count = min(len(first[1]), len(second[1]))
    assert not bool((first[1][:count] == second[1][:count]).any())  # of one law, and other numbers
    assert torch.equal(first[0], second[0]) and torch.equal(first[2], second[2])


def test_every_update_has_noise_of_its_own_and_the_common_stream_stands_where_it_stood() -> None:
    streams = Streams(5, 1, None)
    torch.manual_seed(0)
    with streams.own(0):
        first = torch.rand(3)
    with streams.own(1):
        second = torch.rand(3)
    with streams.own(0):
        again = torch.rand(3)
    assert torch.equal(first, again) and not torch.equal(first, second)
    after = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(3))


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_shares_part_the_rows_and_their_weights_add_up_to_one(rows: int, world: int) -> None:
    shares = [_One(rank, world).share(rows) for rank in range(world)]
    held = [row for share in shares if share.weight for row in range(share.first, share.first + share.count)]
    assert held == list(range(rows))
    assert sum(share.weight for share in shares) == pytest.approx(1.0)  # of at most 8 floats near one
    assert all(share.count >= 1 for share in shares)
    assert Share(0, 1, rows, 0.0) in shares or world <= rows
