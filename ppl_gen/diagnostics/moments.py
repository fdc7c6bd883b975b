"""Means and spreads of a fit beside those of the posterior, as importance weights or short chains show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to

from ppl_gen.data.batching import Batch
from ppl_gen.handlers.substitute import Substitute

if TYPE_CHECKING:
    from ppl_gen.fits.result import Fit

__all__ = ["Moments", "between_draws", "compared", "matrix", "unconstrained", "varying", "weighted"]

HEAVY = 8.0  # kurtosis of the fit's draws above which a standard deviation says little; a normal has 3, a Laplace 6
NEVER = (0.5, 1.6)  # posterior sd, times: a fit farther off is never trusted


@dataclass(frozen=True)
class Moments:
    """How far a fit is from the posterior in each number that was looked at.

    ``shift``: fit's mean less the posterior's, in posterior sd; ``ratio``: fit's sd over the posterior's; ``names``: a
    label for each; ``rows``: the row that each belongs to, -1 for what all rows share; None where none belongs to one;
    ``shift_error``, ``ratio_error``: standard errors of the shift and of the logarithm of the ratio, where known.
    Numbers are on their unconstrained scale (the logarithm of what is positive).
    """

    shift: np.ndarray
    ratio: np.ndarray
    names: Sequence[str]
    rows: np.ndarray | None = None
    shift_error: np.ndarray | float = 0.0
    ratio_error: np.ndarray | float = 0.0

    @property
    def farthest(self) -> tuple[float, str]:
        """The largest shift, without its sign, and where."""
        worst = int(np.abs(self.shift).argmax())
        return float(abs(self.shift[worst])), self.names[worst]

    @property
    def uneven(self) -> tuple[float, str]:
        """The ratio farthest from one, and where."""
        worst = int(np.abs(np.log(np.maximum(self.ratio, 1e-12))).argmax())
        return float(self.ratio[worst]), self.names[worst]

    def past(self, shift: float, ratio: float, errors: float = 0.0) -> np.ndarray:
        """Which are farther off than ``shift`` or outside of 1 / ``ratio`` to ``ratio``, or may be, by ``errors``."""
        far, uneven = np.abs(self.shift), np.abs(np.log(np.maximum(self.ratio, 1e-12)))
        return (far + errors * self.shift_error > shift) | (uneven + errors * self.ratio_error > np.log(ratio))

    def beyond(self, shift: float, ratio: float) -> np.ndarray:
        """Which numbers are `past` these limits; or may be, by two standard errors, what must never pass, `NEVER`."""
        return self.past(shift, ratio) | self.past(*NEVER, errors=2.0)

    def shared(self) -> Moments:
        """The numbers that belong to no row."""
        return self if self.rows is None else self._some(self.rows < 0)

    def of_rows(self) -> Moments:
        """The numbers that belong to a row."""
        return self._some(np.zeros(len(self.shift), bool) if self.rows is None else self.rows >= 0)

    def _some(self, keep: np.ndarray) -> Moments:
        names = [name for name, kept in zip(self.names, keep, strict=True) if kept]
        errors = [e[keep] if isinstance(e, np.ndarray) else e for e in (self.shift_error, self.ratio_error)]
        rows = None if self.rows is None else self.rows[keep]
        return Moments(self.shift[keep], self.ratio[keep], names, rows, *errors)

    @property
    def count_rows(self) -> int:
        """How many rows were looked at."""
        return 0 if self.rows is None else len(np.unique(self.rows[self.rows >= 0]))

    def rows_beyond(self, shift: float, ratio: float) -> float:
        """The share of rows of which any number is; 0 without rows."""
        if self.rows is None or not self.count_rows:
            return 0.0
        off = self.rows[self.beyond(shift, ratio) & (self.rows >= 0)]
        return len(np.unique(off)) / self.count_rows


def weighted(values: Mapping[str, Tensor], log_weights: np.ndarray) -> Moments | None:
    r"""Draws' own moments against their importance-weighted ones, :math:`\sum_s w_s u_s`.

    ``values``: numbers, draws x shape of the site, on an unconstrained scale; ``log_weights``: as
    `ppl_gen.weights.psis.smoothed_weights` gives them. None without any number that varies.

    >>> import torch
    >>> u = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> found = weighted({"u": u}, np.full(4000, -np.log(4000)))
    >>> float(found.shift[0]), round(float(found.ratio[0]), 6)
    (0.0, 1.0)
    """
    u, names = matrix(values)
    if not names:
        return None
    shift, ratio, *errors = compared(u, np.exp(log_weights)[:, None])
    return Moments(shift, ratio, names, None, *errors)


def compared(u: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    r"""Shift and ratio of draws ``u`` against themselves weighted by ``w``, with standard errors (of log ratio).

    ``u``: draws x numbers; ``w``: the same, or draws x 1. Each of the four has one entry for every number.

    Both sides come from the same draws, and their errors largely cancel. To first order the shift :math:`d` and the
    logarithm of the ratio move, by draw s, by

    .. math:: \frac{(u_s - \bar u) / S - w_s (u_s - m)}{\sigma} - \frac{d}{2} w_s (z_s^2 - 1), \qquad
              \frac{(u_s - \bar u)^2 / \bar\sigma^2 - 1}{2 S} - \frac{w_s (z_s^2 - 1)}{2},
              \qquad z_s = (u_s - m) / \sigma,

    which is nothing at all where the weights are equal.
    """
    w = w / w.sum(0)
    mean, own_mean = (w * u).sum(0), u.mean(0)
    tiny = 1e-12 * (1.0 + np.abs(mean))
    sd = np.maximum(np.sqrt((w * (u - mean) ** 2).sum(0)), tiny)
    own = np.maximum(u.std(0), tiny)
    shift = (own_mean - mean) / sd
    spread = w * (((u - mean) / sd) ** 2 - 1) / 2
    first = ((u - own_mean) / len(u) - w * (u - mean)) / sd - shift * spread
    second = (((u - own_mean) / own) ** 2 - 1) / (2 * len(u)) - spread
    return shift, own / sd, np.sqrt((first**2).sum(0)), np.sqrt((second**2).sum(0))


def between_draws(fit: np.ndarray, end: np.ndarray, names: Sequence[str], rows: np.ndarray | None = None) -> Moments:
    """Draws of a fit against draws of the posterior, ``end``, where short chains led from them: draws x numbers.

    Where the fit's draws have heavy tails, medians and the spread of the middle two thirds stand for mean and sd.
    """
    centred = fit - fit.mean(0)
    kurtosis = (centred**4).mean(0) / np.maximum((centred**2).mean(0) ** 2, 1e-300)
    low, middle, high = (np.quantile(end, q, axis=0) for q in (0.16, 0.5, 0.84))
    own_low, own_middle, own_high = (np.quantile(fit, q, axis=0) for q in (0.16, 0.5, 0.84))
    heavy = kurtosis > HEAVY
    scale = np.where(heavy, (high - low) / 2, end.std(0))
    scale = np.maximum(scale, 1e-12 * (1.0 + np.abs(middle)))
    shift = np.where(heavy, own_middle - middle, fit.mean(0) - end.mean(0)) / scale
    ratio = np.where(heavy, (own_high - own_low) / 2, fit.std(0)) / scale
    return Moments(shift, ratio, names, rows)


def matrix(values: Mapping[str, Tensor]) -> tuple[np.ndarray, list[str]]:
    """The numbers of all sites that are finite and vary, draws x numbers, and a label for each."""
    columns, names = [], []
    for name, value in values.items():
        flat = value.detach().double().cpu().numpy().reshape(len(value), -1)
        labels = [name + (str(list(i)) if i else "") for i in np.ndindex(tuple(value.shape[1:]))]
        keep = varying(flat)
        columns.append(flat[:, keep])
        names += [label for label, kept in zip(labels, keep, strict=True) if kept]
    return (np.concatenate(columns, 1) if columns else np.empty((0, 0))), names


def varying(u: np.ndarray) -> np.ndarray:
    """Which numbers (all axes but the first, that of draws) are finite in every draw, and not all the same."""
    finite = np.isfinite(u).all(0)
    u = np.where(finite, u, 0.0)
    return finite & (u.std(0) > 1e-9 * (1e-300 + np.abs(u).max(0)))


def unconstrained(fit: Fit, batch: Batch, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values of latent sites (draws x shape) on the scale on which their support is a whole space; inside ``bound()``.

    Sites that are not latent (derived ones) stay as they are, those that are finite are left out.
    """
    with Substitute({name: value[0] for name, value in values.items()}):
        trace = poutine.trace(fit.program.model).get_trace(*batch.args, **batch.kwargs)
    found = {}
    for name, value in values.items():
        node = trace.nodes.get(name)
        if node is None or not value.is_floating_point():
            continue
        found[name] = value
        if fit.info.sites[name].kind == "latent":
            try:
                found[name] = biject_to(node["fn"].support).inv(value)
            except (NotImplementedError, RuntimeError, ValueError):
                pass  # a support without a bijection, or one that moves with another site: as it is
    return found
