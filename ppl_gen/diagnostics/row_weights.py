"""Importance weights of the latents of rows, row by row, and the moments that these imply."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import biject_to

from ppl_gen.data.batching import Batch
from ppl_gen.diagnostics.moments import Moments, compared, varying
from ppl_gen.draws.new_data import follows_rows
from ppl_gen.enumeration.finite_globals import extended, summed_globals
from ppl_gen.handlers.followed import Watch
from ppl_gen.inference.guides.guide_list import holds_rows
from ppl_gen.program.info import ProgramInfo
from ppl_gen.weights.log_weights import global_draw, sampled
from ppl_gen.weights.particles import can_vectorise, local_log_weights
from ppl_gen.weights.psis import row_subset, smoothed_with_k
from ppl_gen.weights.summed_particles import can_sum_together
from ppl_gen.weights.weighed import COST, affordable

if TYPE_CHECKING:
    from ppl_gen.fits.result import Fit

__all__ = ["RowWeights", "weigh_rows"]

MAX_ROWS = 200  # rows that are looked at: the share of bad ones is then known to 0.035
NUMBERS = 50  # of each site and row whose moments are compared
GLOBALS = 10  # draws of the globals given which rows are weighed: a row's posterior is an average over them
MAX_ELEMENTS = 4_000_000  # numbers of data times draws held at once


@dataclass(frozen=True)
class RowWeights:
    """k-hat of some rows, the share of draws that are effective, the moments compared, and by how many draws."""

    k: np.ndarray
    shares: np.ndarray
    moments: Moments | None
    draws: int


def weigh_rows(fit: Fit, draws: int) -> RowWeights:
    r"""``draws`` or a few more of the locals of at most `MAX_ROWS` rows, weighed; call inside ``fit.bound()``.

    Given a draw :math:`\theta` of the guide's globals a row's weights are :math:`p(x_i, z | \theta) / q(z)`. They are
    normalised for each such draw: what they stand for is :math:`\int p(z | x_i, \theta) q(\theta) d\theta`.
    """
    info, rows = fit.info, fit.data.rows or 1
    chosen = torch.as_tensor(row_subset(rows, MAX_ROWS))
    some = fit.data.subset(chosen)
    # An autoguide's rows cannot be taken apart: weigh all of them, keep some.
    whole = holds_rows(fit.guide) or not follows_rows(fit, some.batch())
    batch = fit.data.batch() if whole else some.batch()
    draws = affordable(fit, draws) if whole else affordable(fit, draws, rows=some, free=COST, most=sys.maxsize)
    seen = _Seen(fit, chosen if whole else None)
    blocks = GLOBALS if info.select(local=False) and draws >= 2 * GLOBALS else 1
    known = [_globals(fit) for _ in range(blocks)]
    coupling = summed_globals(fit, info.guide_sites or {})
    sums = tuple(n for n in info.finite_latents if n not in (info.guide_sites or {}) and n not in coupling)
    vectorise = can_vectorise(fit.joint, fit.guide, info, batch, sums)
    vectorise = vectorise or can_sum_together(fit.joint, fit.guide, info, batch, sums)
    parts = [seen.weigh(batch, math.ceil(draws / blocks), values, sums, vectorise) for values in known]
    if blocks > 1:
        parts = [part - part.logsumexp(0).nan_to_num(neginf=0.0) for part in parts]
    logs, k = smoothed_with_k(torch.cat(parts).double().cpu().numpy())
    weights = np.exp(logs)
    shares = np.nan_to_num(1 / (len(logs) * (weights**2).sum(0)))
    return RowWeights(k, shares, _moments(seen.values(), weights, chosen.numpy()), len(logs))


def _globals(fit: Fit) -> dict[str, Tensor]:
    """One draw of what the guide draws outside the data plate; finite sites there given it and all rows."""
    info = fit.info
    if summed_globals(fit, info.guide_sites or {}):
        return _with_finite_globals(fit)
    if not info.select(local=False):
        return {}
    drawn_on = fit.data.glimpse() if info.data_plate else fit.data.batch()
    return global_draw(fit.guide, drawn_on, info)[0]  # auxiliary draws included: the locals may depend on them


def _with_finite_globals(fit: Fit) -> dict[str, Tensor]:
    """One draw of what the guide draws outside the data plate, and of the finite sites there given it and all rows."""
    drawn = sampled(fit.guide, fit.data.batch()).nodes.items()
    every = {name: site["value"] for name, site in drawn if site["type"] == "sample"}
    sites = {**(fit.info.guide_sites or {}), **fit.info.sites}
    return {n: value for n, value in extended(fit, [every])[0].items() if n in sites and not sites[n].local}


class _Seen:
    """Weighs rows, and keeps what guide and model said of their latents on the way.

    Args:
        fit: the fit.
        chosen: the rows to keep, where all are weighed.
    """

    def __init__(self, fit: Fit, chosen: Tensor | None) -> None:
        self._fit, self._chosen = fit, chosen
        self._names = [site.name for site in fit.info.select(local=True) if not site.finite]
        self._drawn: dict[str, list[Tensor]] = {}
        self._supports: dict[str, Any] = {}

    def weigh(
        self, batch: Batch, draws: int, values: dict[str, Tensor], sums: tuple[str, ...], together: bool
    ) -> Tensor:
        """Log weights in nats, draws x rows kept, as many at a time as `MAX_ELEMENTS` allows."""
        model, guide = self._watched(self._fit.joint, self._see_model), self._watched(self._fit.guide, self._see_guide)
        cells = sum(v.numel() for v in (*batch.args, *batch.kwargs.values()) if isinstance(v, Tensor))
        most, parts = max(1, MAX_ELEMENTS // max(1, cells)) if together else 1, []
        while draws > 0:
            count = min(most, draws)
            found = local_log_weights(
                model, guide, self._fit.info, batch, count, values=values, sums=sums, vectorise=together
            )
            assert found.rows is not None
            rows = found.rows if found.rows.dim() == 2 else found.rows[None]
            parts.append(rows.detach() if self._chosen is None else rows.detach()[:, self._chosen])
            values = {**values, **found.subsample}
            draws -= count
        return torch.cat(parts)

    def _watched(self, run: Callable[..., Any], see: Callable[[Any], None]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            with Watch(self._names, see):
                return run(*args, **kwargs)

        return watched

    def _see_model(self, msg: Any) -> None:
        self._supports[msg["name"]] = msg["fn"].support

    def _see_guide(self, msg: Any) -> None:
        rows = _by_row(msg["value"].detach(), msg["fn"].event_dim, self._fit.info)
        self._drawn.setdefault(msg["name"], []).append(rows if self._chosen is None else rows[:, self._chosen])

    def values(self) -> dict[str, Tensor]:
        """By site, draws x rows x numbers, on an unconstrained scale where there is one."""
        found = {}
        for name, parts in self._drawn.items():
            value = torch.cat(parts)
            try:
                value = biject_to(self._supports[name]).inv(value)
            except (KeyError, NotImplementedError, RuntimeError, ValueError):
                pass  # a support without a bijection, or one that moves with another site: as it is
            found[name] = value.flatten(2) if value.dim() > 2 else value[..., None]
        return found


def _by_row(value: Tensor, event: int, info: ProgramInfo) -> Tensor:
    """Draws x rows x what is left, from particles x plates x event."""
    lead = info.plate_nesting + 1
    value = value[(None,) * max(0, lead - (value.dim() - event))]
    dim = -1 if info.plate_dim is None else info.plate_dim
    return value.movedim(lead + dim, 1)


def _moments(values: dict[str, Tensor], weights: np.ndarray, rows: np.ndarray) -> Moments | None:
    """The draws' own moments of each row against the weighted ones; rows without weights are left out.

    ``values``: draws x rows x numbers; ``weights``: draws x rows; ``rows``: the number of each row.
    """
    numbers, names, of = [], [], []
    valid = np.isfinite(weights).all(0)
    w = weights[:, valid, None]
    for name, value in values.items():
        u = value[..., :NUMBERS].double().cpu().numpy()
        u = np.broadcast_to(u, (len(w), len(rows), u.shape[-1]))[:, valid]
        keep = varying(u)
        if not keep.any():
            continue
        numbers.append(np.stack(compared(u[:, keep], np.broadcast_to(w, u.shape)[:, keep])))
        places = np.argwhere(keep)
        of.append(rows[valid][places[:, 0]])
        single = u.shape[-1] == 1
        names += [f"{name}[{rows[valid][i]}]" if single else f"{name}[{rows[valid][i]}, {j}]" for i, j in places]
    if not names:
        return None
    shift, ratio, *errors = np.concatenate(numbers, 1)
    return Moments(shift, ratio, names, np.concatenate(of), *errors)
