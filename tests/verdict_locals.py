r"""Verdicts on the latents of rows: z_i ~ Normal(0, 1), x_i ~ Normal(A z_i, s), whose posterior is a closed form.

.. math:: z_i \mid x_i \sim \mathrm{Normal}(C A^T x_i / s^2, C), \qquad C = (1 + A^T A / s^2)^{-1}
"""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal
from verdict_kit import UNTRAINED, Case, as_written, falling, source

import ppl_gen as pg
from ppl_gen.inference import SVI

NOISE = 0.7


def loading(size: int) -> torch.Tensor:
    """Neighbouring latents share an observation, so that their posterior is correlated."""
    return torch.eye(size) + 0.5 * torch.diag(torch.ones(size - 1), 1)


def linear(size: int, strength: float = 1.0):
    def program(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([size]).to_event(1))
            pyro.sample("x", dist.Normal(strength * z @ loading(size).T, NOISE).to_event(1), obs=x)

    return program


def drawn(size: int, n: int, strength: float = 1.0) -> Callable[[int], torch.Tensor]:
    def data(seed: int) -> torch.Tensor:
        z, e = (torch.randn(n, size, generator=source(seed + 100 * i)) for i in range(2))
        return strength * z @ loading(size).T + NOISE * e

    return data


def posterior(size: int, strength: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrix that turns a row into its posterior mean, and the Cholesky factor of the covariance."""
    a = strength * loading(size)
    covariance = torch.linalg.inv(torch.eye(size) + a.T @ a / NOISE**2)
    return covariance @ a.T / NOISE**2, torch.linalg.cholesky(covariance)


def moved(size: int, shift: float = 0.0, scale: float = 1.0, share: float = 1.0):
    """The exact posterior of each row, moved by ``shift`` sd and ``scale`` times as wide, in a share of the rows."""
    turn, tril = posterior(size)
    sd = tril.square().sum(1).sqrt()
    edge = dist.Normal(0.0, (loading(size)[0].square().sum() + NOISE**2).sqrt()).icdf(torch.tensor(1 - share))

    def guide(x):
        by = pyro.param("by", torch.tensor(shift))
        off = (x[:, :1] > edge).to(x.dtype) if share < 1 else torch.ones(len(x), 1)
        wide = (1 + off * (scale - 1))[..., None]
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(x @ turn.T + off * by * sd, scale_tril=wide * tril))

    return guide


def collapsed(size: int):
    """The prior, whatever the row."""

    def guide(x):
        loc = pyro.param("loc", torch.zeros(size))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc.expand(len(x), size), 1.0).to_event(1))

    return guide


def collapsed_fit(size: int, n: int, strength: float = 2.0) -> Callable[[int], pg.Fit]:
    return as_written(linear(size, strength), collapsed(size), drawn(size, n, strength))


def amortised(size: int, full: bool):
    """One linear map from rows to means and one covariance for all: the exact family where ``full``."""

    def guide(x):
        turn = pyro.param("turn", torch.zeros(size, size))
        tril = torch.eye(size)
        if full and size > 1:
            tril = tril + pyro.param("tril", torch.zeros(size, size)).tril(-1)
        sd = pyro.param("sd", torch.ones(size), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(x @ turn.T, scale_tril=sd[:, None] * tril))

    return guide


def learned(size: int, guide, steps: int, n: int, strength: float = 1.0, **settings) -> Callable[[int], pg.Fit]:
    algorithm = SVI(steps=steps, lr=0.03, schedule=falling(steps), **settings)
    program, data = linear(size, strength), drawn(size, n, strength)
    return lambda seed: pg.fit(pg.Program(program, guide), data(seed), algorithm, seed=seed)


def untrained_by_row(seed: int) -> pg.Fit:
    """As an autoguide begins: narrow, near the prior's centre, in every row."""
    return pg.fit(pg.Program(linear(1), AutoNormal), drawn(1, 40)(seed), UNTRAINED, seed=seed)


def faults(size: int) -> list[Case]:
    wrong = {
        "shifted by 1 sd": moved(size, shift=1.0),
        "scaled by 0.5": moved(size, scale=0.5),
        "scaled by 3": moved(size, scale=3.0),
        "shifted by 1.5 sd in 3 of 10 rows": moved(size, shift=1.5, share=0.3),
        "scaled by 0.4 in 3 of 10 rows": moved(size, scale=0.4, share=0.3),
    }
    return [
        Case(f"rows, {size}: {name}", as_written(linear(size), g, drawn(size, 300)), False) for name, g in wrong.items()
    ]


LOCALS = [
    *(Case(f"rows, {d}: exact", as_written(linear(d), moved(d), drawn(d, 300)), True) for d in (1, 3)),
    *faults(1),
    *faults(3),
    *(Case(f"rows, {d}: collapsed onto the prior", collapsed_fit(d, 300), False) for d in (1, 3)),
    Case("rows, 1: collapsed, little to learn", collapsed_fit(1, 300, 1.0), False),
    Case("rows, 1: collapsed, much to learn", collapsed_fit(1, 300, 20.0), False),
    Case("rows, 1: collapsed, a million rows", collapsed_fit(1, 1_000_000), False),
    Case("rows, 1: exact, a million rows", as_written(linear(1), moved(1), drawn(1, 1_000_000)), True),
    Case("rows, 1: amortised, trained", learned(1, amortised(1, False), 1500, 300), True),
    Case("rows, 3: amortised, trained", learned(3, amortised(3, True), 3000, 300), True),
    Case("rows, 3: amortised, 20 steps", learned(3, amortised(3, True), 20, 300), False),
    Case("rows, 1: normals by row, trained", learned(1, AutoNormal, 3000, 40), True),
    Case("rows, 1: normals by row, 20 steps", learned(1, AutoNormal, 20, 40), False),
    Case("rows, 1: normals by row, untrained", untrained_by_row, False),
]
