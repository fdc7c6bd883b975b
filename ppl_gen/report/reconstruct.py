"""From rows to codes and back without noise: every latent at its mean, every finite one at its likeliest value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from ppl_gen.data.batching import Batch, Dataset
from ppl_gen.draws.local_draws import local_draws
from ppl_gen.draws.predictive import amortised, global_draws, run
from ppl_gen.draws.sampling import fixed_value, template
from ppl_gen.errors import IncompatibleError
from ppl_gen.handlers.sites import is_sample
from ppl_gen.handlers.substitute import Chosen

if TYPE_CHECKING:
    from ppl_gen.fits.result import Fit

__all__ = [
    "decoded",
    "expected",
    "few",
    "latent_means",
    "levels",
    "pictured",
    "point_value",
    "reconstructed",
    "traversed",
]


MOST = 2000  # rows
AVERAGED = 100  # draws of a latent, where its mean has no closed form


def point_value(fn: Any) -> Tensor | None:
    """The mean, or the likeliest of finitely many values; None where neither has a closed form.

    >>> point_value(dist.Normal(torch.zeros(2), 1.0).to_event(1))
    tensor([0., 0.])
    >>> point_value(dist.Categorical(torch.tensor([0.2, 0.8])))
    tensor(1)
    """
    base = _bare(fn)
    if base.has_enumerate_support:
        support = base.enumerate_support(expand=True)
        best = base.log_prob(support).argmax(0, keepdim=True)
        index = best.reshape(*best.shape, *[1] * base.event_dim).expand(1, *support.shape[1:])
        return support.gather(0, index).squeeze(0)
    return None if base.support.is_discrete else _mean(base)


def expected(fn: Any) -> Tensor | None:
    """What is drawn of an observed site: its mean, over the levels where values are levels; None where it has none.

    >>> expected(dist.Categorical(torch.tensor([[0.5, 0.5, 0.0]])))
    tensor([0.5000])
    """
    base = _bare(fn)
    mean = _mean(base)
    if mean is not None or not base.has_enumerate_support or base.event_dim:
        return mean
    support = base.enumerate_support(expand=True)
    weighted: Tensor = (base.log_prob(support).softmax(0) * support).sum(0)
    return weighted


def _bare(fn: Any) -> Any:
    """Without the wrappers that only regroup dimensions or leave out log densities."""
    while isinstance(fn, dist.Independent | dist.MaskedDistribution):
        fn = fn.base_dist
    return fn


def _mean(fn: Any) -> Tensor | None:
    try:
        mean: Tensor = fn.mean
    except (NotImplementedError, AttributeError):
        return None
    return mean if bool(mean.isfinite().all()) else None


def pictured(fit: Fit) -> str:
    """The observed site of each row that holds most numbers; raises IncompatibleError where there is none."""
    sites = fit.info.select(kind="observed", local=True)
    if not sites:
        raise IncompatibleError(
            f"{fit.program.name!r} observes nothing inside its data plate: there is nothing to draw"
        )
    return max(sites, key=lambda site: torch.Size(site.event_shape).numel()).name


def latent_means(fit: Fit, batch: Batch) -> dict[str, Tensor]:
    """Every latent given the rows, settled; inside ``fit.bound()``."""
    names = {site.name for site in fit.info.select()}
    if amortised(fit):
        with Chosen(point_value):
            trace = poutine.trace(fit.guide).get_trace(*batch.args, **batch.kwargs)
        values = {n: node["value"] for n, node in trace.nodes.items() if is_sample(node) and n in names}
    else:
        values = dict(global_draws(fit, 1)[0]) if fit.info.select(local=False) else {}
    if fit.program.local_posterior is not None:
        exact = fit.program.local_posterior(values, *batch.args, **batch.kwargs)
        found = {name: point_value(fn) for name, fn in exact.items() if name not in values}
        values |= {name: value for name, value in found.items() if value is not None}
    loose = [site.name for site in fit.info.select(local=True) if site.name not in values and not site.finite]
    if loose:  # their means, over draws given the rows
        drawn = local_draws(fit, batch, [values] * AVERAGED)
        values |= {name: torch.stack([draw[name] for draw in drawn]).mean(0) for name in loose if name in drawn[0]}
    finite = [name for name in fit.info.finite_latents if name not in values]
    return local_draws(fit, batch, [values])[0] if finite else values


def reconstructed(fit: Fit, data: Dataset, rows: int) -> tuple[Tensor, Tensor]:
    """The first rows, and what is expected in their place given their own latents: rows x shape, twice."""
    with fit.bound():
        batch = data.head(rows)
        values = latent_means(fit, batch)
        with Chosen(point_value):
            node = run(fit, batch, values).nodes[pictured(fit)]
        return node["value"].cpu(), _shown(node)


def observed(fit: Fit, data: Dataset, rows: int) -> Tensor:
    """The first rows of the site that is drawn."""
    with fit.bound(), Chosen(point_value):
        value: Tensor = run(fit, data.head(rows), _shared(fit)).nodes[pictured(fit)]["value"]
        return value.cpu()


def few(fit: Fit) -> Dataset:
    """Training rows enough to say which units are active and how codes spread, evenly over all of them."""
    total = fit.data.rows or 0
    return fit.data if total <= MOST else fit.data.subset(torch.linspace(0, total - 1, MOST).round().long())


def decoded(fit: Fit, values: Mapping[str, Tensor], given: Mapping[str, Any], rows: int, *, alike: bool) -> Tensor:
    """What is expected of ``rows`` new rows at these latents, the others settled: rows x shape.

    Args:
        fit: a fit.
        values: latents, rows x shape each (and what to show where the observed site has no mean).
        given: inputs and sites of the user's choice.
        rows: how many.
        alike: inputs that are not given are those of the first training row, for all; else of the rows in turn.
    """
    with fit.bound():
        batch, fixed = prepared(fit, given, rows, alike=alike)
        with Chosen(point_value):
            return _shown(run(fit, batch, {**_shared(fit), **fixed, **values}, replicate=True).nodes[pictured(fit)])


def prepared(fit: Fit, given: Mapping[str, Any], rows: int, *, alike: bool) -> tuple[Batch, dict[str, Tensor]]:
    """A batch of new rows and the sites that are given; inside ``fit.bound()``. Raises ValueError for unknown names."""
    inputs = {name: value for name, value in given.items() if name in fit.data.entries}
    fixed = {name: value for name, value in given.items() if name not in inputs}
    unknown = [name for name in fixed if name not in fit.info.sites]
    if unknown:
        raise ValueError(f"given: no site or input named {unknown}; sites are {sorted(fit.info.sites)}")
    if alike:
        first = fit.data.template(1).kwargs
        rest = {name: first[name][0] for name in fit.data.entries if name in first and name not in inputs}
        inputs = rest | inputs
    sites = {name: value for name, value in given.items() if name in fit.info.sites}
    return template(fit, rows, inputs), {name: fixed_value(fit, name, value, rows) for name, value in sites.items()}


def _shared(fit: Fit) -> dict[str, Tensor]:
    """One value of the sites outside the data plate: settled where a guide knows them."""
    if not fit.info.select(local=False):
        return {}
    local = {site.name for site in fit.info.select(local=True)}
    with Chosen(point_value):
        return {name: value for name, value in global_draws(fit, 1)[0].items() if name not in local}


def traversed(fit: Fit, row: Dataset, site: str, units: Sequence[int], values: Tensor) -> Tensor:
    """What is expected as one unit of a row's code takes other values: units x values x shape.

    Latents that follow from the code in the model follow it; all others stay where the row put them.

    Args:
        fit: a fit.
        row: data of one row.
        site: of the code.
        units: which to move, in the flattened code.
        values: for every unit of the code, values x units.
    """
    count = len(units) * len(values)
    with fit.bound():
        batch = row.batch()
        found = latent_means(fit, batch)
        codes = found[site].reshape(1, 1, -1).repeat(len(units), len(values), 1)
        for i, unit in enumerate(units):
            codes[i, :, unit] = values[:, unit].to(codes)
        local = {known.name for known in fit.info.select(local=True)}
        kept = {name: _repeated(value, count) if name in local else value for name, value in found.items()}
        kept[site] = codes.reshape(count, *found[site].shape[1:])
        inputs = {name: v if name in row.constants else _repeated(v, count) for name, v in batch.kwargs.items()}
        args = tuple(_repeated(v, count) for v in batch.args)
        many = replace(batch, args=args, kwargs=inputs, rows=count, total=count, index=None)
        followers = {known.name for known in fit.info.select(local=True, discrete=False)} - {site}
        with Chosen(point_value):
            nodes = run(fit, many, {n: v for n, v in kept.items() if n not in followers}, replicate=True).nodes
            followers = {name for name in followers if name in nodes and _varies(nodes[name]["fn"])}
            trace = run(fit, many, {n: v for n, v in kept.items() if n not in followers}, replicate=True)
        shown = _shown(trace.nodes[pictured(fit)])
    return shown.reshape(len(units), len(values), *shown.shape[1:])


def _repeated(value: Any, count: int) -> Any:
    return value.expand(count, *value.shape[1:]) if isinstance(value, Tensor) and value.dim() else value


def _varies(fn: Any) -> bool:
    mean = _mean(_bare(fn))
    return mean is not None and bool((mean - mean[:1]).abs().max() > 1e-6)


def levels(fit: Fit, site: str, scores: Tensor, means: Tensor) -> Tensor:
    """Values of a code at standard normal ``scores`` (... x its shape): quantiles of its prior.

    Under a flat prior the codes of the rows say what is usual: ``means`` (rows x shape) gives location and scale.
    """
    if fit.info.sites[site].improper:
        return means.mean(0) + means.std(0) * scores
    with fit.bound():
        batch, _ = prepared(fit, {}, 1, alike=True)
        scores = scores.to(device=fit.data.device, dtype=fit.data.dtype)
        with Chosen(point_value):
            fn = _bare(run(fit, batch, _shared(fit), replicate=True).nodes[site]["fn"])
        try:
            values: Tensor = fn.icdf(torch.special.ndtr(scores))
        except NotImplementedError:
            values = fn.mean + fn.variance.sqrt() * scores
        return values.cpu()


def _shown(node: Mapping[str, Any]) -> Tensor:
    mean = expected(node["fn"])
    shown: Tensor = node["value"] if mean is None else mean
    return shown.detach().cpu()
