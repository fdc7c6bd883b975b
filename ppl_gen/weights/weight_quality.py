"""How many draws carry an importance-weighted evidence: effective sample size and k-hat of its weights, row by row."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ppl_gen.weights.log_mean import LogMean
from ppl_gen.weights.psis import MIN_DRAWS, pareto_k_rows, row_subset

__all__ = ["WeightQuality"]

FEW = 3.0  # effective draws: below it an estimate is little more than its largest weight
MAX_ROWS = 200  # rows whose k-hat is taken: the share of bad ones is then known to 0.035


class WeightQuality:
    """Collects the weights of all rows, chunk after chunk, and keeps what the diagnostics need of them.

    Args:
        rows: how many rows there will be.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._chosen = torch.as_tensor(row_subset(rows, MAX_ROWS))
        self._seen, self._draws = 0, 0
        self._sizes: list[Tensor] = []
        self._columns: list[Tensor] = []

    def add(self, log_weights: Tensor) -> None:
        """Draws x rows of one chunk, in nats."""
        logs, mean = log_weights.double().cpu(), LogMean()
        mean.add(logs)
        self.take(mean, logs[:, self.kept(logs.shape[1])])

    def kept(self, rows: int) -> Tensor:
        """Which of the ``rows`` rows that come next are looked at one by one."""
        return self._chosen[(self._chosen >= self._seen) & (self._chosen < self._seen + rows)] - self._seen

    def take(self, mean: LogMean, columns: Tensor) -> None:
        """Of one chunk of rows the mean of its weights, and the log weights (draws x rows) of those that are `kept`."""
        sizes = mean.effective
        self._sizes.append(sizes)
        self._columns.append(columns.double().cpu())
        self._seen, self._draws = self._seen + len(sizes), mean.count

    @property
    def effective_draws(self) -> Tensor | None:
        """(sum w)^2 / sum w^2 of every row; None where no weights took part."""
        return torch.cat(self._sizes) if self._sizes else None

    def k_hats(self) -> np.ndarray | None:
        """k-hat of at most `MAX_ROWS` rows; None with too few draws to fit a tail."""
        if not self._columns or self._draws < MIN_DRAWS:
            return None
        return pareto_k_rows(torch.cat(self._columns, 1).numpy(), max_rows=None)

    def complaint(self) -> str | None:
        """What to say where few draws carry the estimate, else None; silent about a handful that asked for no more."""
        sizes = self.effective_draws
        if sizes is None or self._draws < MIN_DRAWS or float(sizes.median()) >= FEW:
            return None
        return (
            f"evidence: in half of the rows at most {float(sizes.median()):.1f} of {self._draws} draws carry the "
            "estimate, so it lies below log p(x), by an amount that its error bar does not show. Ask for more "
            "particles, or train the guide longer"
        )
