"""Kinds of posterior that the package does not know, with a density, without one, and with chains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch

import ppl_gen as pg
from ppl_gen.extending import Outcome, Posterior, Run
from ppl_gen.inference import Algorithm

X = torch.linspace(2.0, 4.0, 20, dtype=torch.float64)
MEAN, SD = float(X.sum()) / 20.01, 20.01**-0.5  # of the posterior of `normal_mean`


def normal_mean(x: torch.Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


class ClosedForm(Posterior):
    """A normal distribution, given by two numbers: it has a density, and so weights."""

    kind, noun, independent = "closed_form", "closed form", True
    parts = ("normal",)

    def __init__(self, loc: torch.Tensor, scale: torch.Tensor) -> None:
        self.loc, self.scale = loc, scale

    def draw(self, count: int, batch: Any) -> list[dict[str, torch.Tensor]]:
        return [{"loc": dist.Normal(self.loc, self.scale).sample()} for _ in range(count)]

    @property
    def proposal(self) -> Any:
        return self.guide

    def guide(self, *args: Any, **kwargs: Any) -> None:
        pyro.sample("loc", dist.Normal(self.loc, self.scale))

    def tensors(self) -> Any:
        return {"normal": {"loc": self.loc, "scale": self.scale}}

    @classmethod
    def rebuilt(cls, parts: Any, guide: Any) -> ClosedForm:
        return cls(**parts["normal"])


class Grid(Posterior):
    """Nodes and their probabilities: draws of which there is no density."""

    kind, noun = "grid", "nodes"
    parts = ("grid",)

    def __init__(self, nodes: torch.Tensor, weights: torch.Tensor) -> None:
        self.nodes, self.weights = nodes, weights

    def draw(self, count: int, batch: Any) -> list[dict[str, torch.Tensor]]:
        return [{"loc": self.nodes[i]} for i in torch.multinomial(self.weights, count, replacement=True)]

    def tensors(self) -> Any:
        return {"grid": {"nodes": self.nodes, "weights": self.weights}}

    @classmethod
    def rebuilt(cls, parts: Any, guide: Any) -> Grid:
        return cls(parts["grid"]["nodes"], parts["grid"]["weights"])


class Ensemble(Posterior):
    """Walkers, each a chain, that say how often they moved."""

    kind, noun = "ensemble", "walkers"
    parts = ("walkers", "moves")

    def __init__(self, walkers: torch.Tensor, moves: torch.Tensor) -> None:
        self.walkers, self.stats = walkers, {"accepted": moves}

    def draw(self, count: int, batch: Any) -> list[dict[str, torch.Tensor]]:
        flat = self.walkers.flatten(0, 1)
        return [{"loc": flat[i]} for i in torch.linspace(0, len(flat) - 1, min(count, len(flat))).round().long()]

    def by_chain(self) -> Any:
        return {"loc": self.walkers}

    @property
    def judged_by(self) -> Any:
        return "chains"

    def tensors(self) -> Any:
        return {"walkers": {"loc": self.walkers}, "moves": self.stats}

    @classmethod
    def rebuilt(cls, parts: Any, guide: Any) -> Ensemble:
        return cls(parts["walkers"]["loc"], parts["moves"]["accepted"])


@dataclass(frozen=True)
class Exact(Algorithm):
    """The exact posterior of `normal_mean`, ``wider`` than it by so many times, as one kind or another."""

    kind: str
    wider: float = 1.0
    needs = (("data plate",),)

    def run(self, run: Run) -> Outcome:
        loc, sd = torch.tensor(MEAN, dtype=run.dtype), torch.tensor(SD * self.wider, dtype=run.dtype)
        if self.kind == "closed_form":
            return Outcome(ClosedForm(loc, sd), cost={"solver": "by hand"})
        if self.kind == "grid":
            nodes = loc + sd * torch.linspace(-4.0, 4.0, 801, dtype=run.dtype)
            return Outcome(Grid(nodes, dist.Normal(loc, sd).log_prob(nodes).exp()))
        walkers = loc + sd * torch.randn(4, 500, dtype=run.dtype)
        return Outcome(Ensemble(walkers, torch.ones(4, 500)))


KINDS = ("closed_form", "grid", "ensemble")
FITS: dict[str, pg.Fit] = {}


def fitted(kind: str) -> pg.Fit:
    if kind not in FITS:
        FITS[kind] = pg.fit(normal_mean, X, Exact(kind), seed=0, progress=False)
    return FITS[kind]
