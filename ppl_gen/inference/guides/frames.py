"""The parameters of Pyro's normal autoguides as functions of free numbers that count in the units of a given normal."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from torch import Tensor

__all__ = ["KINDS", "Frame", "frame_of"]

KINDS = (AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal)


class Frame(ABC):
    r"""loc = m + L a; what gives the spread, relative to that of N(m, L L').

    ``loc`` is m, (size,), ``factor`` the lower triangular L, (size, size). At free numbers that are all 0 a guide of
    full rank is this normal, a mean field the one nearest to it (KL(q || N(m, L L')) is least), low rank between them.
    """

    def __init__(self, loc: Tensor, factor: Tensor) -> None:
        self.loc, self.factor = loc, factor

    @abstractmethod
    def zeros(self) -> list[Tensor]:
        """The free numbers at the beginning."""

    @abstractmethod
    def values(self, free: Sequence[Tensor]) -> dict[str, Tensor]:
        """The parameters in their own units, by their names in the guide."""

    def held(self) -> list[Tensor]:
        """All tensors that `values` reads beside the free numbers."""
        return [value for _, value in sorted(vars(self).items()) if isinstance(value, Tensor)]

    def _none(self, *shape: int) -> Tensor:
        return self.loc.new_zeros(shape)

    def _alone(self) -> Tensor:
        """The sd of each number given the others, (size,): what a mean field makes of this normal."""
        eye = torch.eye(len(self.loc), dtype=self.loc.dtype, device=self.loc.device)
        inverse = torch.linalg.solve_triangular(self.factor, eye, upper=False)
        return inverse.square().sum(0).rsqrt()


class _FullRank(Frame):
    """L of the guide is L T, T lower triangular with exp(delta) on its diagonal."""

    def zeros(self) -> list[Tensor]:
        size = len(self.loc)
        return [self._none(size), self._none(size), self._none(size, size)]

    def values(self, free: Sequence[Tensor]) -> dict[str, Tensor]:
        moved, log_scale, below = free
        factor = self.factor @ (torch.diag(log_scale.exp()) + below.tril(-1))
        scale = factor.diagonal()
        return {"loc": self.loc + self.factor @ moved, "scale": scale, "scale_tril": factor / scale[:, None]}


class _MeanField(Frame):
    """Scales are those of each number given the others, times exp(delta); the numbers are split over sites."""

    def __init__(self, loc: Tensor, factor: Tensor, names: Sequence[tuple[str, str]], shapes: Sequence[Any]) -> None:
        super().__init__(loc, factor)
        self.names, self.shapes, self.alone = names, shapes, self._alone()

    def zeros(self) -> list[Tensor]:
        return [self._none(len(self.loc)), self._none(len(self.loc))]

    def values(self, free: Sequence[Tensor]) -> dict[str, Tensor]:
        moved, log_scale = free
        sizes = [shape.numel() for shape in self.shapes]
        locs = (self.loc + self.factor @ moved).split(sizes)
        scales = (self.alone * log_scale.exp()).split(sizes)
        found: dict[str, Tensor] = {}
        for (loc, scale), shape, mean, sd in zip(self.names, self.shapes, locs, scales, strict=True):
            found |= {loc: mean.reshape(shape), scale: sd.reshape(shape)}
        return found


class _LowRank(Frame):
    """S (F F' + 1) S, S as of a mean field, F by the largest eigenvalues of what S leaves."""

    def __init__(self, loc: Tensor, factor: Tensor, rank: int) -> None:
        super().__init__(loc, factor)
        self.alone = self._alone()
        white = factor / self.alone[:, None]
        values, vectors = torch.linalg.eigh(white @ white.T)
        self.columns = vectors[:, -rank:] * (values[-rank:] - 1.0).clamp(min=0.0).sqrt()

    def zeros(self) -> list[Tensor]:
        return [self._none(len(self.loc)), self._none(len(self.loc)), torch.zeros_like(self.columns)]

    def values(self, free: Sequence[Tensor]) -> dict[str, Tensor]:
        moved, log_scale, columns = free
        loc, scale = self.loc + self.factor @ moved, self.alone * log_scale.exp()
        return {"loc": loc, "scale": scale, "cov_factor": self.columns + columns}


def frame_of(guide: Any, sites: Mapping[str, torch.Size], loc: Tensor, factor: Tensor) -> Frame | None:
    """The frame of a guide over ``sites`` of these unconstrained shapes, in this order; None for other guides."""
    if type(guide) not in KINDS:
        return None
    own = [name for name, _ in guide.prototype_trace.iter_stochastic_nodes()]
    if own != list(sites):
        return None
    if type(guide) is AutoNormal:
        return _MeanField(loc, factor, [(f"locs.{name}", f"scales.{name}") for name in own], list(sites.values()))
    if type(guide) is AutoDiagonalNormal:
        return _MeanField(loc, factor, [("loc", "scale")], [loc.shape])
    if type(guide) is AutoMultivariateNormal:
        return _FullRank(loc, factor)
    return _LowRank(loc, factor, int(guide.rank))
