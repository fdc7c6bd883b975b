"""What one training step costs, beside the same step written by hand: a VAE 784-400-20 on batches of 128 rows.

OMP_NUM_THREADS=1 .venv/bin/python benchmarks/steps.py

Blocks of each kind take turns, so that what else the machine does falls on all of them; a figure is the median of its
blocks, and the quartiles say how far to trust it. Writes `results/steps.md`. `--quick` runs two short blocks and writes
nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI as PyroSVI
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.nn import functional
from versions import table, write

import ppl_gen as pg
from ppl_gen.inference import SVI

ROWS, PIXELS, HIDDEN, LATENT, BATCH = 12800, 784, 400, 20, 128
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


def rows() -> Tensor:
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


def ours(x: Tensor) -> Block:
    """Fits that go on from each other; a block is timed from its first step's end to its last's."""
    made, last = program(), None

    def block(steps: int) -> float:
        nonlocal last
        ends: list[float] = []
        callbacks = [lambda step, info: ends.append(time.perf_counter())]
        algorithm = SVI(steps=steps + 1, batch_size=BATCH, lr=1e-3)
        last = pg.fit(made, x, algorithm, seed=0, start=last, callbacks=callbacks, progress=False)
        return (ends[-1] - ends[0]) / steps

    return block


def pyros(x: Tensor, elbo: Trace_ELBO) -> Block:
    made, following = program(), batches(x)
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

    def block(steps: int) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            batch = following()
            adam.zero_grad()
            objective(batch, torch.randn(len(batch), LATENT)).backward()
            adam.step()
        return (time.perf_counter() - began) / steps

    return block


def measured(blocks: dict[str, Block], repeats: int, steps: int) -> dict[str, list[float]]:
    """Milliseconds per step of every block of each kind, the kinds taking turns."""
    found: dict[str, list[float]] = {name: [] for name in blocks}
    for block in blocks.values():
        block(max(5, steps // 10))  # what is compiled or made at first is not a step
    for _ in range(repeats):
        for name, block in blocks.items():
            found[name].append(1000 * block(steps))
    return found


def shown(found: dict[str, list[float]], first: str) -> str:
    """A table: medians, quartiles, and the first kind's median in units of each."""
    own, lines = statistics.median(found[first]), []
    for name, values in found.items():
        low, middle, high = statistics.quantiles(values, n=4)
        lines.append([name, f"{middle:.3f}", f"{low:.3f} to {high:.3f}", f"{own / middle:.2f}"])
    return table(["step", "ms, median", "quartiles", "ppl_gen's, in units of it"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two short blocks of each kind; nothing is written")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    x = rows()
    blocks = {
        "ppl_gen, SVI(ELBO())": ours(x),
        "by hand, eager, default Adam": by_hand(x, compiled=False),
        "by hand, torch.compile, fused Adam": by_hand(x, compiled=True),
        "Pyro, SVI.step, Trace_ELBO": pyros(x, Trace_ELBO()),
        "Pyro, SVI.step, TraceMeanField_ELBO": pyros(x, TraceMeanField_ELBO()),
    }
    began = time.perf_counter()
    repeats, steps = (2, 20) if quick else (15, 100)
    body = shown(measured(blocks, repeats, steps), next(iter(blocks)))
    if quick:
        print(body)
        return
    about = (
        f"A VAE {PIXELS}-{HIDDEN}-{LATENT} on batches of {BATCH} rows: {repeats} blocks of {steps} steps of each kind, "
        "taking turns. Set-up and compilation are left out."
    )
    write("steps", "What one training step costs", f"{about}\n\n{body}", time.perf_counter() - began)


if __name__ == "__main__":
    main()
