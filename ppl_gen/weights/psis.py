"""Pareto smoothed importance sampling: how far a guide is from the posterior it stands for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ppl_gen.bridge import az_psis

__all__ = [
    "MIN_DRAWS",
    "NEARLY_EQUAL",
    "effective_sample_size",
    "pareto_k",
    "pareto_k_rows",
    "pareto_k_threshold",
    "row_subset",
    "smoothed_weights",
    "smoothed_with_k",
    "told_apart",
]

NEARLY_EQUAL = 1 / (1 + 0.35**2)
"""Effective share of draws from which weights are no fault of a guide, however heavy the far tail of their small
differences: by Cauchy and Schwarz a mean is off by at most sqrt(draws / effective - 1) sd of the guide, here 0.35."""

MIN_DRAWS = 25
"""Fewest draws with which k-hat is computed: the tail is a fifth of the draws and needs five of them."""

_MIN_TAIL = 5
_UNDERFLOW = math.log(np.finfo(np.float64).tiny)  # log weights this far below the largest count as zero


def pareto_k_threshold(draws: int) -> float:
    r"""The largest k-hat at which importance weights from this many draws can be trusted.

    .. math:: \min(1 - 1 / \log_{10} S,\ 0.7)

    A tail of shape k needs about :math:`10^{1 / (1 - k)}` draws; solved for k this gives the first term, and 0.7 is
    where the number needed becomes impractical. Vehtari, Simpson, Gelman, Yao and Gabry, Pareto smoothed importance
    sampling, JMLR 25(72), 2024.

    Raises ValueError for fewer than `MIN_DRAWS` draws.

    >>> round(pareto_k_threshold(1000), 3), pareto_k_threshold(4000)
    (0.667, 0.7)
    """
    _need_draws(draws)
    return min(1.0 - 1.0 / math.log10(draws), 0.7)


def told_apart(k: float, limit: float) -> tuple[str, str]:
    """k-hat and its limit as text: two digits, or as many as tell the two apart.

    >>> told_apart(0.8, 0.7), told_apart(0.7004, 0.7)
    (('0.80', '0.70'), ('0.7004', '0.7000'))
    """
    digits = next((n for n in range(2, 6) if f"{k:.{n}f}" != f"{limit:.{n}f}"), 6)
    return f"{k:.{digits}f}", f"{limit:.{digits}f}"


def pareto_k(log_ratios: Any) -> float:
    r"""k-hat: the shape of the generalised Pareto tail of the importance ratios :math:`p(x, z_s) / q(z_s)`.

    ``log_ratios`` has shape (draws,): log joint minus log guide, at draws of the guide, up to a constant, in nats. The
    ratios have :math:`1/k` finite moments; compare with `pareto_k_threshold`. A high value says that the guide is a
    poor approximation of the posterior; it says nothing about whether the program is right.

    What ArviZ's fit cannot judge is settled first:

    * **Ties in the tail** (an exact guide, whose ratios are all equal; discrete latents; rounding). With fewer than
      five distinct values above the cut-off no tail can be fitted, and
      :math:`k = \log(\max w / \bar w) / \log S` is reported: the largest of S Pareto weights grows as :math:`S^k`.
      Equal ratios give exactly 0, the value of an exact guide.
    * **Zero weights** (log ratio -inf: the draw lies outside the posterior's support) are kept. Where fewer than
      five draws have a weight that floating point tells from 0, k is +inf, since they carry the whole sum.
    * **NaN or +inf** among the log ratios gives +inf: such a guide cannot be corrected, and NaN would compare as
      "below the threshold".

    Raises ValueError for a wrong shape or fewer than `MIN_DRAWS` draws. Source: see `pareto_k_threshold`.

    >>> z = np.random.default_rng(0).normal(size=4000)
    >>> pareto_k(np.zeros(4000))
    0.0
    >>> bool(pareto_k(-0.5 * (2.0 * z) ** 2 + 0.5 * z**2) < 0.7)  # the guide is twice as wide as the posterior
    True
    >>> bool(pareto_k(-0.5 * (0.2 * z) ** 2 + 0.5 * z**2) > 0.7)  # a fifth as wide: the tails are missed
    True
    """
    ratios = np.asarray(log_ratios, dtype=np.float64)
    if ratios.ndim != 1:
        raise ValueError(f"log_ratios: expected shape (draws,), got {ratios.shape}; use pareto_k_rows for a matrix")
    return float(_smooth(ratios[None])[1][0])


def pareto_k_rows(log_ratios: Any, *, max_rows: int | None = 2000) -> np.ndarray:
    """k-hat of every row of the data: local latents are judged row by row.

    ``log_ratios`` has shape (draws, rows): for each row its own log joint minus log guide. (One joint k-hat adds up the
    errors of all rows: with the same error in each it is 0.3 for one row and 1.2 for a thousand.) With more than
    ``max_rows`` rows only those of `row_subset` are judged: the fit costs about 0.2 ms a row at a thousand draws, and
    2000 rows give any fraction of bad rows within 0.011 (one standard error); None judges all.

    Returns shape (min(rows, max_rows),). Ties, zeros and NaN as in `pareto_k`; raises ValueError as it does.

    >>> pareto_k_rows(np.zeros((100, 3)))
    array([0., 0., 0.])
    """
    ratios = _matrix(log_ratios)
    return _smooth(ratios[:, row_subset(ratios.shape[1], max_rows)].T)[1]


def row_subset(rows: int, max_rows: int | None) -> np.ndarray:
    """Indices of at most ``max_rows`` of ``rows`` rows, spread evenly from the first to the last (no chance in it).

    Raises ValueError where max_rows is not positive.

    >>> row_subset(9, 3), row_subset(2, 3)
    (array([0, 4, 8]), array([0, 1]))
    """
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows: expected a positive number of rows or None, got {max_rows}")
    if max_rows is None or rows <= max_rows:
        return np.arange(rows)
    return np.linspace(0, rows - 1, max_rows).round().astype(np.int64)


def smoothed_weights(log_ratios: Any) -> np.ndarray:
    r"""Pareto smoothed log weights, normalised: :math:`\log \sum_s \exp w_s = 0` for every column.

    ``log_ratios`` has shape (draws,) or (draws, rows); the weights the same. The largest ratios are replaced by
    quantiles of the fitted tail and cut at the largest raw one; where no tail can be fitted (see `pareto_k`) the raw
    ratios are normalised. Source: see `pareto_k_threshold`.

    Raises ValueError for NaN or +inf, for a column without any weight, and for fewer than `MIN_DRAWS` draws.

    >>> bool(np.allclose(smoothed_weights(np.zeros(100)), -np.log(100)))
    True
    """
    ratios = _matrix(np.asarray(log_ratios, dtype=np.float64))
    bad = np.isnan(ratios).any(axis=0) | ~np.isfinite(ratios.max(axis=0))
    if bad.any():
        raise ValueError(
            f"log_ratios: {int(bad.sum())} of {bad.size} columns hold NaN or +inf, or only -inf; expected finite log "
            "joint minus log guide (-inf for some draws is allowed)"
        )
    return _smooth(ratios.T)[0].T.reshape(np.shape(log_ratios))


def smoothed_with_k(log_ratios: Any) -> tuple[np.ndarray, np.ndarray]:
    """`smoothed_weights` (draws x rows) and `pareto_k_rows` of all rows, from one fit of their tails.

    Rows with NaN, +inf or no weight at all get NaN and a k-hat of +inf.

    >>> logs, k = smoothed_with_k(np.zeros((100, 3)))
    >>> logs.shape, k
    ((100, 3), array([0., 0., 0.]))
    """
    logs, k = _smooth(_matrix(log_ratios).T)
    return logs.T, k


def effective_sample_size(log_weights: Any) -> Any:
    r"""How many equally weighted draws the weighted ones are worth: :math:`(\sum_s w_s)^2 / \sum_s w_s^2`.

    ``log_weights`` has shape (draws,) or (draws, rows), normalised or not; returns a number or shape (rows,), between
    1 and the number of draws. Kong, Liu and Wong, Sequential imputations and Bayesian missing data problems, JASA 1994.

    Raises ValueError where a column has no weight at all, NaN or +inf.

    >>> float(effective_sample_size(np.log([0.5, 0.5, 0.0 + 1e-300])))
    2.0
    """
    logs = np.asarray(log_weights, dtype=np.float64)
    if logs.ndim not in (1, 2) or logs.size == 0:
        raise ValueError(f"log_weights: expected shape (draws,) or (draws, rows), got {logs.shape}")
    top = logs.max(axis=0)
    if not np.isfinite(top).all():
        raise ValueError("log_weights: expected at least one finite value and no NaN or +inf in each column")
    weights = np.exp(logs - top)
    return weights.sum(axis=0) ** 2 / (weights**2).sum(axis=0)


def _need_draws(draws: int) -> None:
    if draws < MIN_DRAWS:
        raise ValueError(f"k-hat needs at least {MIN_DRAWS} draws, got {draws}; ask for more draws (1000 or so)")


def _matrix(log_ratios: Any) -> np.ndarray:
    """Draws x rows in float64; a vector of draws becomes draws x 1."""
    ratios = np.asarray(log_ratios, dtype=np.float64)
    if ratios.ndim == 1:
        ratios = ratios[:, None]
    if ratios.ndim != 2:
        raise ValueError(f"log_ratios: expected shape (draws, rows), got {ratios.shape}")
    _need_draws(ratios.shape[0])
    return ratios


def _smooth(ratios: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Normalised log weights and k-hat of each of (rows, draws); rows that are not valid get NaN and +inf."""
    _need_draws(ratios.shape[1])
    top = ratios.max(axis=1)
    valid = np.isfinite(top)  # the largest of a row that holds a NaN is NaN
    logs, k = np.full(ratios.shape, np.nan), np.full(len(ratios), np.inf)
    logs[valid], k[valid] = _smooth_valid(ratios[valid] - top[valid, None])
    return logs, k


def _smooth_valid(shifted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same where the largest log ratio of each row is 0: ArviZ's fit, or the rules of `pareto_k` without one."""
    draws = shifted.shape[1]
    log_mean = np.log(np.exp(shifted).mean(axis=1))
    logs = shifted - log_mean[:, None] - math.log(draws)
    k = np.maximum(-log_mean, 0.0) / math.log(draws)
    tail = _tail(shifted)
    vanished = np.isfinite(tail) & (tail < _UNDERFLOW)
    k[vanished.any(axis=1) | ((shifted > _UNDERFLOW).sum(axis=1) < _MIN_TAIL)] = np.inf
    fitted = np.flatnonzero((np.diff(np.exp(tail), axis=1) > 0).sum(axis=1) >= _MIN_TAIL)
    if fitted.size:
        smoothed, shape = az_psis(shifted[fitted])
        done = np.isfinite(shape) & ~np.isnan(smoothed).any(axis=1)
        logs[fitted[done]], k[fitted[done]] = smoothed[done], shape[done]
    return logs, k


def _tail(shifted: np.ndarray) -> np.ndarray:
    """The cut-off and the min(S / 5, 3 sqrt(S)) draws above it, ascending: rows x (that many + 1)."""
    draws = shifted.shape[1]
    size = math.ceil(min(draws / 5, 3 * math.sqrt(draws))) + 1
    return np.sort(np.partition(shifted, draws - size, axis=1)[:, -size:], axis=1)
