"""What one training step costs, beside the same step written by hand: a VAE, importance weighting, many small sites.

.venv/bin/python benchmarks/steps.py

NumPyro takes part where it is installed. Blocks of each kind take turns, so that what else the machine does falls on
all of them; a figure is the median of its blocks, and the quartiles say how far to trust it. Writes
`results/steps.md`. `--quick` runs two short blocks and writes nothing.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI as PyroSVI
from pyro.infer import RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from timing import Ends, Result, alternate, run
from torch import Tensor, nn
from torch.nn import functional

import ppl_gen as pg
from ppl_gen.inference import IWAE, SVI

ROWS, PIXELS, HIDDEN, LATENT, BATCH = 12800, 784, 400, 20, 128
EAGER, COMPILED = "by hand, eager, default Adam", "by hand, torch.compile, fused Adam"
PYRO, GRAPH = "Pyro", "ppl_gen, graph"  # its SVI.step; for importance weighting its vectorised bound
Block = Callable[[int], float]  # so many steps; seconds per step


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.loc, self.log_scale = (
            nn.Linear(PIXELS, HIDDEN),
            nn.Linear(HIDDEN, LATENT),
            nn.Linear(HIDDEN, LATENT),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.hidden(x).relu()
        return self.loc(h), self.log_scale(h).exp()


def decoder() -> nn.Module:
    return nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, PIXELS))


def images() -> Tensor:
    return (torch.rand(ROWS, PIXELS, generator=torch.Generator().manual_seed(0)) < 0.2).float()


def program() -> pg.Program:
    """Model and guide as anyone writes them in Pyro; ppl_gen and Pyro run the same."""
    encode, decode = Encoder(), decoder()

    def model(x: Tensor) -> None:
        pyro.module("decode", decode)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT), x.new_ones(LATENT)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decode(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encode", encode)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(*encode(x)).to_event(1))

    return pg.Program(model, guide)


def batches(x: Tensor) -> Callable[[], Tensor]:
    order: list[Tensor] = []

    def following() -> Tensor:
        if not order:
            order.extend(torch.randperm(len(x)).split(BATCH))
        return x[order.pop()]

    return following


class Timed(Ends, SVI):
    """With the time of each step."""


def ours(made: Any, x: Tensor, path: str | bool, **settings: Any) -> Block:
    """Fits that go on from each other; what is recorded and compiled at first is not timed."""
    last: pg.Fit | None = None

    def block(steps: int) -> float:
        nonlocal last
        Timed.ends.clear()
        algorithm = Timed(steps=steps + 4, lr=1e-3, **settings)
        last = pg.fit(made, x, algorithm, seed=0, start=last, compile=path, progress=False)
        wanted = path or "eager"
        assert last.cost["path"] == wanted, last.cost
        return (Timed.ends[-1] - Timed.ends[3]) / steps

    return block


def pyros(made: Any, following: Callable[[], Tensor], elbo: Any) -> Block:
    with pyro.get_param_store().scope() as store:
        svi = PyroSVI(made.model, made.guide, pyro.optim.Adam({"lr": 1e-3}), elbo)
        svi.step(following())
        kept = store

    def block(steps: int) -> float:
        nonlocal kept
        with pyro.get_param_store().scope(kept) as store, pyro.validation_enabled(False):
            began = time.perf_counter()
            for _ in range(steps):
                svi.step(following())
            spent = time.perf_counter() - began
            kept = store
        return spent / steps

    return block


def loop(following: Callable[[], Tensor], loss: Callable[[Tensor], Tensor], adam: torch.optim.Optimizer) -> Block:
    """What everybody writes around a loss."""

    def block(steps: int) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            rows = following()
            adam.zero_grad()
            loss(rows).backward()
            adam.step()
        return (time.perf_counter() - began) / steps

    return block


def by_hand(x: Tensor, *, compiled: bool) -> Block:
    """The loop that a user of torch writes: the default Adam, or a compiled loss with the fused one."""
    encode, decode, following = Encoder(), decoder(), batches(x)

    def loss(rows: Tensor, noise: Tensor) -> Tensor:
        loc, scale = encode(rows)
        logits = decode(loc + scale * noise)
        nats = functional.binary_cross_entropy_with_logits(logits, rows, reduction="sum")
        kl = 0.5 * (loc.square() + scale.square() - 1).sum() - scale.log().sum()
        return (nats + kl) / len(rows)

    objective = torch.compile(loss) if compiled else loss
    params = [*encode.parameters(), *decode.parameters()]
    adam = torch.optim.Adam(params, lr=1e-3, fused=True if compiled else None)

    return loop(following, lambda rows: objective(rows, torch.randn(len(rows), LATENT)), adam)


WIDE, CODES = 200, 50  # of the networks of the importance-weighted bound


class WideEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(PIXELS, WIDE), nn.Tanh(), nn.Linear(WIDE, WIDE), nn.Tanh())
        self.loc, self.log_scale = nn.Linear(WIDE, CODES), nn.Linear(WIDE, CODES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        return self.loc(h), self.log_scale(h).exp()


def wide_decoder() -> nn.Module:
    return nn.Sequential(nn.Linear(CODES, WIDE), nn.Tanh(), nn.Linear(WIDE, WIDE), nn.Tanh(), nn.Linear(WIDE, PIXELS))


def weighted(x: Tensor, particles: int) -> dict[str, Block]:
    """The importance-weighted bound (Burda et al. 2016): ours, by hand and compiled, and Pyro's vectorised one."""
    encode, decode, following = WideEncoder(), wide_decoder(), batches(x)

    def loss(rows: Tensor, noise: Tensor) -> Tensor:
        loc, scale = encode(rows)
        z = loc + scale * noise
        logits = decode(z)
        nats = -functional.binary_cross_entropy_with_logits(logits, rows.expand_as(logits), reduction="none").sum(-1)
        log_weights = nats + (0.5 * (noise.square() - z.square()) + scale.log()).sum(-1)
        return -(torch.logsumexp(log_weights, 0) - math.log(particles)).mean()

    objective, params = torch.compile(loss), [*encode.parameters(), *decode.parameters()]
    adam = torch.optim.Adam(params, lr=1e-3, fused=True)

    elbo = RenyiELBO(alpha=0, num_particles=particles, vectorize_particles=True, max_plate_nesting=1)
    if particles == 1:
        elbo = Trace_ELBO()
    return {
        "ppl_gen, inductor": ours(wide(), x, "inductor", objective=IWAE(particles=particles), batch_size=BATCH),
        GRAPH: ours(wide(), x, "graph", objective=IWAE(particles=particles), batch_size=BATCH),
        COMPILED: loop(following, lambda rows: objective(rows, torch.randn(particles, len(rows), CODES)), adam),
        PYRO: pyros(wide(), following, elbo),
    }


def wide() -> pg.Program:
    encode, decode = WideEncoder(), wide_decoder()

    def model(x: Tensor) -> None:
        pyro.module("decode", decode)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(CODES), x.new_ones(CODES)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decode(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encode", encode)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(*encode(x)).to_event(1))

    return pg.Program(model, guide)


def small(x: Tensor) -> None:
    """As many latent sites as there are numbers in x, each a scalar."""
    values = [pyro.sample(f"z{i}", dist.Normal(0.0, 1.0)) for i in range(len(x))]
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(torch.stack(values), 1.0), obs=x)


def sites() -> dict[str, Block]:
    x = torch.randn(100)
    return {
        "ppl_gen, inductor": ours(small, x, "inductor"),
        GRAPH: ours(small, x, "graph"),
        PYRO: pyros(pg.Program(small, AutoNormal(small)), lambda: x, Trace_ELBO()),
    }


def vae(x: Tensor) -> dict[str, Block]:
    found = {
        "ppl_gen, inductor": ours(program(), x, "inductor", batch_size=BATCH),
        GRAPH: ours(program(), x, "graph", batch_size=BATCH),
        "ppl_gen, compile=False": ours(program(), x, False, batch_size=BATCH),
        EAGER: by_hand(x, compiled=False),
        COMPILED: by_hand(x, compiled=True),
        PYRO: pyros(program(), batches(x), Trace_ELBO()),
    }
    if importlib.util.find_spec("numpyro") is not None:
        from numpyro_steps import scanned

        found["NumPyro"] = scanned(x.numpy(), HIDDEN, LATENT, BATCH)
    return found


def groups(x: Tensor) -> list[tuple[str, Callable[[], dict[str, Block]], dict[str, float], int]]:
    """Title, what is timed, the ratios aimed at, steps of a block."""
    weighing = {COMPILED: 0.9, PYRO: 0.55}
    return [
        (
            f"VAE {PIXELS}-{HIDDEN}-{LATENT}, step on {BATCH} rows",
            partial(vae, x),
            {EAGER: 0.72, COMPILED: 0.92, PYRO: 0.45, "NumPyro": 0.95},
            200,
        ),
        *(
            (f"IWAE, K = {k}, step on {BATCH} rows", partial(weighted, x, k), weighing, 15 if k == 50 else 60)
            for k in (1, 5, 50)
        ),
        ("100 latent sites, each a scalar, step", sites, {PYRO: 1 / 15}, 60),
    ]


def rows(quick: bool) -> list[Result]:
    """Every group, its kinds taking turns; and the graph alone beside the loop that is written by hand."""
    torch.manual_seed(0)
    found = []
    for title, make, targets, steps in groups(images()):
        blocks, steps = (2, 10) if quick else (7, steps)
        kinds = make()
        for block in kinds.values():
            block(max(5, steps // 10))  # what is compiled or made at first is not a step
        timed = alternate({name: partial(block, steps) for name, block in kinds.items()}, blocks, 1, warm=0)
        note = f"{blocks} blocks of {steps} steps of each kind; set-up, recording and compilation are left out."
        found.append(Result(title, timed, targets, note=note))
        if EAGER in timed:
            found.append(Result(f"{title}, graph", {name: timed[name] for name in (GRAPH, EAGER)}, {EAGER: 0.9}))
    return found


if __name__ == "__main__":
    run("steps", "What one training step costs", rows, __doc__)
