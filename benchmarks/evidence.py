"""Evidence by importance weighting beside the loop over chunks of particles that one writes by hand in torch.

.venv/bin/python benchmarks/evidence.py

The loop gives the mean alone; `fit.evidence` gives its error, effective draws of every row and k-hats of 200 rows too,
and these are part of its time. So is whatever it records and compiles. `--quick` takes few rows and particles.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from steps import LATENT, images, program
from timing import Result, alternate, run
from torch import Tensor, nn
from torch.nn import functional

import ppl_gen as pg
from ppl_gen.inference import SVI

OBSERVED, CODES = 10, 2
HELD = 4_000_000  # numbers of the largest tensor of a chunk, by hand


def small(loadings: Tensor) -> pg.Program:
    """Two latent numbers, ten observed ones, a linear guide."""
    encode = nn.Linear(OBSERVED, 2 * CODES)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(CODES), x.new_ones(CODES)).to_event(1))
            pyro.sample("x", dist.Normal(z @ loadings, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encode", encode)
        with pyro.plate("data", len(x)):
            loc, raw = encode(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, (0.1 * raw).exp()).to_event(1))

    return pg.Program(model, guide)


def _log_normal(value: Tensor, loc: Any, scale: Any) -> Tensor:
    return -0.5 * ((value - loc) / scale).square() - torch.as_tensor(scale).log() - 0.5 * math.log(2 * math.pi)


def by_hand(
    x: Tensor,
    proposal: Callable[[Tensor], tuple[Tensor, Tensor]],
    likelihood: Callable[[Tensor, Tensor], Tensor],
    particles: int,
) -> Callable[[], object]:
    """Rows 100 at a time, as many particles as `HELD` numbers allow; the evidence of each, in nats."""

    def evidence() -> Tensor:
        found = []
        with torch.no_grad():
            for part in x.split(100):
                loc, scale = proposal(part)
                most, weights = max(1, HELD // part.numel()), []
                for first in range(0, particles, most):
                    count = min(most, particles - first)
                    z = loc + scale * torch.randn(count, *loc.shape)
                    logs = likelihood(z, part) + (_log_normal(z, 0.0, 1.0) - _log_normal(z, loc, scale)).sum(-1)
                    weights.append(logs)
                found.append(torch.logsumexp(torch.cat(weights), 0) - math.log(particles))
        return torch.cat(found)

    return evidence


def rows(quick: bool) -> list[Result]:
    """K = 5000 on 1000 rows: a VAE with a small decoder, and a small latent program."""
    torch.manual_seed(0)
    count, particles, blocks = (100, 100, 2) if quick else (1000, 5000, 3)
    return [_vae(count, particles, blocks), _small(count, particles, blocks)]


def _vae(count: int, particles: int, blocks: int) -> Result:
    x = images()[:count]
    fit = pg.fit(program(), x, SVI(steps=5, lr=1e-4), seed=0, progress=False)
    encode, decode = fit.module("encode"), fit.module("decode")

    def likelihood(z: Tensor, part: Tensor) -> Tensor:
        logits = decode(z)
        return -functional.binary_cross_entropy_with_logits(logits, part.expand_as(logits), reduction="none").sum(-1)

    kinds = {
        "ppl_gen, fit.evidence": lambda: fit.evidence(particles=particles, seed=0),
        "by hand, chunks": by_hand(x, encode, likelihood, particles),
    }
    title = f"Evidence of a VAE 784-400-{LATENT}, {count} rows, K = {particles}"
    return Result(title, alternate(kinds, blocks, 1), {"by hand, chunks": 1.0})


def _small(count: int, particles: int, blocks: int) -> Result:
    loadings, x = torch.randn(CODES, OBSERVED), torch.randn(count, OBSERVED)
    fit = pg.fit(small(loadings), x, SVI(steps=5, lr=1e-4), seed=0, progress=False)
    encode = fit.module("encode")

    def proposal(part: Tensor) -> tuple[Tensor, Tensor]:
        loc, raw = encode(part).chunk(2, -1)
        return loc, (0.1 * raw).exp()

    def likelihood(z: Tensor, part: Tensor) -> Tensor:
        return _log_normal(part, z @ loadings, 1.0).sum(-1)

    kinds = {
        "ppl_gen, fit.evidence": lambda: fit.evidence(particles=particles, seed=0),
        "by hand, chunks": by_hand(x, proposal, likelihood, particles),
    }
    title = f"Evidence, {CODES} latent and {OBSERVED} observed numbers, {count} rows, K = {particles}"
    return Result(title, alternate(kinds, blocks, 1), {"by hand, chunks": 1.0})


if __name__ == "__main__":
    run("evidence", "What evidence by importance weighting costs", rows, __doc__)
