"""A guide at its learned parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from ppl_gen.data.batching import Batch
from ppl_gen.fitting.posteriors.base import Parts, Posterior
from ppl_gen.handlers.sites import is_subsample

__all__ = ["GuidePosterior"]


@dataclass(frozen=True)
class GuidePosterior(Posterior):
    """A guide at its learned parameters, which the workspace of a run (and the state of its outcome) holds.

    >>> def guide():
    ...     pyro.sample("loc", dist.Normal(0.0, 1.0))
    >>> import pyro, pyro.distributions as dist
    >>> GuidePosterior(guide).draw(2, Batch((), {}, None, None))[0].keys()
    dict_keys(['loc'])
    """

    function: Callable[..., Any]

    kind = "variational"
    noun = "guide"
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

    def centre(self, batch: Batch) -> Mapping[str, Tensor] | None:
        """The medians of an autoguide that has some."""
        if not isinstance(self.function, AutoGuide):
            return None
        try:
            with torch.no_grad():
                return dict(self.function.median(*batch.args, **batch.kwargs))
        except NotImplementedError:  # flows
            return None

    @property
    def proposal(self) -> Callable[..., Any]:
        return self.function

    @classmethod
    def rebuilt(cls, parts: Parts, guide: Callable[..., Any] | None) -> Self:
        if guide is None:
            raise ValueError("program: it leads to no guide, and the saved fit has one")
        return cls(guide)
