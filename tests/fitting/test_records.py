"""The history of a run: what is given comes back, and long runs do not grow."""

from __future__ import annotations

import random
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch

import ppl_gen as pg
from ppl_gen.fitting.records import RECENT, Column, Records
from ppl_gen.inference import SVI


def values(count: int) -> list:
    """Numbers of Python and tensors of several dtypes, in runs of random lengths."""
    chooser, found = random.Random(0), []
    makers = (
        float,
        lambda v: torch.tensor(v),
        lambda v: torch.tensor(v, dtype=torch.float64),
        lambda v: torch.tensor(int(v)),
    )
    while len(found) < count:
        maker = chooser.choice(makers)
        found += [maker(chooser.gauss(0.0, 10.0)) for _ in range(chooser.randint(1, 90))]
    return found[:count]


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and bool(one == other)
    return not isinstance(other, torch.Tensor) and one == other


@pytest.mark.parametrize("count", [0, 1, RECENT, 2 * RECENT - 1, 2 * RECENT, 733])
def test_a_column_gives_back_what_it_was_given(count) -> None:
    given, column = values(count), Column()
    for value in given:
        column.append(value)
    assert len(column) == count and all(map(same, given, column)) and len(column.recent) < 2 * RECENT
    assert all(map(same, given[-70:], column[-70:])) and all(map(same, given[1:500:7], column[1:500:7]))
    assert column.numbers().tolist() == [float(value) for value in given]
    assert sum(count for count, _ in column.kinds()) == count
    with pytest.raises(IndexError):
        column[count]


@pytest.mark.parametrize("length", [0, 1, 49, 50, 51, 399, 640, 732, 733, 900])
def test_a_column_is_cut_and_goes_on(length) -> None:
    given, column = values(733), Column()
    for value in given:
        column.append(value)
    column.cut(length)
    kept = given[:length]
    assert len(column) == len(kept) and all(map(same, kept, column))
    for value in given[:200]:
        column.append(value)
    assert all(map(same, kept + given[:200], column))


def test_records_go_through_a_checkpoint() -> None:
    records, other = Records(), Records()
    for step, value in enumerate(values(300)):
        records.append({"a": value} if step < 120 else {"a": value, "b": 2.0 * value})
    other.load_state_dict(records.state_dict())
    for name in ("a", "b"):
        assert all(
            same(x, y) or (x != x and y != y) for x, y in zip(records.values[name], other.values[name], strict=True)
        )
    assert str(other.floats()) == str(records.floats()) and str(other.state_dict()) == str(records.state_dict())


def memory() -> int:
    """Pages that this process holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells what a process holds")
def test_a_long_run_on_large_batches_does_not_grow() -> None:
    """Kept as tensors, the records of each step hold one tensor of the size of a batch: 500 steps of 0.4 MB, 200 MB."""

    def model(x):
        loc = pyro.param("loc", torch.zeros(1000))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    x, seen = torch.randn(100, 1000, generator=torch.Generator().manual_seed(0)), []
    pg.fit(
        model,
        x,
        SVI(steps=600),
        seed=0,
        progress=False,
        callbacks=[lambda step, info: seen.append(memory())],
        compile=False,
    )
    assert (seen[-1] - seen[100]) * 4096 < 50e6
