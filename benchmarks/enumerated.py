"""What a step over enumerated latents costs, beside the step by hand and Pyro's: a mixture, and M2 on the digits.

.venv/bin/python benchmarks/enumerated.py

Blocks of each kind take turns. `--quick` runs two short blocks and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer import TraceEnum_ELBO, config_enumerate
from steps import Block as Steps
from steps import loop, ours, pyros
from timing import Result, alternate, run
from torch import Tensor, nn
from torch.nn import functional

import ppl_gen as pg

K, COLUMNS, BATCH = 10, 20, 1000
CLASSES, STYLE, HIDDEN, PIXELS, FEW = 10, 10, 200, 64, 100


def following(x: Tensor, size: int) -> Callable[[], Tensor]:
    order: list[Tensor] = []

    def batch() -> Tensor:
        if not order:
            order.extend(torch.randperm(len(x)).split(size)[:-1])
        return x[order.pop()]

    return batch


def mixture(x: Tensor) -> None:
    """Full covariances; all parameters by gradients."""
    weights = pyro.param("weights", torch.ones(K) / K, constraint=constraints.simplex)
    loc = pyro.param("loc", lambda: torch.randn(K, COLUMNS))
    tril = pyro.param("tril", torch.eye(COLUMNS).repeat(K, 1, 1), constraint=constraints.lower_cholesky)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.MultivariateNormal(loc[z], scale_tril=tril[z]), obs=x)


def nothing(x: Tensor) -> None:
    """A guide without latents."""


def mixture_by_hand(x: Tensor) -> Steps:
    """The marginal likelihood, as one writes it in torch."""
    logits, loc = torch.zeros(K, requires_grad=True), torch.randn(K, COLUMNS, requires_grad=True)
    tril = torch.eye(COLUMNS).repeat(K, 1, 1).requires_grad_()

    def loss(rows: Tensor) -> Tensor:
        normal = torch.distributions.MultivariateNormal(loc, scale_tril=tril.tril(), validate_args=False)
        return -(normal.log_prob(rows[:, None]) + logits.log_softmax(-1)).logsumexp(-1).mean()

    return loop(following(x, BATCH), loss, torch.optim.Adam([logits, loc, tril], lr=1e-3))


class Networks(nn.Module):
    """Of M2: labels from pixels, styles from pixels and labels, pixels from labels and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.classify = nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))
        self.encode = nn.Sequential(nn.Linear(PIXELS + CLASSES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2 * STYLE))
        self.decode = nn.Sequential(nn.Linear(STYLE + CLASSES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, PIXELS))

    def style(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """``y``: one-hot, any dimensions in front."""
        shape = torch.broadcast_shapes(x.shape[:-1], y.shape[:-1])
        both = torch.cat([x.expand(*shape, PIXELS), y.expand(*shape, CLASSES)], -1)
        loc, log_scale = self.encode(both).chunk(2, -1)
        return loc, log_scale.exp()

    def pixels(self, z: Tensor, y: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(z.shape[:-1], y.shape[:-1])
        return self.decode(torch.cat([z.expand(*shape, STYLE), y.expand(*shape, CLASSES)], -1))


def m2() -> pg.Program:
    """Unlabelled rows, y enumerated."""
    nets = Networks()
    one_hot = torch.eye(CLASSES)

    def model(x: Tensor) -> None:
        pyro.module("nets", nets)
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.ones(CLASSES) / CLASSES))
            z = pyro.sample("z", dist.Normal(torch.zeros(STYLE), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=nets.pixels(z, one_hot[y])).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("nets", nets)
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=nets.classify(x)))
            pyro.sample("z", dist.Normal(*nets.style(x, one_hot[y])).to_event(1))

    return pg.Program(model, config_enumerate(guide, default="parallel"))


def m2_by_hand(x: Tensor) -> Steps:
    nets, one_hot = Networks(), torch.eye(CLASSES)[:, None]

    def loss(rows: Tensor) -> Tensor:
        log_q = nets.classify(rows).log_softmax(-1)
        y = one_hot.expand(-1, len(rows), -1)
        loc, scale = nets.style(rows, y)
        z = loc + scale * torch.randn_like(loc)
        logits = nets.pixels(z, y)
        nats = functional.binary_cross_entropy_with_logits(logits, rows.expand_as(logits), reduction="none").sum(-1)
        kl = (0.5 * (loc.square() + scale.square() - 1) - scale.log()).sum(-1)
        q = log_q.exp()
        return ((q.T * (nats + kl)).sum(0) + (q * log_q).sum(-1)).mean()

    return loop(following(x, FEW), loss, torch.optim.Adam(nets.parameters(), lr=1e-3))


def measured(title: str, blocks: dict[str, Steps], targets: dict[str, float], quick: bool) -> Result:
    repeats, steps = (2, 10) if quick else (7, 60)

    def some(block: Steps) -> Callable[[], float]:
        return lambda: float(block(steps))

    found = alternate({name: some(block) for name, block in blocks.items()}, repeats, 1)
    return Result(title, found, targets)


def rows(quick: bool) -> list[Result]:
    """The rows of the benchmark."""
    torch.manual_seed(0)  # of the networks
    generator = torch.Generator().manual_seed(0)
    means = 2 * torch.randn(K, COLUMNS, generator=generator)
    x = means[torch.randint(K, (60_000,), generator=generator)] + torch.randn(60_000, COLUMNS, generator=generator)
    digits = (torch.as_tensor(pg.load_data("digits")["x"]).float() > 0.5).float()[:1700]
    program = pg.Program(mixture, nothing)
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    return [
        measured(
            f"Enumerated SVI step, mixture of {K} in {COLUMNS} columns, batch {BATCH}",
            {
                "ppl_gen, inductor": ours(program, x, "inductor", batch_size=BATCH),
                "ppl_gen, graph": ours(program, x, "graph", batch_size=BATCH),
                "by hand": mixture_by_hand(x),
                "Pyro, TraceEnum_ELBO": pyros(program, following(x, BATCH), elbo),
            },
            {"by hand": 1.0, "Pyro, TraceEnum_ELBO": 0.4},
            quick,
        ),
        measured(
            f"M2 step, digits, batch {FEW}, y enumerated",
            {
                "ppl_gen, inductor": ours(m2(), digits, "inductor", batch_size=FEW),
                "ppl_gen, graph": ours(m2(), digits, "graph", batch_size=FEW),
                "by hand, eager": m2_by_hand(digits),
                "Pyro, TraceEnum_ELBO": pyros(m2(), following(digits, FEW), TraceEnum_ELBO(max_plate_nesting=1)),
            },
            {"by hand, eager": 0.6, "Pyro, TraceEnum_ELBO": 0.3},
            quick,
        ),
    ]


if __name__ == "__main__":
    run("enumerated", "What a step over enumerated latents costs", rows, __doc__)
