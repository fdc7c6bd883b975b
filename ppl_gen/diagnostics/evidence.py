"""Evidence: log p(x) per row on one yardstick, whatever learned the program."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppl_gen.data.batching import Batch, Dataset
from ppl_gen.errors import IncompatibleError
from ppl_gen.inference.objectives.particles import can_vectorise, local_log_weights
from ppl_gen.predictive import global_draws

if TYPE_CHECKING:
    from ppl_gen.result import Fit

__all__ = ["Evidence", "marginal_likelihood", "row_evidence"]


@dataclass(frozen=True)
class Evidence:
    """log p(x) in nats: the mean over rows, and how well it is known.

    ``mean`` and ``stderr`` (spread over rows / sqrt(rows)); ``mc_stderr`` the Monte Carlo error of the mean; ``kind``
    how it was computed; ``exact`` whether no sampling took part; ``values`` per row; ``pareto_k`` of the weights.
    """

    mean: float
    stderr: float
    mc_stderr: float
    rows: int
    kind: str
    exact: bool
    values: Tensor
    pareto_k: float | None = None

    def __repr__(self) -> str:
        tail = "" if self.exact else f" (Monte Carlo {self.mc_stderr:.2g})"
        per = "per row" if self.rows > 1 else "in all"
        return f"Evidence({self.mean:.4f} +- {self.stderr:.4f} nats {per}, {self.rows} rows, {self.kind}{tail})"


def row_evidence(
    fit: Fit, data: Dataset, *, particles: int, draws: int, chunk: int, seed: int | None = None
) -> Evidence:
    r"""log 1/S sum_s p(x_i | theta_s) per row; see `Fit.evidence`.

    Finite latents are summed out; continuous local latents are integrated by importance weighting with the guide as
    proposal where it is amortised, else with the prior. Rows are taken ``chunk`` at a time.
    """
    _require_density(fit)
    if particles < 1 or draws < 1 or chunk < 1:
        raise ValueError(f"particles, draws and chunk: expected at least 1, got {particles}, {draws}, {chunk}")
    with fit.bound(seed):
        thetas = _parameter_draws(fit, draws)
        values, errors = zip(*(_chunk(fit, b, thetas, particles) for b in data.chunks(chunk)), strict=True)
        rows = torch.cat(values).double().cpu()
        variance = torch.cat(errors).double().cpu()
    mean, n = float(rows.mean()), len(rows)
    sampled = _integrated(fit)
    kind, exact = _kind(fit, len(thetas), particles if sampled else 0)
    # Parameter draws are shared by all rows, so their error does not average out over rows: batch it over draws.
    shared = _shared_error(fit, data, thetas, particles, chunk, seed) if len(thetas) > 1 else 0.0
    mc = math.sqrt(float(variance.sum()) / n**2 + shared**2)
    stderr = float(rows.std() / math.sqrt(n)) if n > 1 else 0.0
    return Evidence(mean, stderr, 0.0 if exact else mc, n, kind, exact, rows)


def _require_density(fit: Fit) -> None:
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


def _integrated(fit: Fit) -> bool:
    return fit.program.evidence is None and any(not site.finite for site in fit.info.select(local=True))


def _parameter_draws(fit: Fit, draws: int) -> list[dict[str, Tensor]]:
    if not fit.info.select(local=False):
        return [{}]
    return global_draws(fit, 1 if fit.learned.kind == "point" else draws)


def _kind(fit: Fit, draws: int, particles: int) -> tuple[str, bool]:
    parts = []
    if draws > 1:
        parts.append(f"averaged over {draws} posterior draws")
    if particles:
        parts.append(f"importance weighted, {particles} particles")
    elif fit.info.finite_latents and fit.program.evidence is None:
        parts.append("finite latents summed out")
    return ("; ".join(parts) or "exact"), draws == 1 and not particles


def _chunk(fit: Fit, batch: Batch, thetas: list[dict[str, Tensor]], particles: int) -> tuple[Tensor, Tensor]:
    """Per row of one chunk: log mean over draws, and the Monte Carlo variance of the particles."""
    model, info = fit.program.model, fit.info
    if fit.program.evidence is not None and not thetas[0]:
        rows = fit.program.evidence(*batch.args, **batch.kwargs)
        return rows, torch.zeros_like(rows)
    guide = _proposal(fit)
    guided = set(fit.info.guide_sites or {}) if guide is not None else set()
    sums = tuple(name for name in info.finite_latents if name not in guided)
    continuous = _integrated(fit)
    count = particles if continuous else 1
    vectorise = continuous and can_vectorise(model, guide, info, batch, sums)
    densities, variances = [], []
    for theta in thetas:
        weights = local_log_weights(
            model, guide if continuous else None, info, batch, count, values=theta, sums=sums, vectorise=vectorise
        )
        log_w = weights.rows if weights.rows is not None else _whole_row(weights.globals, theta, fit, batch)
        densities.append(torch.logsumexp(log_w, 0) - math.log(count))
        relative = (log_w - log_w.amax(0)).exp()
        variances.append(relative.var(0) / count / relative.mean(0) ** 2 if count > 1 else torch.zeros_like(log_w[0]))
    stacked = torch.stack(densities)
    share = torch.softmax(stacked, 0)
    variance = (share**2 * torch.stack(variances)).sum(0)
    return torch.logsumexp(stacked, 0) - math.log(len(thetas)), variance


def _whole_row(log_joint: Tensor, theta: dict[str, Tensor], fit: Fit, batch: Batch) -> Tensor:
    """A program without a data plate is one row: its likelihood without the priors of ``theta``."""
    from pyro import poutine

    from ppl_gen.inference.objectives.particles import Substitute

    with Substitute(theta):
        trace = poutine.trace(fit.program.model).get_trace(*batch.args, **batch.kwargs)
    priors = sum(trace.nodes[k]["fn"].log_prob(trace.nodes[k]["value"]).sum() for k in theta if k in trace.nodes)
    return (log_joint - priors).reshape(1, 1)


def _proposal(fit: Fit) -> Callable[..., Any] | None:
    """The guide where its local sites follow the rows it is called with; autoguides know training rows only."""
    from pyro.infer.autoguide import AutoGuide

    local = {site.name for site in fit.info.select(local=True)}
    if fit.guide is None or isinstance(fit.guide, AutoGuide) or not local.intersection(fit.info.guide_sites or {}):
        return None
    return fit.guide


def _shared_error(
    fit: Fit, data: Dataset, thetas: list[dict[str, Tensor]], particles: int, chunk: int, seed: int | None
) -> float:
    """Jackknife over ten groups of parameter draws of the mean evidence, on at most one chunk of rows."""
    groups = [thetas[i::10] for i in range(10)]
    if min(map(len, groups)) == 0 or len(thetas) < 20:
        return 0.0
    with fit.bound(seed):
        batch = next(iter(data.chunks(min(chunk, 100))))
        few = max(1, particles // 10)
        per_draw = torch.stack([_chunk(fit, batch, [theta], few)[0] for theta in thetas])
    total = torch.logsumexp(per_draw, 0)
    left_out = []
    for i in range(10):
        rest = torch.cat([per_draw[j::10] for j in range(10) if j != i])
        left_out.append(float((torch.logsumexp(rest, 0) - math.log(len(rest))).mean()))
    spread = torch.tensor(left_out, dtype=torch.float64)
    del total
    return float((((spread - spread.mean()) ** 2).sum() * 9 / 10).sqrt())


def marginal_likelihood(fit: Fit, *, draws: int, particles: int, seed: int | None = None) -> Evidence:
    r"""log p(all data) by importance weighting, log 1/S sum_s p(x, theta_s) / q(theta_s).

    Raises:
        IncompatibleError: for point estimates and chains, which have no density to propose from.
    """
    from ppl_gen.diagnostics.psis import pareto_k

    _require_density(fit)
    guide = fit.guide
    if guide is None or fit.learned.kind != "variational":
        raise IncompatibleError(
            f"{fit.algorithm} learned no density over the globals to propose from; fit the program with SVI (an "
            "AutoMultivariateNormal guide, say) and ask that fit for its marginal likelihood"
        )
    with fit.bound(seed):
        weights = joint_log_weights(fit, draws, particles)
    n = len(weights)
    value = torch.logsumexp(weights, 0) - math.log(n)
    relative = (weights - weights.max()).exp()
    error = float(relative.std() / relative.mean() / math.sqrt(n)) if n > 1 else 0.0
    k = pareto_k(weights.numpy()) if n >= 50 else None
    return Evidence(float(value), 0.0, error, 1, f"importance weighted, {n} draws", False, value.reshape(1), k)


def joint_log_weights(fit: Fit, draws: int, particles: int = 1) -> Tensor:
    """log p(x, theta_s) - log q(theta_s) at draws of the guide, locals integrated; inside ``fit.bound()``."""
    from pyro import poutine

    from ppl_gen.inference.objectives.elbo import is_sample

    info, batch = fit.info, fit.data.batch()
    guided = set(info.guide_sites or {})
    sums = tuple(name for name in info.finite_latents if name not in guided)
    local = any(site.local and site.name in guided for site in info.select())
    count = particles if local else 1
    vectorise = local and can_vectorise(fit.program.model, fit.guide, info, batch, sums)
    result = []
    for _ in range(draws):
        once = poutine.trace(fit.guide).get_trace(*batch.args, **batch.kwargs)
        values = {
            name: site["value"]
            for name, site in once.nodes.items()
            if is_sample(site) and not any(f.name == info.data_plate for f in site["cond_indep_stack"])
        }
        w = local_log_weights(
            fit.program.model, fit.guide, info, batch, count, values=values, sums=sums, vectorise=vectorise
        )
        rows = 0.0 if w.rows is None else (torch.logsumexp(w.rows, 0) - math.log(count)).sum()
        result.append(torch.as_tensor(w.globals + rows).double())
    return torch.stack(result).cpu()
