r"""Mass of the posterior that weighted draws of a guide do not hold, as short chains show it.

Weights say nothing of places in which the guide put no draw. A k-hat of a thousand draws scatters by 0.15: where it is
1 (a guide of independent numbers for a correlated posterior) it is at times below its limit, and the estimate then lies
below log p(x) by what the draws missed, with a small error. Chains that began at the guide's draws and moved towards
the posterior go where the draws did not, so that the two disagree on how much mass lies far from the guide's centre.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ppl_gen.diagnostics.looks import look_at_guide
from ppl_gen.diagnostics.moments import matrix, unconstrained
from ppl_gen.diagnostics.short_chains import scale_of
from ppl_gen.inference.guides.resolved import point_sites

if TYPE_CHECKING:
    from ppl_gen.diagnostics.second_look import SecondLook
    from ppl_gen.fits.result import Fit

__all__ = ["beyond", "kept_look", "missed"]

DRAWS = 1000  # those of a verdict, whose chains these are
CERTAIN = 4.0  # standard errors; several quantiles are tried, so that an exact guide is flagged less than once in 5000
LEVELS = (0.5, 0.8, 0.9, 0.95, 0.99, 1.0)


def kept_look(fit: Fit, draws: int) -> SecondLook | str:
    """The short chains of a fit, made once: its verdict and its marginal likelihood both look at them."""
    key = ("look", draws)
    if key not in fit.computed:
        fit.computed[key] = look_at_guide(fit, draws)
    found: SecondLook | str = fit.computed[key]
    return found


def missed(fit: Fit, values: Mapping[str, Tensor], log_weights: np.ndarray) -> str:
    """What the weighted draws ``values`` (normalised log weights) lack of the posterior; empty where nothing was seen.

    The chains are those of the verdict, and are run once for a fit.
    """
    if point_sites(fit.info):
        return ""
    look = kept_look(fit, DRAWS)
    if isinstance(look, str):
        return ""
    if look.elsewhere:
        return (
            f"{look.elsewhere} of {look.dispersed} short chains started elsewhere settled where the guide has no mass"
        )
    columns = _columns(fit, values, look)
    if columns is None:
        return ""
    drawn, chosen = columns
    own = torch.as_tensor(look.draws[:, chosen])
    share, errors = beyond(_distance(drawn, own), log_weights, _distance(look.end[:, chosen], own), look.chains)
    if errors <= CERTAIN:
        return ""
    return f"{share:.0%} of {look.chains} short chains went beyond what the weighted draws hold"


def _columns(fit: Fit, values: Mapping[str, Tensor], look: SecondLook) -> tuple[np.ndarray, list[int]] | None:
    """The numbers that draws and chains both know, on the unconstrained scale: draws x numbers, and their places."""
    with fit.bound():
        found, names = matrix(unconstrained(fit, fit.data.batch(), values))
    at = {name: j for j, name in enumerate(names)}
    chosen = [j for j, name in enumerate(look.names) if name in at]
    return (found[:, [at[look.names[j]] for j in chosen]], chosen) if chosen else None


def _distance(u: np.ndarray, draws: Tensor) -> np.ndarray:
    """How far from the centre of draws, in units of their spread and by their correlations where these are known."""
    scale, apart = scale_of(draws), torch.as_tensor(u) - draws.mean(0)
    if scale.dim() == 1:
        return (apart / scale).norm(dim=1).cpu().numpy()
    return torch.linalg.solve_triangular(scale, apart.T, upper=False).norm(dim=0).cpu().numpy()


def beyond(inside: np.ndarray, log_weights: np.ndarray, outside: np.ndarray, chains: int) -> tuple[float, float]:
    r"""How much more often chains end far out than weighted draws lie there: the share of chains, and standard errors.

    ``inside``: distances of draws, with normalised ``log_weights``; ``outside``: those of the ends of ``chains``
    chains (several of each). At each of the weighted quantiles `LEVELS` the shares p of draws and q of chains beyond it
    are compared as :math:`2 \arcsin \sqrt p`, whose error hardly depends on p: :math:`1 / \sqrt n` for n chains and, as
    :math:`p (1 - p) / n` is the variance of a share, that of the weighted one with
    :math:`p (1 - p) / n = \sum_s v_s^2 (1_s - p)^2`. The largest difference in errors counts.

    >>> rng = np.random.default_rng(0)
    >>> near, far = np.abs(rng.normal(size=2000)), np.abs(2 * rng.normal(size=200))
    >>> equal = np.full(2000, -np.log(2000))
    >>> beyond(near, equal, near[:200], 200)[1] < 4 < beyond(near, equal, far, 200)[1]
    True
    """
    order = np.argsort(inside)
    distance, v = inside[order], np.exp(log_weights)[order]
    v = v / v.sum()
    reached, least = np.cumsum(v), float((v**2).sum())
    best = (0.0, 0.0)
    for level in LEVELS:
        at = min(int(np.searchsorted(reached, level)), len(v) - 1)
        far = np.arange(len(v)) > at
        share, q = float(v[far].sum()), float((outside > distance[at]).mean())
        p = min(max(share, least), 0.5)  # what no draw shows may hold as much as one of them
        known = max(float((v**2 * (far - share) ** 2).sum()) / (p * (1 - p)), least)
        errors = 2 * (np.arcsin(q**0.5) - np.arcsin(p**0.5)) / (1 / chains + known) ** 0.5
        if errors > best[1]:
            best = (q, float(errors))
    return best
