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
from ppl_gen.handlers.sites import is_subsample

__all__ = ["BUILT_IN", "ChainPosterior", "GuidePosterior", "PointPosterior", "Posterior"]


class Posterior(ABC):
    """Draws of latent sites: derive from it what is neither points, nor a guide, nor chains.

    Called inside the fit's workspace, under a seed. What derives from it is code, and a saved fit comes back with it
    only where the algorithm has an `outline`.

    >>> class Uniform(Posterior):
    ...     def draw(self, count, batch):
    ...         return [{"share": torch.rand(())} for _ in range(count)]
    >>> len(Uniform().draw(3, None))
    3
    """

    #: "point", "variational" or "chains": decides which diagnostics mean anything.
    kind: str = "variational"

    #: Whether ``draw(1, batch)``, called many times, is as good as one call for many; if not, one call asks for all.
    independent: bool = False

    @abstractmethod
    def draw(self, count: int, batch: Batch) -> list[dict[str, Tensor]]:
        """``count`` joint draws of the sites it knows, each a mapping site -> value, given ``batch``."""


@dataclass(frozen=True)
class PointPosterior(Posterior):
    """All mass at one value per site: maximum likelihood, maximum a posteriori; ``values`` by site.

    >>> PointPosterior({"loc": torch.tensor(2.0)}).kind
    'point'
    """

    values: Mapping[str, Tensor] = field(default_factory=dict)
    kind = "point"
    independent = True

    def draw(self, count: int, batch: Batch) -> list[dict[str, Tensor]]:
        return [dict(self.values)] * count


@dataclass(frozen=True)
class GuidePosterior(Posterior):
    """A guide at its learned parameters, which the workspace of a run (and the state of its outcome) holds.

    Give the same function to `Outcome` as its ``guide``, so that evidence and diagnosis can weigh it.

    >>> def guide():
    ...     pyro.sample("loc", dist.Normal(0.0, 1.0))
    >>> import pyro, pyro.distributions as dist
    >>> GuidePosterior(guide).draw(2, Batch((), {}, None, None))[0].keys()
    dict_keys(['loc'])
    """

    function: Callable[..., Any]
    kind = "variational"
    independent = True

    def draw(self, count: int, batch: Batch) -> list[dict[str, Tensor]]:
        draws = []
        with torch.no_grad():
            for _ in range(count):
                trace = poutine.trace(self.function).get_trace(*batch.args, **batch.kwargs)
                draws.append(
                    {
                        name: node["value"]
                        for name, node in trace.nodes.items()
                        if node["type"] == "sample" and not is_subsample(node) and not node["infer"].get("is_auxiliary")
                    }
                )
        return draws


@dataclass(frozen=True)
class ChainPosterior(Posterior):
    """Draws of Markov chains: site -> chains x draws x shape; ``stats`` the sampler's own, chains x draws.

    ``stats["diverging"]`` and ``stats["reached_max_treedepth"]`` count in the verdict, where there are such.

    >>> chains = ChainPosterior({"loc": torch.zeros(2, 100)})
    >>> chains.chains, chains.total
    (2, 200)
    """

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
