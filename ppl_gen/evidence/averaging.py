"""What an average over draws of the parameters is worth: its error, and how far the guide is from the posterior."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ppl_gen.enumeration.finite_globals import extended, summed_globals
from ppl_gen.inference.guides.resolved import point_sites
from ppl_gen.weights.psis import (
    MIN_DRAWS,
    NEARLY_EQUAL,
    effective_sample_size,
    pareto_k,
    pareto_k_threshold,
    smoothed_weights,
)
from ppl_gen.weights.weighed import ALONE, MAX_ELEMENTS, numbers, weighed_draws

if TYPE_CHECKING:
    from ppl_gen.fits.result import Fit

__all__ = ["Average", "Normaliser", "normaliser", "weighed_parameters"]

ENOUGH = 50  # draws from which k-hat tells a good guide from a bad one


class Average:
    r"""Sums over rows, chunk after chunk, of what each parameter draw does to the mean evidence.

    Args:
        draws: S.
        weights: normalised log weights of the draws, shape (S,), which make them stand for the posterior; or None.
    """

    def __init__(self, draws: int, weights: Tensor | None = None) -> None:
        self.draws, self.weights, self.rows = draws, weights, 0
        self._left_out = torch.zeros(draws, dtype=torch.float64)
        self._influence = torch.zeros(draws, dtype=torch.float64)
        self._gap = 0.0

    def add(self, per_draw: Tensor) -> None:
        """Draws x rows of one chunk, in nats."""
        logs = per_draw.detach().double().cpu()
        self.rows += logs.shape[1]
        if self.draws == 1:
            return
        self._left_out += _without_each(logs).sum(1) - logs.shape[1] * math.log(self.draws - 1)
        if self.weights is not None:
            weighed = logs + self.weights[:, None]
            plain = torch.logsumexp(logs, 0) - math.log(self.draws)
            self._gap += float((torch.logsumexp(weighed, 0) - plain).sum())
            shift = torch.softmax(weighed, 0) - self.weights.exp()[:, None]
            self._influence += (shift - torch.softmax(logs, 0) + 1 / self.draws).sum(1)

    def error(self) -> float:
        r"""Standard error of the mean over rows, by leaving out each draw in turn; zero for a single draw.

        The jackknife, :math:`(S - 1) / S \sum_s (m_{-s} - \bar m)^2`. Where few draws carry the rows, the delta method
        gives 0.7 of the spread that repetitions show, since it takes the shares that were drawn for all there are; the
        jackknife gives 1.0 to 1.3 of it. Efron and Stein, The jackknife estimate of variance, Ann. Statist. 9, 1981.
        """
        m = self._left_out / max(self.rows, 1)
        return float((((m - m.mean()) ** 2).sum() * (self.draws - 1) / self.draws).sqrt())

    def gap(self) -> tuple[float, float] | None:
        """Mean under the weights minus the plain mean, nats per row, and its standard error (delta method)."""
        if self.weights is None or self.draws == 1 or not math.isfinite(self._gap):
            return None
        return self._gap / self.rows, float((self._influence / self.rows).square().sum().sqrt())


def _without_each(logs: Tensor) -> Tensor:
    """log of the sum over all draws but one, for each that is left out; shape as given (draws x rows)."""
    total, top = torch.logsumexp(logs, 0), logs.argmax(0, keepdim=True)
    share = (logs - total).exp().scatter(0, top, 0.0)  # that of the largest may be 1 to rounding: done apart
    rest = torch.logsumexp(logs.scatter(0, top, -torch.inf), 0)
    return (total + torch.log1p(-share)).scatter(0, top, rest[None])


def weighed_parameters(fit: Fit, draws: int, particles: int) -> tuple[list[dict[str, Tensor]], Tensor] | None:
    """Draws of the globals from a guide, and normalised log weights (draws) that make them draws of the posterior.

    None where weights cannot be had, would cost more than the evidence itself (over `MAX_ELEMENTS` numbers, or data
    that are not in memory), or, with latents of rows in the guide, are too noisy to be used. Inside ``fit.bound()``.
    """
    info = fit.info
    guided = info.guide_sites or {}
    if fit.judged_by != "weights" or "density" not in info.offers or point_sites(info) or fit.data.beyond_memory:
        return None
    local = any(site.local and site.name in guided for site in info.select())
    sums = bool(summed_globals(fit, guided))
    cells = numbers(fit, fit.data) * draws * (particles if local else 1)
    if draws < MIN_DRAWS or cells > MAX_ELEMENTS or (local and sums):
        return None
    if draws > ALONE // (5 if local else 1) or not any(not s.local and s.name in guided for s in info.select()):
        return None
    found = weighed_draws(fit, draws, particles)
    ratios = found.log_weights.numpy()
    if len(ratios) < draws or np.isnan(ratios).any() or not np.isfinite(ratios.max()):
        return None
    if local and pareto_k(ratios) > pareto_k_threshold(draws):
        return None
    thetas = [{name: value[i] for name, value in found.values.items()} for i in range(draws)]
    if sums and info.data_plate is not None:
        thetas = extended(fit, thetas)
    return thetas, torch.as_tensor(smoothed_weights(ratios))


@dataclass(frozen=True)
class Normaliser:
    """log of the mean of importance weights: its value, standard error, k-hat, and whether that error holds."""

    value: float
    stderr: float
    pareto_k: float | None
    reliable: bool


def normaliser(log_weights: Tensor) -> Normaliser:
    r"""log 1/S sum_s w_s of smoothed weights and its standard error; infinite where k-hat is above its limit.

    With shares :math:`v_s` of the smoothed weights,
    :math:`\mathrm{se}^2 = \mathrm{var}(S v) / S + (v_{\max} / (1 - k))^2`.
    The second term is what a Pareto tail of shape k holds beyond the largest draw, which no spread over draws shows;
    it matters for k above 0.4. Weights that are nearly equal (`NEARLY_EQUAL`) are no fault of a guide, whatever their
    k-hat, and count with that of the limit. With fewer than `ENOUGH` draws there is no k-hat, and the error is that of
    the draws as they are; a single one shows none (NaN). Without a finite weight the value is -inf or NaN, the error
    infinite.

    >>> normaliser(torch.full((100,), -3.0).double()).value
    -3.0
    """
    logs = log_weights.detach().double().cpu()
    n = len(logs)
    raw = float(torch.logsumexp(logs, 0)) - math.log(n)
    if not math.isfinite(raw):
        return Normaliser(raw, math.inf, math.inf if n >= ENOUGH else None, False)
    if n < ENOUGH:
        relative = (logs - raw).exp()
        return Normaliser(raw, float(relative.std()) / math.sqrt(n) if n > 1 else math.nan, None, False)
    ratios = logs.numpy()
    k, smooth = pareto_k(ratios), smoothed_weights(ratios)
    # Below the tail smoothing changes nothing but the sum, so the largest that is in no tail gives the normaliser.
    body = int(np.argsort(ratios)[n // 2])
    value = float(ratios[body] - smooth[body]) - math.log(n) if np.isfinite(ratios[body]) else raw
    shares = np.exp(smooth)
    limit = pareto_k_threshold(n)
    if k > limit and effective_sample_size(smooth) < NEARLY_EQUAL * n:
        return Normaliser(value, math.inf, k, False)
    beyond = (float(shares.max()) - 1 / n) / (1 - min(max(k, 0.0), limit))  # equal weights have no tail
    return Normaliser(value, math.hypot(float(shares.std(ddof=1)) * math.sqrt(n), beyond), k, True)
