"""Errors of a dry run say after which site the program failed."""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import ppl_gen as pg

X = torch.arange(5.0)
FAULTS: dict[str, Callable[[Tensor], object]] = {
    "not a number": lambda z: dist.Normal(z * torch.nan, 1.0),
    "constraint": lambda z: dist.Normal(z, -torch.ones(5)),
    "simplex": lambda z: dist.Categorical(torch.tensor([-1.0, 2.0])),
    "cholesky": lambda z: torch.linalg.cholesky(-torch.eye(2)),
    "positive definite": lambda z: dist.MultivariateNormal(torch.zeros(2), -torch.eye(2)),
    "matmul": lambda z: torch.ones(2, 3) @ torch.ones(2, 3),
    "cat": lambda z: torch.cat([torch.ones(2, 2), torch.ones(3, 3)], 0),
    "view": lambda z: torch.ones(6).view(4, 2),
    "broadcast": lambda z: torch.ones(2) + torch.ones(3),
    "index": lambda z: torch.ones(2)[torch.tensor(7)],
    "attribute": lambda z: z.nothing,
}


def told(model: Callable[..., object], data: Tensor = X) -> str:
    with pytest.raises((ValueError, RuntimeError, TypeError, IndexError, AttributeError)) as caught:
        pg.check(model, data)
    return "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])


@pytest.mark.parametrize("fault", FAULTS)
def test_the_last_site_is_named(fault: str) -> None:
    def model(x: Tensor) -> None:
        pyro.sample("first", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        FAULTS[fault](z)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def at_once(x: Tensor) -> None:
        FAULTS[fault](torch.tensor(0.5))
        model(x)

    assert "failed on a dry run (after site 'z', before the next)" in told(model)
    assert "failed on a dry run (before the first site)" in told(at_once)


def test_plates_that_collide_are_found_after_a_site() -> None:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), dim=-1), pyro.plate("other", 3, dim=-1):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    assert "site 'z', before the next)" in told(model) or "at site 'x'" in told(model)


def test_an_error_that_names_its_site_is_left_alone() -> None:
    def outside(x: Tensor) -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def impossible(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Exponential(1.0), obs=x)
            pyro.sample("z", dist.Normal(0.0, 1.0))

    assert "dry run: at site 'x'" in told(outside)
    assert "'z'" not in told(impossible, X - 2)
