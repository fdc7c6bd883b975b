"""Draws of Markov chains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from torch import Tensor

from ppl_gen.data.batching import Batch
from ppl_gen.fitting.posteriors.base import JudgedBy, Parts, Posterior, check_sites, spread

__all__ = ["ChainPosterior"]


@dataclass(frozen=True)
class ChainPosterior(Posterior):
    """Draws of Markov chains: site -> chains x draws x shape; ``stats`` the sampler's own, chains x draws.

    ``stats["diverging"]`` and ``stats["reached_max_treedepth"]`` count in the verdict, where there are such.

    Raises:
        ValueError: unless all sites have the same chains and draws, one at least.

    >>> import torch
    >>> chains = ChainPosterior({"loc": torch.zeros(2, 100)})
    >>> chains.chains, chains.total
    (2, 200)
    """

    draws: Mapping[str, Tensor]
    stats: Mapping[str, Tensor] = field(default_factory=dict)

    kind = "chains"
    noun = "chains"
    parts: ClassVar[tuple[str, ...]] = ("draws", "stats")

    def __post_init__(self) -> None:
        _check_sizes(self.draws)

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
        return [{name: value[i] for name, value in flat.items()} for i in spread(self.total, count)]

    def by_chain(self) -> Mapping[str, Tensor]:
        return self.draws

    @property
    def judged_by(self) -> JudgedBy:
        return "chains"

    def tensors(self) -> Parts:
        return {"draws": self.draws, "stats": self.stats}

    @classmethod
    def rebuilt(cls, parts: Parts, guide: Callable[..., Any] | None) -> Self:
        return cls(parts["draws"], parts["stats"])

    @classmethod
    def check(cls, parts: Parts, sites: Mapping[str, Sequence[Any]]) -> None:
        check_sites("draws", parts["draws"], sites, known=True)
        _check_sizes(parts["draws"])


def _check_sizes(draws: Mapping[str, Tensor]) -> None:
    sizes = {tuple(value.shape[:2]) for value in draws.values()}
    if len(sizes) != 1 or len(size := next(iter(sizes))) != 2 or not size[0] * size[1]:
        raise ValueError(
            f"draws: expected chains x draws x shape, as many chains and draws of every site; the sites "
            f"have chains and draws of {sorted(sizes) or 'no site'}"
        )
