"""Evidence: log p(x) per row on one yardstick, whatever learned the program."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ppl_gen.data.batching import Dataset
from ppl_gen.diagnostics.integration import RowIntegral, row_integral
from ppl_gen.diagnostics.weighed import weighed_draws
from ppl_gen.errors import IncompatibleError, require_whole
from ppl_gen.finite_globals import summed_globals
from ppl_gen.inference.guides import point_sites
from ppl_gen.newrows import follows_rows
from ppl_gen.posterior import PointPosterior
from ppl_gen.predictive import global_draws

if TYPE_CHECKING:
    from ppl_gen.result import Fit

__all__ = ["Evidence", "marginal_likelihood", "row_evidence"]


@dataclass(frozen=True)
class Evidence:
    """log p(x) in nats: the mean over rows, and how well it is known.

    ``mean`` and ``stderr`` (spread over rows / sqrt(rows)); ``mc_stderr`` the Monte Carlo error of the mean; ``kind``
    how it was computed; ``exact`` whether no sampling took part; ``values`` per row. Of importance weights:
    ``effective_draws`` per row, (sum w)^2 / sum w^2; ``pareto_k``, the median over rows (of a single number, its own),
    and ``pareto_k_rows`` for at most 200 rows spread over the data.
    """

    mean: float
    stderr: float
    mc_stderr: float
    rows: int
    kind: str
    exact: bool
    values: Tensor
    pareto_k: float | None = None
    pareto_k_rows: Tensor | None = None
    effective_draws: Tensor | None = None

    def __repr__(self) -> str:
        carried = "" if self.effective_draws is None else f", {float(self.effective_draws.median()):.0f} effective"
        tail = "" if self.exact else f"{carried} (Monte Carlo {self.mc_stderr:.2g})"
        per = "per row" if self.rows > 1 else "in all"
        return f"Evidence({self.mean:.4f} +- {self.stderr:.4f} nats {per}, {self.rows} rows, {self.kind}{tail})"


def row_evidence(
    fit: Fit, data: Dataset, *, particles: int, draws: int, chunk: int, seed: int | None = None
) -> Evidence:
    r"""log 1/S sum_s p(x_i | theta_s) per row; see `Fit.evidence`.

    A program's own closed form is used where it offers one. Else finite latents are summed out; continuous local
    latents are integrated by importance weighting with the guide as proposal where it is amortised and has a density
    (a point estimate has none), else with the prior. Rows are taken ``chunk`` at a time, and particles as many at a
    time as memory likes. Where few draws carry the estimate of half of the rows, a UserWarning says so.
    """
    _require_density(fit)
    for name, value in (("particles", particles), ("draws", draws), ("chunk", chunk)):
        require_whole(name, value)
    with fit.bound(seed):
        first = next(iter(data.chunks(chunk)))
        if not follows_rows(fit, first):
            chunk, first = data.rows or chunk, data.batch()  # a plate of a size of its own: all rows, or none
        thetas = _parameter_draws(fit, draws)
        integral = row_integral(fit, first, thetas[0], data.rows or 1)
        groups = _Jackknife(len(thetas))
        values, errors = [], []
        for batch in data.chunks(chunk):
            per_draw, variance = integral(batch, thetas, particles)
            values.append(torch.logsumexp(per_draw, 0) - math.log(len(per_draw)))
            errors.append(variance)
            groups.add(per_draw)
        rows = torch.cat(values).double().cpu()
        variances = torch.cat(errors).double().cpu()
    mean, n, quality = float(rows.mean()), len(rows), integral.quality
    kind, exact = _kind(fit, integral, len(thetas), particles if integral.sampled else 0)
    # Parameter draws are shared by all rows, so their error does not average out over rows: it is taken over draws.
    mc = math.sqrt(float(variances.sum()) / n**2 + groups.error(n) ** 2)
    stderr = float(rows.std() / math.sqrt(n)) if n > 1 else 0.0
    if len(thetas) == 1 and thetas[0] and not _at_point(fit):
        mc = math.nan  # one draw of the parameters says nothing of how much they vary
    if (complaint := quality.complaint()) is not None:
        warnings.warn(complaint, UserWarning, stacklevel=3)
    ks = quality.k_hats()
    return Evidence(
        mean,
        stderr,
        0.0 if exact else mc,
        n,
        kind,
        exact,
        rows,
        pareto_k=None if ks is None else float(np.median(ks)),
        pareto_k_rows=None if ks is None else torch.as_tensor(ks),
        effective_draws=quality.effective_draws,
    )


class _Jackknife:
    """The error of the mean evidence that comes from the finite number of parameter draws, over ten groups of them."""

    def __init__(self, draws: int) -> None:
        self.groups = min(10, draws)
        self.totals = torch.zeros(self.groups, dtype=torch.float64)

    def add(self, per_draw: Tensor) -> None:
        """Draws x rows of one chunk."""
        for group in range(self.groups) if self.groups > 1 else ():
            rest = torch.cat([per_draw[other :: self.groups] for other in range(self.groups) if other != group])
            self.totals[group] += float((torch.logsumexp(rest, 0) - math.log(len(rest))).sum())

    def error(self, rows: int) -> float:
        """Standard error of the mean over ``rows`` rows; zero for a single draw, which shows none."""
        left_out = self.totals / rows
        return float((((left_out - left_out.mean()) ** 2).sum() * (self.groups - 1) / self.groups).sqrt())


def _require_density(fit: Fit) -> None:
    improper = [site.name for site in fit.info.select(local=True) if site.improper]
    if improper and fit.program.evidence is None:
        raise IncompatibleError(
            f"the program {fit.program.name!r} has no density over its rows: the prior of {', '.join(improper)} is "
            "flat (improper), which gives p(x | z) and no p(x). Compare how well it reconstructs held-out rows instead"
        )
    if "density" in fit.info.offers or fit.program.evidence is not None:
        return
    why = (
        "its energy has no normaliser in closed form"
        if fit.program.energy is not None
        else ("its observations come from a deterministic map (Delta)")
    )
    raise IncompatibleError(
        f"the program {fit.program.name!r} has no density: {why}, so there is no evidence to compute. "
        "Compare its samples instead: fit.sample(n)."
    )


def _at_point(fit: Fit) -> bool:
    """Whether the global sites were learned as one value each, be it by a guide of point masses."""
    if isinstance(fit.learned, PointPosterior):
        return fit.info.data_plate is None or not summed_globals(fit, fit.learned.values)
    points = point_sites(fit.info, local=False)
    return fit.learned.kind == "variational" and all(site.name in points for site in fit.info.select(local=False))


def _parameter_draws(fit: Fit, draws: int) -> list[dict[str, Tensor]]:
    """Draws of the globals. Without a data plate the whole data are one row, whose finite latents are summed out."""
    if not fit.info.select(local=False):
        return [{}]
    return global_draws(fit, 1 if _at_point(fit) else draws, finite=fit.info.data_plate is not None)


def _kind(fit: Fit, integral: RowIntegral, draws: int, particles: int) -> tuple[str, bool]:
    parts = []
    if draws > 1:
        parts.append(f"averaged over {draws} posterior draws")
    if particles:
        parts.append(f"importance weighted, {particles} particles")
    elif integral.sums and not integral.offered:
        parts.append("finite latents summed out")
    drawn = bool(fit.info.select(local=False)) and not _at_point(fit)
    if drawn and draws == 1:
        parts.append("at one posterior draw")
    if integral.missing and not integral.offered:
        parts.append(f"without {', '.join(integral.missing)}, not measured")
    return "; ".join([*(parts or ["exact"]), *_plugged_in(fit)]), not drawn and not particles


def _plugged_in(fit: Fit) -> list[str]:
    """What was not averaged over, because the fit knows one value of it: a density given that value."""
    sites = [site.name for site in fit.info.select(local=False)]
    points = sites if sites and _at_point(fit) else point_sites(fit.info, local=False)
    if not points:
        return []
    return ["given one value of " + (", ".join(points) if len(points) <= 3 else f"{len(points)} global sites")]


def marginal_likelihood(fit: Fit, *, draws: int, particles: int, seed: int | None = None) -> Evidence:
    r"""log p(all data) by importance weighting, log 1/S sum_s p(x, theta_s) / q(theta_s).

    Raises:
        IncompatibleError: for point estimates and chains, which have no density to propose from, and for a guide that
            puts any site at one value: the mass around that value would go uncounted.
    """
    from ppl_gen.diagnostics.psis import pareto_k

    require_whole("draws", draws)
    require_whole("particles", particles)
    _require_density(fit)
    guide = fit.guide
    if guide is None or fit.learned.kind != "variational":
        raise IncompatibleError(
            f"{fit.algorithm} learned no density over the globals to propose from; fit the program with SVI (an "
            "AutoMultivariateNormal guide, say) and ask that fit for its marginal likelihood"
        )
    if points := point_sites(fit.info):
        raise IncompatibleError(
            f"the guide of {fit.program.name!r} puts {', '.join(points)} at one value (a Delta), which has no density "
            "to propose from: the marginal likelihood integrates over it. Give it a distribution (AutoNormal, "
            "AutoMultivariateNormal) and fit again"
        )
    with fit.bound(seed):
        weights = weighed_draws(fit, draws, particles).log_weights
    n = len(weights)
    value = torch.logsumexp(weights, 0) - math.log(n)
    relative = (weights - weights.max()).exp()
    error = float(relative.std() / relative.mean() / math.sqrt(n)) if n > 1 else 0.0
    k = pareto_k(weights.numpy()) if n >= 50 else None
    return Evidence(float(value), 0.0, error, 1, f"importance weighted, {n} draws", False, value.reshape(1), k)
