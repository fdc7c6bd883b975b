"""Draws from a fit: posterior, posterior predictive, and prior predictive."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from pyro.distributions import Unit
from torch import Tensor

from ppl_gen.data.batching import Batch
from ppl_gen.draws.forward import refuse_weighed_draws
from ppl_gen.draws.local_draws import local_draws
from ppl_gen.draws.observations import entry_mask
from ppl_gen.enumeration.finite_globals import extended, summed_globals
from ppl_gen.errors import PROGRAM_ERRORS, IncompatibleError, require_whole
from ppl_gen.handlers.last_site import drawing
from ppl_gen.handlers.sites import is_deterministic, is_sample
from ppl_gen.handlers.substitute import Substitute
from ppl_gen.handlers.unobserved import unobserved
from ppl_gen.inference.guides.guide_list import holds_rows
from ppl_gen.workspace.isolation import without_side_effects

if TYPE_CHECKING:
    from ppl_gen.fits.result import Fit

__all__ = [
    "amortised",
    "deterministic",
    "global_draws",
    "is_derived",
    "latent_draws",
    "positive",
    "posterior_draws",
    "predictive_draws",
    "refuse_improper",
    "run",
]


def global_draws(fit: Fit, count: int, *, finite: bool = True) -> list[dict[str, Tensor]]:
    """Draws of the sites outside the data plate; call inside ``fit.bound()``.

    A guide is run on the training data (on a slice of it when they are large: globals do not depend on the rows). The
    finite sites that the algorithm summed out are drawn given the others and all training rows (left out where not
    ``finite``).
    """
    data = fit.data
    finite = finite and any(site.finite for site in fit.info.select(local=False, discrete=True))
    batch = data.glimpse() if fit.info.data_plate and not finite else data.batch()
    local = {site.name for site in fit.info.select(local=True)}
    draws = fit.learned.draw(count, batch)
    draws = extended(fit, draws) if finite else draws
    return [{k: v for k, v in draw.items() if k not in local} for draw in draws]


def latent_draws(fit: Fit, batch: Batch, count: int, *, training: bool) -> list[dict[str, Tensor]]:
    """Joint draws of globals and locals given ``batch``: what was learned of these rows, `local_draws` for the rest.

    Chains and autoguides know the locals of the training rows; an amortised guide those of any rows that it can read.
    """
    local = {site.name for site in fit.info.select(local=True)}
    draws = extended(fit, fit.learned.draw(count, batch)) if training else _guided(fit, batch, count)
    if draws is None:
        draws = [{k: v for k, v in draw.items() if k not in local} for draw in global_draws(fit, count)]
    names = {site.name for site in fit.info.select()}
    return local_draws(fit, batch, [{name: v for name, v in draw.items() if name in names} for draw in draws])


def _guided(fit: Fit, batch: Batch, count: int) -> list[dict[str, Tensor]] | None:
    """Draws of an amortised guide; None where there is none, or where it cannot read these rows."""
    if not amortised(fit):
        return None
    finite = summed_globals(fit, fit.info.guide_sites or {})  # these follow from the training rows, not from these ones
    known = global_draws(fit, count) if finite else []
    try:
        if not finite:
            return fit.learned.draw(count, batch)
        found = []
        for shared in known:
            with Substitute(shared):
                found.append(fit.learned.draw(1, batch)[0] | shared)
        return found
    except PROGRAM_ERRORS:
        return None  # an entry that it reads is missing


def amortised(fit: Fit) -> bool:
    """Whether the guide's local sites follow the rows it is called with; inside ``fit.bound()``.

    A guide that holds parameters for each training row (an autoguide does) cannot be run on another number of rows.
    """
    local = {site.name for site in fit.info.select(local=True)}.intersection(fit.info.guide_sites or {})
    if fit.guide is None or holds_rows(fit.guide) or not local:
        return False
    few = fit.data.template(3 if fit.data.rows != 3 else 4)
    try:
        with without_side_effects():
            trace = poutine.trace(fit.guide).get_trace(*few.args, **few.kwargs)
    except PROGRAM_ERRORS:
        return False
    frames = [frame for name in local if name in trace for frame in trace.nodes[name]["cond_indep_stack"]]
    return {frame.size for frame in frames if frame.name == fit.info.data_plate} == {few.rows}


def run(fit: Fit, batch: Batch, values: Mapping[str, Tensor], *, replicate: bool = False) -> poutine.Trace:
    model = unobserved(fit.program.model) if replicate else fit.program.model
    with drawing(fit.program.name), Substitute(values):
        return poutine.trace(model).get_trace(*batch.args, **batch.kwargs)


def posterior_draws(fit: Fit, data: Any, draws: int, seed: int | None) -> dict[str, Tensor]:
    """See `Fit.posterior`: by site, draws x shape of the site."""
    positive("draws", draws)
    if not fit.info.select() and not fit.info.predicted:
        raise IncompatibleError(f"{fit.program.name!r} has no latent sites: there is nothing to draw a posterior of")
    _refuse_prior(fit)
    dataset = fit.dataset(data)
    with fit.bound(seed):
        shared = fit.info.data_plate and not fit.info.predicted
        shared = shared and not fit.info.select(local=True) and not fit.info.select(kind="deterministic")
        batch = dataset.most() if shared else dataset.batch()
        latents = latent_draws(fit, batch, draws, training=dataset.same_rows(fit.data))
        extended = [_whole(fit, values | deterministic(fit, batch, values)) for values in latents]
    return _stacked(extended)


def _whole(fit: Fit, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a site that is observed in part, the other half too has the observed values where there are some."""
    return values | {f"{name}_unobserved": values[name] for name in fit.info.partly_observed if name in values}


def _refuse_prior(fit: Fit) -> None:
    """Draws of the prior must not pass for draws of a posterior that nobody learned (an adversarial fit, say)."""
    if fit.learned.point is None:
        return
    drawn = fit.program.local_posterior is not None or "density" in fit.info.offers
    asked = [site for site in fit.info.select() if not site.finite and not (site.local and drawn)]
    unknown = [site.name for site in asked if site.name not in fit.learned.point]
    if unknown:
        raise IncompatibleError(
            f"{fit.algorithm} learned no posterior of {', '.join(unknown)} in {fit.program.name!r}; "
            "fit.sample(n) and fit.predict() draw what the program makes"
        )


def deterministic(fit: Fit, batch: Batch, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The deterministic sites at the values of one draw, each in its shape."""
    names = [site.name for site in fit.info.select(kind="deterministic")]
    if not names:
        return {}
    trace = run(fit, batch, values)
    return {name: trace.nodes[name]["value"] for name in names if name in trace.nodes}


def predictive_draws(fit: Fit, data: Any, draws: int, seed: int | None) -> dict[str, Tensor]:
    """See `Fit.predict`: by site, draws x shape of the site."""
    positive("draws", draws)
    dataset = fit.dataset(data)
    observed = [site.name for site in fit.info.select(kind="observed")]
    if not observed:
        asked = "fit.posterior() draws its latent sites" if fit.info.select() else "it has no latent sites either"
        raise IncompatibleError(
            f"{fit.program.name!r} has no observed sites, so there are no replicates of them to draw; {asked}"
        )
    with fit.bound(seed):
        batch = dataset.batch()
        trace = poutine.trace(fit.program.model).get_trace(*batch.args, **batch.kwargs)
        there = {name: trace.nodes[name] for name in observed if name in trace.nodes}
        unseen = [name for name, node in there.items() if not node["is_observed"]]
        partly = [name for name in there if fit.info.shown(name) != name and entry_mask(there[name]) is not None]
        missing = [name for name in observed if name in unseen or name in partly]
        replicate, names = not missing, [fit.info.shown(name) for name in missing or observed]
        # No observation informs the locals, or none can: without a density replicates are what the program makes.
        if len(unseen) == len(observed) or (replicate and _is_forward(fit)):
            latents = global_draws(fit, draws)
        else:
            latents = latent_draws(fit, batch, draws, training=dataset.same_rows(fit.data))
        if fit.info.select(kind="factor"):
            refuse_weighed_draws(fit.program.name, partial(run, fit, replicate=replicate), batch, latents[0], "predict")
        traces = (run(fit, batch, values, replicate=replicate) for values in latents)
        return _stacked([{name: t.nodes[name]["value"] for name in names if name in t.nodes} for t in traces])


def _is_forward(fit: Fit) -> bool:
    """Whether neither what was learned nor the program says anything of the latents of given rows (a GAN)."""
    silent = fit.program.local_posterior is None and "density" not in fit.info.offers
    return silent and fit.learned.point is not None


def prior_rows(model: Any, batch: Batch, draws: int) -> dict[str, Tensor]:
    """``draws`` runs of the model with its observations removed: by site, draws x shape of the site."""
    free = unobserved(model)
    runs = []
    for _ in range(draws):
        with drawing(getattr(model, "__name__", type(model).__name__)):
            trace = poutine.trace(free).get_trace(*batch.args, **batch.kwargs)
        runs.append(
            {
                name: node["value"]
                for name, node in trace.nodes.items()
                if (is_sample(node) or is_derived(node)) and not isinstance(node["fn"], Unit)
            }
        )
    return _stacked(runs)


def refuse_improper(program: str, names: set[str]) -> None:
    if names:
        listed = ", ".join(sorted(names))
        raise IncompatibleError(
            f"{program!r} gives {listed} a flat (improper) prior, which has no draws. From a fit, draw rows at values "
            f"of your own: fit.sample(n, given={{{sorted(names)[0]!r}: ...}})"
        )


def is_derived(node: Mapping[str, Any]) -> bool:
    return node["type"] == "sample" and is_deterministic(node)


def positive(name: str, value: int) -> None:
    require_whole(name, value)


def _stacked(draws: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """By site, draws x shape of the site."""
    names = draws[0].keys() if draws else ()
    return {name: torch.stack([draw[name].detach() for draw in draws]) for name in names}
