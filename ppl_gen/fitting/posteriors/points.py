"""All mass at one value of each site: maximum likelihood, maximum a posteriori."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from torch import Tensor

from ppl_gen.data.batching import Batch
from ppl_gen.fitting.posteriors.base import JudgedBy, Parts, Posterior, check_sites

__all__ = ["PointPosterior"]


@dataclass(frozen=True)
class PointPosterior(Posterior):
    """All mass at one value per site: maximum likelihood, maximum a posteriori; ``values`` by site.

    >>> import torch
    >>> float(PointPosterior({"loc": torch.tensor(2.0)}).point["loc"])
    2.0
    """

    values: Mapping[str, Tensor] = field(default_factory=dict)

    kind = "point"
    noun = "point"
    independent = True
    parts: ClassVar[tuple[str, ...]] = ("point",)

    def draw(self, count: int, batch: Batch) -> list[dict[str, Tensor]]:
        return [dict(self.values)] * count

    @property
    def point(self) -> Mapping[str, Tensor]:
        return self.values

    @property
    def judged_by(self) -> JudgedBy:
        return None

    def tensors(self) -> Parts:
        return {"point": self.values}

    @classmethod
    def rebuilt(cls, parts: Parts, guide: Callable[..., Any] | None) -> Self:
        return cls(parts["point"])

    @classmethod
    def check(cls, parts: Parts, sites: Mapping[str, Sequence[Any]]) -> None:
        check_sites("point", parts["point"], sites, known=False)
