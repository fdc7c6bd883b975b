"""The posterior of a fit as arrays, chain x draw x shape, as many draws and rows as can be held."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ppl_gen.draws.predictive import amortised, prior_rows
from ppl_gen.enumeration.finite_globals import extended, summed_globals
from ppl_gen.weights.densities import derived
from ppl_gen.weights.psis import MIN_DRAWS
from ppl_gen.weights.weighed import joint_draws
from ppl_gen.workspace.isolation import isolated

if TYPE_CHECKING:
    from ppl_gen.fits.result import Fit

__all__ = ["MAX_ELEMENTS", "Groups", "affordable_rows", "as_array", "latent_summary_names", "posterior_groups"]

Groups = dict[str, dict[str, np.ndarray]]

MAX_ELEMENTS = 20_000_000  # numbers of latent draws held at once: 160 MB


def affordable_rows(fit: Fit, draws: int) -> Fit:
    """The fit with its first rows only, where ``draws`` draws of latents and observations of every row are too many.

    Only where rows stand for themselves (an amortised guide, and no global latents), or lie in a file that is too large
    for memory. Inside ``fit.bound()``.
    """
    rows = fit.data.rows
    if fit.data.beyond_memory and (amortised(fit) or not fit.info.select(local=True)):
        return replace(fit, data=fit.data.excerpt())  # what the draws do not depend on
    if rows is None or fit.info.select(local=False) or not amortised(fit):
        return fit
    few = fit.data.template(2)
    drawn = prior_rows(fit.program.model, few, 1)
    cells = sum(value.numel() for value in drawn.values()) // 2
    most = max(25, MAX_ELEMENTS // max(1, draws * cells))
    return fit if rows <= most else replace(fit, data=fit.data.subset(torch.arange(most, device="cpu")))


def posterior_groups(fit: Fit, draws: int, *, together: bool = False) -> tuple[Groups, dict[str, Any]]:
    """The posterior group (chain x draw x shape) with deterministic sites; inside ``fit.bound()``.

    ``together``: a guide's draws all at once, which is faster, by other random numbers than one after the other.
    """
    latents = {site.name for site in fit.info.select()}
    posterior: dict[str, np.ndarray] = {}
    if (held := _held_draws(fit)) is not None:
        posterior = {name: as_array(value) for name, value in held.items()}
        wanted = [s.name for s in fit.info.select(kind="deterministic", local=False) if s.name not in posterior]
        if wanted:
            chains = len(next(iter(held.values())))
            flat = {n: v.flatten(0, 1) for n, v in held.items()}
            total = len(next(iter(flat.values())))
            rows = derived(fit, fit.data.batch(), [{n: v[i] for n, v in flat.items()} for i in range(total)])
            for name in wanted:
                stacked = torch.stack([row[name] for row in rows])
                posterior[name] = as_array(stacked.unflatten(0, (chains, -1)))
    elif latents:
        known = extended(fit, _affordable_draws(fit, draws, together))
        known = [{k: v for k, v in draw.items() if k in latents} for draw in known]
        if known and known[0]:
            extra = derived(fit, fit.data.batch(), known)
            full = [draw | more for draw, more in zip(known, extra, strict=True)]
            posterior = {name: as_array(torch.stack([d[name] for d in full]))[None] for name in full[0]}
    return {"posterior": posterior}, {"kind": fit.learned.kind}


def _held_draws(fit: Fit) -> dict[str, Tensor] | None:
    """All draws that the posterior holds with the finite globals that they summed out: chains x draws x shape, once."""
    held = fit.learned.by_chain()
    if held is None or not summed_globals(fit, held):
        return None if held is None else dict(held)
    if "finite globals" not in fit.computed:
        flat = {name: value.flatten(0, 1) for name, value in held.items()}
        chains, draws = next(iter(held.values())).shape[:2]
        with isolated(fit.seed, dtype=fit.data.dtype):
            full = extended(fit, [{name: value[i] for name, value in flat.items()} for i in range(chains * draws)])
        stacked = {name: torch.stack([draw[name] for draw in full]) for name in full[0]}
        fit.computed["finite globals"] = {n: v.unflatten(0, (chains, -1)) for n, v in stacked.items()}
    found: dict[str, Tensor] = fit.computed["finite globals"]
    return found


def _affordable_draws(fit: Fit, draws: int, together: bool = False) -> list[dict[str, Tensor]]:
    """``draws`` draws, or as many as stay within `MAX_ELEMENTS` numbers (25 at least): locals times rows are many."""
    batch = fit.data.batch()
    if not fit.learned.independent:
        shapes = [(*site.batch_shape, *site.event_shape) for site in fit.info.select()]
        size = sum(math.prod(shape) for shape in shapes)
        return fit.learned.draw(min(draws, max(MIN_DRAWS, MAX_ELEMENTS // max(1, size))), batch)
    first = fit.learned.draw(1, batch)
    size = sum(torch.as_tensor(value).numel() for draw in first for value in draw.values())
    count = min(draws, max(MIN_DRAWS, MAX_ELEMENTS // max(1, size)))
    if together:
        return joint_draws(fit, count, batch)
    return [*first, *(fit.learned.draw(count - 1, batch) if count > 1 else [])]


def latent_summary_names(fit: Fit) -> list[str]:
    """Sites a summary table shows: globals and what is derived from them; locals by row only when they are few."""
    few = [s.name for s in fit.info.select(local=True) if not s.finite and (fit.data.rows or 0) <= 50]
    return [s.name for s in fit.info.sites.values() if s.kind != "observed" and (not s.local or s.name in few)]


def as_array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
