"""What is said at once of a fit that is bad, as one Python warning: what costs next to nothing to see."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ppl_gen.errors import FitWarning

if TYPE_CHECKING:
    from ppl_gen.diagnostics.verdicts import Verdict
    from ppl_gen.fits.result import Fit

__all__ = ["complaint", "warn_if_bad", "warn_of_weights"]

NUMBERS = 200  # of a posterior that are looked at: the summary of one takes about a millisecond
_FEW = 100  # effective draws per chain (Vehtari et al. 2021)
_R_HAT = 1.01


def warn_if_bad(fit: Fit) -> None:
    """One `FitWarning` with all that is wrong, pointing at the caller of `pg.fit`; nothing where nothing is seen."""
    found = complaint(fit)
    if found:
        warnings.warn(FitWarning(f"{fit.algorithm} on {fit.program.name!r}: {found}"), stacklevel=3)


def warn_of_weights(fit: Fit, found: Verdict) -> None:
    """One `FitWarning` for a guide that is not trusted, when its weights are first looked at; for the methods of `Fit`.

    Not at the end of the fit: weights cost more than 5 % of a short one, and without `torch.vmap` more than all of it.
    """
    if found.trusted or fit.judged_by not in ("weights", "draws") or "warned" in fit.computed:
        return
    fit.computed["warned"] = True
    warnings.warn(FitWarning(f"{fit.algorithm} on {fit.program.name!r}: {found}"), stacklevel=3)


def complaint(fit: Fit) -> str:
    """What is wrong with chains, and the notes on starts and columns; `Fit.verdict` judges the rest of other fits.

    Chains are bad that diverge, end at the largest tree depth, disagree (R-hat above 1.01), have an effective sample
    size under 100 per chain, or do not move. Columns that chains could do with are not mentioned,
    nor constant ones of what networks learn.
    """
    if str(fit.status) == "interrupted":
        return ""
    said = []
    if fit.judged_by == "chains":
        said = [_chains(fit)]
        if not said[0]:
            return ""
    pixels = not said and any("$$$" in name for name in fit.state.params)  # networks take images, with black borders
    named = ("starts", "repeated values", *(() if pixels else ("constant columns",)), "unscaled columns", "inputs")
    return " ".join([*said, *(f"Note on {name}: {fit.notes[name]}." for name in named if name in fit.notes)])


def _chains(fit: Fit) -> str:
    from ppl_gen.bridge import az_summary, to_tree
    from ppl_gen.diagnostics.verdicts import verdict_chains

    held = fit.learned.by_chain() or {}
    draws = _looked_at(fit, held)
    stats = {name: int(value.sum()) for name, value in fit.learned.stats.items() if value.dtype is torch.bool}
    diverging, saturated = stats.get("diverging", 0), stats.get("reached_max_treedepth", 0)
    chains, length = next(iter(held.values())).shape[:2]
    frame = az_summary(to_tree({"posterior": draws}), chains=True)
    varying = frame[frame["sd"] > 0]
    few = varying[["ess_bulk", "ess_tail"]].fillna(0.0).min().min() < _FEW * chains
    apart = chains > 1 and not (varying["r_hat"] <= _R_HAT).all()
    if diverging or saturated or few or apart or not np.isfinite(frame["mean"]).all() or not len(varying):
        return str(verdict_chains(frame, diverging, chains * length, chains=chains, saturated=saturated))
    return ""


def _looked_at(fit: Fit, held: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Draws (chains x draws x shape) of the first numbers, those that all rows share before those of single rows."""
    local = {site.name for site in fit.info.select(local=True)}
    left, result = NUMBERS, {}
    for name in sorted(held, key=lambda name: name in local):
        value = held[name].detach().cpu()
        size = value[0, 0].numel()
        if left > 0 and size:
            result[name] = (value if size <= left else value.flatten(2)[..., :left]).double().numpy()
            left -= size
    return result
