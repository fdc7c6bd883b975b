"""The generalised Pareto tail of importance ratios: its shape, and the quantiles that take the place of the ratios."""

from __future__ import annotations

import math

import numpy as np

__all__ = ["pareto_smoothed", "tail_size"]

MIN_TAIL = 5  # ratios above the cut-off that a fit needs
_UNDERFLOW = math.log(np.finfo(np.float64).tiny)


def tail_size(draws: int) -> int:
    r"""How many ratios are the tail, :math:`\min(S / 5, 3 \sqrt S)`."""
    return math.ceil(min(draws / 5, 3 * math.sqrt(draws)))


def pareto_smoothed(log_ratios: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pareto smoothed log weights of every row, normalised, and k-hat: infinite where the tail is too short.

    ``log_ratios`` has shape (rows, draws), the weights the same, k-hat has shape (rows,). Vehtari, Simpson, Gelman, Yao
    and Gabry, Pareto smoothed importance sampling, JMLR 25(72), 2024. Gives what ArviZ gives, which takes a second to
    load. Ties and infinities are the caller's: see `ppl_gen.diagnostics.psis`.

    >>> weights, k = pareto_smoothed(np.random.default_rng(0).normal(size=(2, 100)))
    >>> weights.shape, k.shape
    ((2, 100), (2,))
    """
    logs = np.array(log_ratios, dtype=np.float64)
    with np.errstate(all="ignore"):
        k = np.array([_smooth(row) for row in logs])
    return logs, k


def _smooth(logs: np.ndarray) -> float:
    """k-hat of one row of log ratios, which become its log weights in place."""
    k = math.inf
    logs -= logs.max()
    cut = max(np.partition(logs, -tail_size(len(logs)) - 1)[-tail_size(len(logs)) - 1], _UNDERFLOW)
    tail = np.flatnonzero(logs > cut)
    if len(tail) >= MIN_TAIL:
        tail = tail[np.argsort(logs[tail])]
        k, scale = _fit(np.exp(logs[tail]) - math.exp(cut))
        if math.isfinite(k):
            logs[tail] = np.minimum(np.log(_quantiles(len(tail), k, scale) + math.exp(cut)), 0.0)
    logs -= np.log(np.exp(logs - logs.max()).sum()) + logs.max()
    return k


def _fit(excess: np.ndarray) -> tuple[float, float]:
    r"""Shape and scale of ascending values above a cut-off, by the posterior mean of :math:`b = -k / \sigma` on a grid.

    Zhang and Stephens, A new and efficient estimation method for the generalized Pareto distribution, Technometrics 51,
    2009; the shape is drawn to 1/2 as by ten more values, as in the article on smoothing (appendix).
    """
    n = len(excess)
    points = 30 + int(math.sqrt(n))
    b = 1 / excess[-1] + (1 - np.sqrt(points / (np.arange(points) + 0.5))) / (3 * excess[int(n / 4 + 0.5) - 1])
    k = np.log1p(-b[:, None] * excess).mean(axis=1)
    likelihood = n * (np.log(-b / k) - k - 1)
    weight = 1 / np.exp(likelihood - likelihood[:, None]).sum(axis=1)
    kept = weight >= 10 * np.finfo(np.float64).eps
    mean = float((b[kept] * weight[kept]).sum() / weight[kept].sum())
    shape = float(np.log1p(-mean * excess).mean())
    return (n * shape + 5) / (n + 10), -shape / mean if mean else math.nan


def _quantiles(count: int, k: float, scale: float) -> np.ndarray:
    """Those of a generalised Pareto distribution, in the middle of ``count`` equal shares."""
    if not scale > 0:
        return np.full(count, np.nan)
    exponential = -np.log1p(-(np.arange(count) + 0.5) / count)
    return scale * (exponential if abs(k) < np.finfo(np.float64).eps else np.expm1(k * exponential) / k)
