"""Draws of which nothing but their values is known: particles, simulations that were accepted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from ppl_gen.data.batching import Batch
from ppl_gen.fitting.posteriors.base import Parts, Posterior, check_sites, spread

__all__ = ["DrawsPosterior"]


@dataclass(frozen=True)
class DrawsPosterior(Posterior):
    """Joint draws in no order, site -> draws x shape: neither chains (so there is no R-hat) nor a guide (no k-hat).

    Short chains that begin at them judge them, where the program has a density.

    Raises:
        ValueError: unless all sites have as many draws, one at least.

    >>> import torch
    >>> particles = DrawsPosterior({"loc": torch.linspace(0.0, 1.0, 5)})
    >>> [float(draw["loc"]) for draw in particles.draw(3, None)], particles.judged_by
    ([0.0, 0.5, 1.0], 'draws')
    """

    draws: Mapping[str, Tensor]

    kind = "draws"
    parts: ClassVar[tuple[str, ...]] = ("draws",)

    def __post_init__(self) -> None:
        _check_sizes(self.draws)

    def draw(self, count: int, batch: Batch) -> list[dict[str, Tensor]]:
        """``count`` draws spread evenly from first to last (all of them once when ``count`` is larger)."""
        total = len(next(iter(self.draws.values())))
        return [{name: value[i] for name, value in self.draws.items()} for i in spread(total, count)]

    def by_chain(self) -> Mapping[str, Tensor]:
        """All of them, as one chain."""
        return {name: value[None] for name, value in self.draws.items()}

    def tensors(self) -> Parts:
        return {"draws": self.draws}

    @classmethod
    def rebuilt(cls, parts: Parts, guide: Callable[..., Any] | None) -> Self:
        return cls(parts["draws"])

    @classmethod
    def check(cls, parts: Parts, sites: Mapping[str, Sequence[Any]]) -> None:
        check_sites("draws", parts["draws"], sites, known=True)
        _check_sizes(parts["draws"])


def _check_sizes(draws: Mapping[str, Tensor]) -> None:
    sizes = {tuple(value.shape[:1]) for value in draws.values()}
    if len(sizes) != 1 or not next(iter(sizes)) or not next(iter(sizes))[0]:
        raise ValueError(
            f"draws: expected draws x shape, as many draws of every site; the sites have draws of "
            f"{sorted(sizes) or 'no site'}"
        )
