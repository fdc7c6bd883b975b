"""Whether a loss still moved at the end of a run, and whether by more than matters."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ppl_gen.diagnostics.grades import Finding

__all__ = ["loss_trend", "moving"]

_TREND, _CHANGE, _TOTAL = 4.0, 0.01, 0.2  # standard errors; nats per row; nats in all
_MIN_LOSSES, _BATCHES = 40, 20


def loss_trend(losses: Any) -> tuple[float, float]:
    r"""Whether the loss still moved over the last half of a run: slope in standard errors, and predicted change.

    The last half is cut into B = 20 batches of equal length m (10 to 20 where it has fewer than 40 losses; the oldest
    surplus is dropped), and a line is fitted to their means :math:`y_b` over :math:`b = 1 \dots B`:

    .. math:: t = \hat\beta / \sqrt{\hat\sigma^2 / \sum_b (b - \bar b)^2}, \qquad
              \hat\sigma^2 = \sum_b (y_b - \hat y_b)^2 / (B - 2), \qquad \text{change} = B \hat\beta

    Losses of neighbouring steps are correlated, so a line through all of them has far too small a standard error. The
    means of batches much longer than the correlation time :math:`\tau` are nearly independent (their correlation is of
    order :math:`\tau / m`), and their scatter already holds the effect of the correlation within: for a loss that has
    settled t follows Student's law with B - 2 degrees of freedom, without an estimate of :math:`\tau`. (Batch means:
    Schmeiser, Batch size effects in the analysis of simulation output, Operations Research 1982.)

    ``losses`` has shape (steps,), in nats per row; the change is in the same unit. Returns (0, 0) for a constant loss
    and (NaN, NaN) for fewer than 40 losses, which are too few to tell.

    Raises ValueError for a wrong shape or a loss that is not finite.

    >>> t, change = loss_trend(np.linspace(3.0, 1.0, 1000) + 0.01 * np.random.default_rng(0).normal(size=1000))
    >>> bool(t < -4), round(change, 1)
    (True, -1.0)
    """
    values = np.asarray(losses, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"losses: expected shape (steps,), got {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"losses: expected finite values, got {int((~np.isfinite(values)).sum())} that are not")
    if values.size < _MIN_LOSSES:
        return math.nan, math.nan
    last = values[values.size // 2 :]
    batches = min(_BATCHES, last.size // 2)
    length = last.size // batches
    means = last[last.size - batches * length :].reshape(batches, length).mean(axis=1)
    time = np.arange(batches) - (batches - 1) / 2
    slope = float(time @ means / (time @ time))
    residual = means - means.mean() - slope * time
    stderr = math.sqrt(float(residual @ residual) / (batches - 2) / float(time @ time))
    if np.ptp(means) == 0.0:
        return 0.0, 0.0
    return (slope / stderr if stderr > 0 else math.copysign(math.inf, slope)), slope * batches


def moving(trend: tuple[float, float] | None, rows: int = 1, networks: bool = False) -> list[Finding]:
    """A loss that moved by more than chance, and by more than matters: a mean one sd off costs half a nat in all.

    A program with networks of its own is no posterior but an estimate, whose last nat of thousands is never found; and
    where only latents of rows are learned, each row has its own nats. Both are ``networks``, and judged by the row.
    """
    if trend is None or not abs(trend[0]) > _TREND:
        return []
    total = abs(trend[1]) * max(1, rows)
    if not total > _TOTAL or (networks and abs(trend[1]) <= _CHANGE):
        return []
    size = f"by {total:.2g} nats over the last half of the run"
    if trend[1] < 0:
        return [(1, f"the loss was still falling ({size})", "Run more steps")]
    return [(1, f"the loss was rising ({size})", "Lower the learning rate")]
