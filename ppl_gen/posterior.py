"""What an algorithm learned about the latent sites, in three forms: a guide, points, or draws of chains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ppl_gen.data.batching import Batch

__all__ = ["BUILT_IN", "ChainPosterior", "GuidePosterior", "PointPosterior", "Posterior"]


class Posterior(ABC):
    """Draws of latent sites. Called inside the fit's workspace, under a seed."""

    #: "point", "variational" or "chains": decides which diagnostics mean anything.
    kind: str = "variational"

    @abstractmethod
    def draw(self, count: int, batch: Batch) -> list[dict[str, Tensor]]:
        """``count`` joint draws of the sites it knows, each a mapping site -> value, given ``batch``."""

    def guide(self) -> Callable[..., Any] | None:
        """A Pyro guide to propose from, where there is one."""
        return None


@dataclass(frozen=True)
class PointPosterior(Posterior):
    """All mass at one value per site: maximum likelihood, maximum a posteriori."""

    values: Mapping[str, Tensor] = field(default_factory=dict)
    kind = "point"

    def draw(self, count: int, batch: Batch) -> list[dict[str, Tensor]]:
        return [dict(self.values)] * count


@dataclass(frozen=True)
class GuidePosterior(Posterior):
    """A guide at its learned parameters (which the workspace holds)."""

    function: Callable[..., Any]
    kind = "variational"

    def draw(self, count: int, batch: Batch) -> list[dict[str, Tensor]]:
        draws = []
        with torch.no_grad():
            for _ in range(count):
                trace = poutine.trace(self.function).get_trace(*batch.args, **batch.kwargs)
                draws.append(
                    {
                        name: node["value"]
                        for name, node in trace.nodes.items()
                        if node["type"] == "sample"
                        and type(node["fn"]).__name__ != "_Subsample"
                        and not node["infer"].get("is_auxiliary")
                    }
                )
        return draws

    def guide(self) -> Callable[..., Any]:
        return self.function


@dataclass(frozen=True)
class ChainPosterior(Posterior):
    """Draws of Markov chains: site -> chains x draws x shape; ``stats`` the sampler's own, chains x draws."""

    draws: Mapping[str, Tensor]
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    kind = "chains"

    @property
    def chains(self) -> int:
        return next(iter(self.draws.values())).shape[0]

    @property
    def total(self) -> int:
        """Draws of all chains together."""
        return self.chains * next(iter(self.draws.values())).shape[1]

    def draw(self, count: int, batch: Batch) -> list[dict[str, Tensor]]:
        """``count`` draws spread evenly over all chains, in order (all of them once when ``count`` is larger)."""
        flat = {name: value.flatten(0, 1) for name, value in self.draws.items()}
        total = len(next(iter(flat.values())))
        index = torch.arange(total) if count >= total else torch.linspace(0, total - 1, count).round().long()
        return [{name: value[i] for name, value in flat.items()} for i in index]


#: The kinds that a saved fit holds whole; any other is code.
BUILT_IN = (PointPosterior, GuidePosterior, ChainPosterior)
