"""Small flows, fitted once for all tests that look at them, and the rows they are fitted to."""

from __future__ import annotations

import functools

import pyro.distributions as dist
import torch

import ppl_gen as pg
from ppl_gen.inference import SVI
from ppl_gen.models import affine_flow, glow, iaf, maf, naf, nice, real_nvp, spline_flow

Z = 5.5
RECIPES = {
    "affine_flow": lambda d: affine_flow(d),
    "real_nvp": lambda d: real_nvp(d, layers=3, hidden=(16,)),
    "maf": lambda d: maf(d, layers=2, hidden=(16,)),
    "iaf": lambda d: iaf(d, layers=2, hidden=(16,)),
    "spline_flow": lambda d: spline_flow(d, layers=3, hidden=(16,), bins=5),
    "nice": lambda d: nice(d, layers=3, hidden=(16,), prior="normal"),
    "naf": lambda d: naf(d, layers=2, hidden=(16,), units=4),
    "glow": lambda d: glow(d, steps=2, channels=12),
}
#: Those that start at independent normals.
PLAIN = [name for name in RECIPES if name not in ("naf", "glow")]
STILL = SVI(steps=1, lr=1e-30)


def bent(rows, features, dtype=torch.float64):
    """A curved cloud, far from normal: each column follows a wave of the one before."""
    noise = torch.randn(rows, features, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    columns = [noise[:, 0]]
    for i in range(1, features):
        columns.append(1.5 * (1.5 * columns[-1]).cos() + 0.3 * noise[:, i])
    return (1.0 + 2.0 * torch.stack(columns, 1)).to(dtype)


def mean_log_normal(x):
    """Evidence of independent normals with the moments of the columns."""
    return float(dist.Normal(x.mean(0), x.std(0, correction=0)).to_event(1).log_prob(x).mean())


def fitted(name, features=3, steps=500):
    return _fitted(name, features, steps)


@functools.cache
def _fitted(name, features, steps):
    algorithm = SVI(steps=steps, lr=5e-3) if steps else STILL
    return pg.fit(RECIPES[name](features), bent(800, features), algorithm, seed=0)


def shaken(flow, by=0.15):
    """A flow with random weights: one that has not been trained is the identity, where little can go wrong."""
    with torch.no_grad():
        for value in flow.parameters():
            value.add_(by * torch.randn_like(value))
    return flow


def flow_of(name, state, features=3, steps=500):
    flow = fitted(name, features, steps if state == "trained" else 0).module("flow")
    return shaken(flow) if state == "random" else flow
