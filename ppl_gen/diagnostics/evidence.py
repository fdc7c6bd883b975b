"""Evidence: log p(x) per row on one yardstick, whatever learned the program."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ppl_gen.data.batching import Batch, Dataset
from ppl_gen.diagnostics.densities import densities
from ppl_gen.diagnostics.weighed import weighed_draws
from ppl_gen.diagnostics.weighing import WeightQuality
from ppl_gen.errors import IncompatibleError, require_whole
from ppl_gen.inference.guides import point_sites
from ppl_gen.inference.objectives.particles import can_vectorise, log_weights_in_chunks
from ppl_gen.isolation import looking
from ppl_gen.newrows import follows_rows
from ppl_gen.predictive import amortised, global_draws

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
        _require_observations(fit, first)
        thetas = _parameter_draws(fit, draws)
        groups, quality = _Jackknife(len(thetas)), WeightQuality(data.rows or 1)
        values, errors = [], []
        for batch in data.chunks(chunk):
            per_draw, variance = _chunk(fit, batch, thetas, particles, quality)
            values.append(torch.logsumexp(per_draw, 0) - math.log(len(per_draw)))
            errors.append(variance)
            groups.add(per_draw)
        rows = torch.cat(values).double().cpu()
        variances = torch.cat(errors).double().cpu()
    mean, n = float(rows.mean()), len(rows)
    kind, exact = _kind(fit, len(thetas), particles if _integrated(fit) else 0)
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


def _require_observations(fit: Fit, batch: Batch) -> None:
    from pyro import poutine

    with looking():
        trace = poutine.trace(fit.program.model).get_trace(*batch.args, **batch.kwargs)
    sites = [site.name for site in fit.info.sites.values() if site.kind in ("observed", "factor")]
    if not any(trace.nodes[name]["is_observed"] for name in sites if name in trace.nodes):
        raise ValueError(f"data: none of the observed sites {sites} has a value in these data, so there is no evidence")


def _offered(fit: Fit) -> bool:
    return fit.program.evidence is not None


def _closed_form(fit: Fit, batch: Batch, theta: dict[str, Tensor]) -> Tensor:
    """The program's own log p(x) per row, at values of its global sites where it has any."""
    assert fit.program.evidence is not None
    first = (theta,) if fit.info.select(local=False) else ()
    return fit.program.evidence(*first, *batch.args, **batch.kwargs)


def _at_point(fit: Fit) -> bool:
    """Whether the global sites were learned as one value each, be it by a guide of point masses."""
    if fit.learned.kind == "point":
        return True
    points = point_sites(fit.info, local=False)
    return fit.learned.kind == "variational" and all(site.name in points for site in fit.info.select(local=False))


def _integrated(fit: Fit) -> bool:
    return not _offered(fit) and any(not site.finite for site in fit.info.select(local=True))


def _parameter_draws(fit: Fit, draws: int) -> list[dict[str, Tensor]]:
    if not fit.info.select(local=False):
        return [{}]
    return global_draws(fit, 1 if _at_point(fit) else draws)


def _kind(fit: Fit, draws: int, particles: int) -> tuple[str, bool]:
    parts = []
    if draws > 1:
        parts.append(f"averaged over {draws} posterior draws")
    if particles:
        parts.append(f"importance weighted, {particles} particles")
    elif fit.info.finite_latents and not _offered(fit):
        parts.append("finite latents summed out")
    drawn = bool(fit.info.select(local=False)) and not _at_point(fit)
    if drawn and draws == 1:
        parts.append("at one posterior draw")
    return "; ".join([*(parts or ["exact"]), *_plugged_in(fit)]), not drawn and not particles


def _plugged_in(fit: Fit) -> list[str]:
    """What was not averaged over, because the fit knows one value of it: a density given that value."""
    sites = [site.name for site in fit.info.select(local=False)]
    points = sites if sites and _at_point(fit) else point_sites(fit.info, local=False)
    if not points:
        return []
    return ["given one value of " + (", ".join(points) if len(points) <= 3 else f"{len(points)} global sites")]


def _chunk(
    fit: Fit, batch: Batch, thetas: list[dict[str, Tensor]], particles: int, quality: WeightQuality
) -> tuple[Tensor, Tensor]:
    """Row densities of one chunk (draws x rows), and the Monte Carlo variance (rows) of the particles."""
    if _offered(fit):
        found = torch.stack([_closed_form(fit, batch, theta) for theta in thetas])
        return found, torch.zeros_like(found[0])
    if not _integrated(fit):
        per_draw, _ = densities(fit, batch, thetas)
        return per_draw, torch.zeros_like(per_draw[0])
    model, info, guide = fit.program.model, fit.info, _proposal(fit)
    guided = set(fit.info.guide_sites or {}) if guide is not None else set()
    sums = tuple(name for name in info.finite_latents if name not in guided)
    vectorise = can_vectorise(model, guide, info, batch, sums)
    rows_by_draw, variances, pooled = [], [], []
    for theta in thetas:
        weights = log_weights_in_chunks(
            model, guide, info, batch, particles, values=theta, sums=sums, vectorise=vectorise
        )
        assert weights.rows is not None
        pooled.append(weights.rows)
        rows_by_draw.append(torch.logsumexp(weights.rows, 0) - math.log(particles))
        relative = (weights.rows - weights.rows.amax(0)).exp()
        spread = relative.var(0) / particles / relative.mean(0) ** 2 if particles > 1 else torch.zeros(len(relative[0]))
        variances.append(spread)
    quality.add(torch.cat(pooled))
    per_draw = torch.stack(rows_by_draw)
    share = torch.softmax(per_draw, 0)
    return per_draw, (share**2 * torch.stack(variances)).sum(0)


def _proposal(fit: Fit) -> Callable[..., Any] | None:
    """The guide where its local sites have densities and follow the rows; autoguides know training rows only."""
    points = point_sites(fit.info, local=True)
    return fit.guide if not points and amortised(fit) else None


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
