"""A distribution that is drawn by a Markov chain and has no normalised log density."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import pyro.distributions as dist
import torch
from torch import Tensor

from ppl_gen.errors import IncompatibleError

__all__ = ["Chain", "ChainRows"]


OF_ENERGIES = (
    "log Z of an energy sums over all states. Train it by SVI(objective=ContrastiveDivergence()), or WakeSleep() where "
    "it is the energy of a latent site; fit.evidence gives log p(x) where log Z can be enumerated, "
    "fit.evidence(method=pg.AIS()) elsewhere"
)


class Chain(Protocol):
    """Where chains of rows begin, and how they move."""

    #: Shape of a row.
    row: torch.Size
    #: What values a row may take.
    support: Any

    def begin(self, shape: torch.Size) -> Tensor:
        """Rows to start at: ``shape`` x shape of a row."""

    def gibbs(self, x: Tensor, steps: int) -> Tensor:
        """The rows after ``steps`` sweeps."""


class ChainRows(dist.TorchDistribution):
    """Rows at the end of a Markov chain, of an energy say, without a normalised log density.

    Args:
        machine: what moves the rows, at its present parameters.
        sweeps: length of each chain.
        advice: how it is trained, and what stands for its evidence.

    Raises:
        IncompatibleError: by ``log_prob``, whose normaliser is a sum over all states.
        ValueError: by ``log_prob``, for rows outside of the support, where validation is on.
    """

    arg_constraints: dict[str, Any] = {}
    has_rsample = False

    def __init__(
        self, machine: Chain, sweeps: int, batch_shape: Sequence[int] = (), *, advice: str = OF_ENERGIES
    ) -> None:
        self.machine, self.sweeps, self.advice = machine, sweeps, advice
        super().__init__(torch.Size(batch_shape), machine.row)

    @property
    def support(self) -> Any:
        return self.machine.support

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> ChainRows:
        return ChainRows(self.machine, self.sweeps, batch_shape, advice=self.advice)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        start = self.machine.begin(torch.Size((*sample_shape, *self.batch_shape)))
        return self.machine.gibbs(start, self.sweeps)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:  # rows that the chain can never reach are another mistake
            self._validate_sample(value)
        raise IncompatibleError(f"rows of a Markov chain have no log density that can be trained on: {self.advice}")
