"""From any fit to ArviZ: posterior, predictive, log likelihood, prior, observed data and sample statistics."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor

from ppl_gen.bridge import to_tree
from ppl_gen.data.batching import Batch
from ppl_gen.diagnostics.guide_weights import k_hats
from ppl_gen.diagnostics.labels import labels_of, variable_shapes
from ppl_gen.diagnostics.posterior_group import MAX_ELEMENTS, Groups, affordable_rows, as_array, posterior_groups
from ppl_gen.diagnostics.wishes import checked_coords, checked_dims, checked_lengths
from ppl_gen.draws.forward import unobserved_run, weighing_draws
from ppl_gen.draws.observations import observed_rows, rows_observed
from ppl_gen.draws.predictive import prior_rows
from ppl_gen.draws.replicates import prior_together, replicated
from ppl_gen.errors import require_whole
from ppl_gen.handlers.last_site import UndrawableError
from ppl_gen.handlers.sites import is_sample, log_density, scaled
from ppl_gen.inference.guides.resolved import point_sites
from ppl_gen.version import __version__
from ppl_gen.weights.densities import densities, joint_densities
from ppl_gen.weights.psis import MIN_DRAWS

if TYPE_CHECKING:
    from ppl_gen.fits.result import Fit

__all__ = ["provenance", "to_arviz"]

_SPELT = 3  # observed sites whose names all stand in that of their joint log likelihood


def to_arviz(fit: Fit, *, draws: int = 1000, seed: int | None = None, coords: Any = None, dims: Any = None) -> Any:
    """See `Fit.to_arviz`.

    Sites inside a plate get the plate's name as dimension. Finite latents that the algorithm summed out are
    drawn given all else where they stand outside the data plate, and left out inside it (`Fit.posterior` draws them); a
    chain's predictive and log likelihood are thinned to about ``draws``. Where a guide is amortised and rows times
    draws are too many, the first rows stand for all; ``attrs["rows"]`` says so.
    """
    require_whole("draws", draws)
    asked = checked_dims(dims, [*fit.info.sites, *fit.data.entries, *fit.data.constants])
    with fit.bound(seed):
        whole, fit = fit, affordable_rows(fit, draws)
        labels = checked_coords(coords, whole.data.rows, fit.data.rows)
        batch = fit.data.batch()
        groups, attrs = posterior_groups(fit, draws)
        kept = _kept_draws(fit, groups, draws)
        with contextlib.suppress(UndrawableError):
            _add_predictive(fit, batch, groups, kept)
        pointwise = None
        if kept or not fit.info.select():
            pointwise = _add_log_likelihood(fit, batch, groups, kept, attrs)
        with contextlib.suppress(UndrawableError):
            _add_prior(fit, batch, groups, draws)
        groups["observed_data"] = {name: as_array(value) for name, value in observed_rows(fit, batch).items()}
        inputs = {name: as_array(v) for name, v in _named(fit, batch).items() if name not in groups["observed_data"]}
        groups["constant_data"] = inputs
    unsampled = _add_statistics(fit, groups, attrs, seed, weighed=not whole.data.beyond_memory)
    attrs.update(provenance(fit))
    if fit is not whole:
        attrs["rows"] = f"the first {fit.data.rows} of {whole.data.rows}"
    lacking = [g for g in ("posterior", "log_likelihood") if not groups.get(g)]
    if lacking:
        attrs["lacks"] = "; ".join(f"{g}: {_reason(fit, g)}" for g in lacking)
    found = {k: v for k, v in groups.items() if v}
    shapes = variable_shapes(found)
    checked_lengths(asked, shapes)
    named, given = labels_of(fit.info, fit.data, shapes, unsampled, whole.data)
    named |= asked
    if pointwise is not None:
        pointwise = (_renamed_plate(fit, asked, pointwise[0]), pointwise[1])
    there = {dim for axes in named.values() for dim in axes} | ({pointwise[0]} if pointwise else set())
    labels = {dim: values for dim, values in given.items() if dim in there} | labels
    return to_tree(found, dims=named, coords=labels, attrs=attrs, unsampled=unsampled, pointwise=pointwise)


def _renamed_plate(fit: Fit, asked: Mapping[str, Sequence[str]], plate: str) -> str:
    """What the rows of the log likelihood are called: as the user calls them in an observed site."""
    for site in fit.info.select(kind="observed", local=True):
        axes, dim = asked.get(fit.info.shown(site.name)), fit.info.plate_dim
        if axes is not None and dim is not None:
            return axes[len(site.batch_shape) + dim]
    return plate


def _add_prior(fit: Fit, batch: Batch, groups: Groups, draws: int) -> None:
    """Draws of the latent sites without the observations, and of the observations with them."""
    info = fit.info
    if any(site.improper for site in info.select()) or all(site.kind == "observed" for site in info.sites.values()):
        return
    if info.select(kind="factor") and weighing_draws(unobserved_run(fit.program.model), batch, {}):
        return  # what runs draw is not the prior then
    count = min(draws, 500, _affordable(prior_rows(fit.program.model, batch, 1)))
    drawn = prior_together(fit.program.model, batch, count)
    shown = [info.shown(site.name) for site in info.select(kind="observed")]
    latent = [s.name for s in info.sites.values() if s.kind in ("latent", "deterministic") and s.name not in shown]
    groups["prior"] = {name: as_array(drawn[name])[None] for name in latent if name in drawn}
    if info.select(kind="observed") and not fit.program.drawn_by_chain:
        groups["prior_predictive"] = {name: as_array(drawn[name])[None] for name in shown if name in drawn}


def _affordable(draw: Mapping[str, Tensor]) -> int:
    """How many draws of this size stay within `MAX_ELEMENTS` numbers, and one at least."""
    return max(1, MAX_ELEMENTS // max(1, sum(value.numel() for value in draw.values())))


def _thinned(kept: list[tuple[int, int]], limit: int) -> list[tuple[int, int]]:
    """At most ``limit`` of the places (but one of each chain), evenly from every chain."""
    chains = _chains(kept)
    step = -(-len(kept) // (chains * max(1, limit // chains)))
    return [place for i, place in enumerate(kept) if i % (len(kept) // chains) % step == 0]


def _kept_draws(fit: Fit, groups: Groups, draws: int) -> list[tuple[int, int]]:
    posterior = groups["posterior"]
    if not posterior:
        return []
    chains, length = next(iter(posterior.values())).shape[:2]
    step = max(1, round(chains * length / draws))
    return [(c, d) for c in range(chains) for d in range(0, length, step)]


def _values(fit: Fit, groups: Groups, place: tuple[int, int]) -> dict[str, Tensor]:
    names = {site.name for site in fit.info.select()}
    dtype = fit.data.dtype
    return {
        name: torch.as_tensor(value[place]).to(dtype=dtype if value.dtype.kind == "f" else None, device=fit.data.device)
        for name, value in groups["posterior"].items()
        if name in names
    }


def _add_predictive(fit: Fit, batch: Batch, groups: Groups, kept: list[tuple[int, int]]) -> None:
    if fit.program.drawn_by_chain:
        return  # a replicate is a Markov chain of its own: fit.sample runs it when it is wanted
    limit = _affordable(replicated(fit, batch, [_values(fit, groups, kept[0]) if kept else {}]))
    kept = _thinned(kept, limit)
    values = [_values(fit, groups, place) for place in kept] or [{}] * min(100, limit)
    groups["posterior_predictive"] = {
        name: as_array(value).reshape(_chains(kept), -1, *value.shape[1:])
        for name, value in replicated(fit, batch, values).items()
    }


def _chains(kept: list[tuple[int, int]]) -> int:
    return len({chain for chain, _ in kept}) or 1


def _add_log_likelihood(
    fit: Fit, batch: Batch, groups: Groups, kept: list[tuple[int, int]], attrs: dict[str, Any]
) -> tuple[str, list[int]] | None:
    """Pointwise log p(x_i | draw): given the local latents that were drawn, the finite ones summed out.

    Returns the dimension of its rows, and their numbers among all rows (one, of a dimension "row", without a plate over
    rows); None where it has no value.
    """
    if "density" not in fit.info.offers or not (fit.info.select(kind="observed") or fit.info.select(kind="factor")):
        return None
    drawn = set(groups["posterior"])
    if any(not site.finite and site.name not in drawn for site in fit.info.select(local=True)):
        return None
    observed = [fit.info.shown(site.name) for site in fit.info.select(kind="observed")]
    name = "_".join(observed) if len(observed) <= _SPELT else f"{observed[0]}_to_{observed[-1]}"
    places: list[tuple[int, int] | None] = [*kept] or [None]
    values = [_values(fit, groups, place) if place is not None else {} for place in places]
    rows = as_array(densities(fit, batch, values)[0])
    seen = as_array(rows_observed(fit, batch)) if fit.info.data_plate else np.ones(rows.shape[-1], dtype=bool)
    if not seen.all():
        rows, attrs["log_likelihood_rows"] = rows[..., seen], f"the {int(seen.sum())} that hold observations"
    groups["log_likelihood"] = {name: rows.reshape(_chains(kept), -1, *rows.shape[1:])}
    if len(observed) > 1:
        attrs["log_likelihood"] = f"joint over the observed sites {', '.join(observed)}"
    return fit.info.data_plate or "row", np.flatnonzero(seen).tolist()


def _add_statistics(
    fit: Fit, groups: Groups, attrs: dict[str, Any], seed: int | None, *, weighed: bool = True
) -> list[str]:
    """A sampler's own numbers of each draw; else log p and log q where there is a guide, and the losses."""
    if fit.learned.stats:
        groups["sample_stats"] = {name: as_array(value) for name, value in fit.learned.stats.items()}
        return []
    statistics: dict[str, np.ndarray] = {}
    if fit.judged_by == "weights" and groups["posterior"] and weighed and "density" in fit.info.offers:
        count = next(iter(groups["posterior"].values())).shape[1]
        with fit.bound(seed):
            log_p, log_q = _joint_densities(fit, count)
        statistics["log_p"] = log_p[None]
        if points := point_sites(fit.info):
            attrs["log_q"] = f"none: the guide puts {', '.join(points)} at one value"
        else:
            statistics["log_q"] = log_q[None]
        if count >= MIN_DRAWS:
            _add_k_hats(fit, count, attrs)
    losses = {
        name: np.asarray(values, dtype=np.float64) for name, values in fit.records.items() if name.endswith("loss")
    }
    if not losses:
        losses = {k: np.asarray(v, dtype=np.float64) for k, v in fit.records.items() if k in ("elbo", "log_likelihood")}
    renamed = {("loss" if name == "program_loss" else name): values for name, values in losses.items()}
    groups["sample_stats"] = {**statistics, **renamed}
    return list(renamed)


def _add_k_hats(fit: Fit, count: int, attrs: dict[str, Any]) -> None:
    joint, rows, _ = k_hats(fit, count)
    attrs["pareto_k"] = joint if joint is not None else float("nan")
    if rows is not None:
        attrs["pareto_k_rows"] = [float(k) for k in rows]


def _joint_densities(fit: Fit, count: int) -> tuple[np.ndarray, np.ndarray]:
    """log p(x, z) and log q(z) in nats at the very draws of the posterior group (same seed, same order)."""
    batch = fit.data.batch()
    draws, log_q = [], []
    for _ in range(count):
        q = poutine.trace(fit.guide).get_trace(*batch.args, **batch.kwargs)
        log_q.append(float(sum(scaled(log_density(site), site).sum() for site in q.nodes.values() if is_sample(site))))
        draws.append({n: s["value"] for n, s in q.nodes.items() if is_sample(s) and n in fit.info.sites})
    return as_array(joint_densities(fit, batch, draws)), np.asarray(log_q)


def _named(fit: Fit, batch: Batch) -> dict[str, Tensor]:
    every = {**batch.kwargs, **dict(zip(fit.data.positional, batch.args, strict=True))}
    return {name: value for name, value in every.items() if isinstance(value, Tensor)}


def _reason(fit: Fit, group: str) -> str:
    if group == "posterior":
        return "the algorithm learned no posterior over latent sites"
    if "density" not in fit.info.offers:
        return "the program has no density"
    return "local latents were not drawn, so there is no pointwise value; see fit.evidence"


def provenance(fit: Fit) -> dict[str, Any]:
    return {
        "inference_library": "ppl_gen",
        "inference_library_version": __version__,
        "algorithm": fit.settings,
        "program": fit.program.name,
        "seed": fit.seed,
        "status": str(fit.status),
        "message": fit.message,
        "sampling_time": float(fit.cost.get("seconds", 0.0)),
        "versions": f"python {platform.python_version()}, torch {torch.__version__}, pyro {pyro.__version__}",
    }
