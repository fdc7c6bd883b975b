"""Evidence: log p(x) per row on one yardstick, whatever learned the program."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from ppl_gen.data.batching import Dataset
from ppl_gen.diagnostics.missed import missed
from ppl_gen.draws.new_data import follows_rows
from ppl_gen.draws.predictive import global_draws
from ppl_gen.enumeration.finite_globals import summed_globals
from ppl_gen.errors import IncompatibleError, require_whole
from ppl_gen.evidence.annealed import LogPartition
from ppl_gen.evidence.averaging import ENOUGH, Average, normaliser, weighed_parameters
from ppl_gen.evidence.integration import RowIntegral, row_integral, warn_of_scales
from ppl_gen.inference.guides.resolved import point_sites
from ppl_gen.weights.psis import pareto_k_threshold, smoothed_weights, told_apart
from ppl_gen.weights.weighed import MAX_ELEMENTS, numbers, weighed_draws
from ppl_gen.workspace.isolation import without_side_effects

if TYPE_CHECKING:
    from ppl_gen.fits.result import Fit

__all__ = ["Evidence", "marginal_likelihood", "row_evidence"]

JUDGED = 10_000  # draws of a marginal likelihood where they are cheap: k-hat then scatters by 0.08, and not by 0.15
ROUNDING = 1e-5  # nats: a gap that 32 bits may leave between an exact guide and the posterior
NOTABLE = 3.0  # standard errors from which a gap between guide and posterior is taken for one


@dataclass(frozen=True)
class Evidence:
    """log p(x) in nats: the mean over rows, and how well it is known.

    ``mean`` and ``stderr`` (spread over rows / sqrt(rows)); ``mc_stderr`` the error of the estimate; ``kind``
    how it was computed; ``exact`` whether no sampling took part; ``values`` per row. Of importance weights:
    ``effective_draws`` per row, (sum w)^2 / sum w^2; ``pareto_k``, the median over rows (of a single number, its own),
    and ``pareto_k_rows`` for at most 200 rows spread over the data.

    A guide stands for the posterior, and is not the posterior: ``guide_gap`` is by how much weighing its draws (Pareto
    smoothed) moves the mean, in nats per row, ``guide_gap_stderr`` the error of that; None where it was not measured.
    Both are part of ``mc_stderr``, in quadrature; both are zero for an exact guide, and `repr` tells of a gap beyond
    `NOTABLE` of its errors. ``mc_stderr`` is NaN where one draw shows no error, and infinite where nothing is known.
    ``log_partition`` is how the normaliser of an energy was found, by annealing forward and back.
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
    guide_gap: float | None = None
    guide_gap_stderr: float | None = None
    log_partition: LogPartition | None = None

    def __repr__(self) -> str:
        carried = "" if self.effective_draws is None else f", {float(self.effective_draws.median()):.0f} effective"
        tail = "" if self.exact else f"{carried} (Monte Carlo {self._error()})"
        if self.rows == 1:  # of one number, or of all data at once, there is no spread over rows
            return f"Evidence({self.mean:.4f} nats in all, {self.kind}{tail})"
        return f"Evidence({self.mean:.4f} +- {self.stderr:.4f} nats per row, {self.rows} rows, {self.kind}{tail})"

    def _error(self) -> str:
        if math.isinf(self.mc_stderr):
            return "error unknown"
        gap = f"; the posterior gives {self.guide_gap:+.2g}" if _notable(self.guide_gap, self.guide_gap_stderr) else ""
        return f"{self.mc_stderr:.2g}{gap}"


def _notable(gap: float | None, error: float | None) -> bool:
    """Whether guide and posterior give different evidence, beyond what the draws leave open."""
    return gap is not None and error is not None and abs(gap) > max(NOTABLE * error, ROUNDING)


class _Rows:
    """Numbers of rows, chunk after chunk, in one place: kept one by one they would lie between what chunks leave free,
    and memory would grow with the rows by much more than these numbers take.
    """

    def __init__(self, rows: int | None) -> None:
        self._all = None if rows is None else torch.empty(rows, dtype=torch.float64, device="cpu")
        self._count = 0

    def add(self, values: Tensor) -> None:
        count = self._count + len(values)
        if self._all is None or count > len(self._all):  # no plate, or one of a size of its own
            kept = torch.empty(count, dtype=torch.float64, device="cpu")
            if self._all is not None:
                kept[: self._count] = self._all[: self._count]
            self._all = kept
        self._all[self._count : count] = values.detach()
        self._count = count

    def all(self) -> Tensor:
        return torch.empty(0, dtype=torch.float64) if self._all is None else self._all[: self._count]


def row_evidence(
    fit: Fit, data: Dataset, *, particles: int, draws: int, chunk: int, seed: int | None = None
) -> Evidence:
    r"""log 1/S sum_s p(x_i | theta_s) per row; see `Fit.evidence`.

    A program's own closed form is used where it offers one. Else finite latents are summed out; continuous local
    latents are integrated by importance weighting with the guide as proposal where it is amortised and has a density
    (a point estimate has none), else with the prior. Rows are taken ``chunk`` at a time, and particles as many at a
    time as memory likes. Where few draws carry the estimate of half of the rows, a UserWarning says so.
    """
    _require_observations(fit)
    _require_density(fit)
    for name, value in (("particles", particles), ("draws", draws), ("chunk", chunk)):
        require_whole(name, value)
    with fit.bound(seed):
        first = next(iter(data.chunks(chunk)))
        if fit.info.data_plate is None or not follows_rows(fit, first):
            chunk, first = data.rows or chunk, data.batch()  # no plate, or one of a size of its own: all rows, or none
        thetas, weights = _parameter_draws(fit, draws, particles)
        integral = row_integral(fit, first, thetas[0], data.rows or 1)
        average = Average(len(thetas), weights)
        values, errors = _Rows(data.rows), _Rows(data.rows)
        for batch in data.chunks(chunk):
            per_draw, variance = integral(batch, thetas, particles)
            values.add(torch.logsumexp(per_draw, 0) - math.log(len(per_draw)))
            errors.add(variance)
            average.add(per_draw)
        rows, variances = values.all(), errors.all()
    mean, n, quality = float(rows.mean()), len(rows), integral.quality
    kind, exact = _kind(fit, integral, len(thetas), particles if integral.sampled else 0, weighed=weights is not None)
    # Parameter draws are shared by all rows, so their error does not average out over rows: it is taken over draws.
    mc = math.sqrt(float(variances.sum()) / n**2 + average.error() ** 2)
    gap, gap_error = average.gap() or (None, None)
    if gap is not None and gap_error is not None:  # of heavy weights the gap is little known, and that is an error too
        mc = math.hypot(mc, gap, gap_error)
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
        guide_gap=gap,
        guide_gap_stderr=gap_error,
    )


def _require_density(fit: Fit) -> None:
    improper = [site.name for site in fit.info.select(local=True) if site.improper]
    if improper and fit.program.evidence is None:
        raise IncompatibleError(
            f"the program {fit.program.name!r} has no density over its rows: the prior of {', '.join(improper)} is "
            "flat (improper), which gives p(x | z) and no p(x). Compare how well it reconstructs held-out rows instead"
        )
    if "density" in fit.info.offers or fit.program.evidence is not None:
        return
    if fit.program.energy is not None:
        why = (
            "its energy has no normaliser in closed form (fit.evidence(method=pg.AIS()) estimates one where the energy "
            "can be tempered)"
            if fit.program.energy.log_partition is None
            else "it has an energy, whose normaliser fit.evidence() sums up"
        )
    elif fit.program.transition is not None:
        why = "it is a Markov chain, whose stationary distribution is not known in closed form"
    else:
        why = "its observations come from a deterministic map (Delta)"
    raise IncompatibleError(
        f"the program {fit.program.name!r} has no density: {why}, so there is no evidence to compute. "
        "Compare its samples instead: fit.sample(n)."
    )


def _require_observations(fit: Fit) -> None:
    seen = any(site.kind in ("observed", "factor") for site in fit.info.sites.values())
    if not seen and fit.program.evidence is None:
        raise IncompatibleError(
            f"the program {fit.program.name!r} observes nothing, so there is no evidence to compute; "
            "fit.marginal_likelihood() integrates its density"
        )


def _at_point(fit: Fit) -> bool:
    """Whether the global sites were learned as one value each, be it by a guide of point masses."""
    if fit.learned.point is not None:
        return fit.info.data_plate is None or not summed_globals(fit, fit.learned.point)
    points = point_sites(fit.info, local=False)
    return fit.judged_by != "chains" and all(site.name in points for site in fit.info.select(local=False))


def _parameter_draws(fit: Fit, draws: int, particles: int) -> tuple[list[dict[str, Tensor]], Tensor | None]:
    """Draws of the globals, and how the posterior weighs them where that is measured.

    Without a data plate the whole data are one row, whose finite latents are summed out.
    """
    if not fit.info.select(local=False):
        return [{}], None
    if not _at_point(fit) and (found := weighed_parameters(fit, draws, particles)) is not None:
        return found
    return global_draws(fit, 1 if _at_point(fit) else draws, finite=fit.info.data_plate is not None), None


def _kind(fit: Fit, integral: RowIntegral, draws: int, particles: int, *, weighed: bool) -> tuple[str, bool]:
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
    elif drawn and not weighed and fit.judged_by != "chains":
        parts.append(f"the {fit.learned.noun} taken for the posterior")
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
    r"""log p(all data) by importance weighting, log 1/S sum_s p(x, theta_s) / q(theta_s), weights Pareto smoothed.

    Where k-hat, or short chains from the guide's draws, say that these miss part of the posterior, the value lies
    below log p(x) by an unknown amount: ``mc_stderr`` is infinite then, ``kind`` says so, and a UserWarning what to do.
    See `normaliser` and `missed`. `JUDGED` draws are taken where these are cheap (all at once, no latents of
    rows) and more than ``draws``, unless fewer than `ENOUGH` were asked for.

    Raises:
        IncompatibleError: for point estimates and chains, which have no density to propose from, and for a guide that
            puts any site at one value: the mass around that value would go uncounted.
    """
    require_whole("draws", draws)
    require_whole("particles", particles)
    _require_density(fit)
    if fit.judged_by != "weights":
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
    more = (
        min(JUDGED, MAX_ELEMENTS // numbers(fit, fit.data))
        if draws >= ENOUGH and not fit.info.select(local=True)
        else 0
    )
    with fit.bound(seed):
        with without_side_effects():
            batch = fit.data.batch()
            trace = poutine.trace(fit.joint).get_trace(*batch.args, **batch.kwargs)
        warn_of_scales(fit, trace, "marginal_likelihood", set(fit.info.sites), stacklevel=3)
        weighed = weighed_draws(fit, draws, particles, more=more)
    weights = weighed.log_weights
    n, found = len(weights), normaliser(weights)
    kind, doubt = f"importance weighted, {n} draws", ""
    if found.pareto_k is None:
        kind += ", too few to judge the guide by"
    elif not found.reliable:
        said, limit = told_apart(found.pareto_k, pareto_k_threshold(n))
        doubt = f"k-hat {said} is above {limit}, the limit for {n} draws"
        kind += f", k-hat {found.pareto_k:.2f}: below log p(x) by an unknown amount"
    elif doubt := missed(fit, weighed.values, smoothed_weights(weights.numpy())):
        found = replace(found, stderr=math.inf)
        kind += ", short chains left them: below log p(x) by an unknown amount"
    if doubt:
        warnings.warn(
            f"marginal_likelihood: {doubt}: the guide misses part of the posterior, so the value lies below log p(x) "
            "by an unknown amount. Fit with a richer guide (AutoMultivariateNormal, or a flow), train it longer, or "
            "ask for more draws",
            UserWarning,
            stacklevel=3,
        )
    value = torch.tensor([found.value], dtype=torch.float64)
    return Evidence(found.value, 0.0, found.stderr, 1, kind, False, value, found.pareto_k)
