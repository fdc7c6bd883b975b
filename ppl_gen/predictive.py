"""Draws from a fit: posterior, posterior predictive, prior predictive, and new rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from pyro.distributions import ImproperUniform, Unit
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from ppl_gen.data.batching import LARGE, Batch, Dataset
from ppl_gen.errors import IncompatibleError
from ppl_gen.inference.objectives.observed import reads_own_observation
from ppl_gen.inference.objectives.particles import Substitute
from ppl_gen.inference.objectives.tracing import is_sample
from ppl_gen.isolation import looking
from ppl_gen.posterior import PointPosterior

if TYPE_CHECKING:
    from ppl_gen.result import Fit

__all__ = [
    "amortised",
    "global_draws",
    "latent_draws",
    "posterior_draws",
    "predictive_draws",
    "prior_predictive",
    "sample_rows",
]


def global_draws(fit: Fit, count: int) -> list[dict[str, Tensor]]:
    """Draws of the sites outside the data plate; call inside ``fit.bound()``.

    A guide is run on the training data (on a slice of it when they are large: globals do not depend on the rows).
    """
    data = fit.data
    batch = data.head(256) if data.elements > LARGE and fit.info.data_plate else data.batch()
    local = {site.name for site in fit.info.select(local=True)}
    return [{k: v for k, v in draw.items() if k not in local} for draw in fit.learned.draw(count, batch)]


def latent_draws(fit: Fit, batch: Batch, count: int, *, training: bool) -> list[dict[str, Tensor]]:
    """Joint draws of globals and locals given ``batch``; finite sites that nobody drew are drawn exactly.

    Local sites known only for the training rows (chains, autoguides) come for other rows from the program's own
    ``local_posterior``, where it offers that, else from the model's prior.
    """
    local = {site.name for site in fit.info.select(local=True)}
    if training or amortised(fit):
        draws = fit.learned.draw(count, batch)
    else:
        draws = [{k: v for k, v in draw.items() if k not in local} for draw in global_draws(fit, count)]
    names = {site.name for site in fit.info.select()}
    finite = [name for name in fit.info.finite_latents if not draws or name not in draws[0]]
    result = []
    for draw in draws:
        values = {name: value for name, value in draw.items() if name in names}
        values.update(_completed(fit, batch, values, finite))
        result.append(values)
    return result


def amortised(fit: Fit) -> bool:
    """Whether the guide's local sites follow the rows it is called with; inside ``fit.bound()``.

    A guide that holds parameters for each training row (an autoguide does) cannot be run on another number of rows.
    """
    local = {site.name for site in fit.info.select(local=True)}.intersection(fit.info.guide_sites or {})
    if fit.guide is None or isinstance(fit.guide, AutoGuide) or not local:
        return False
    few = fit.data.template(3 if fit.data.rows != 3 else 4)
    try:
        with looking():
            trace = poutine.trace(fit.guide).get_trace(*few.args, **few.kwargs)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    frames = [frame for name in local if name in trace for frame in trace.nodes[name]["cond_indep_stack"]]
    return {frame.size for frame in frames if frame.name == fit.info.data_plate} == {few.rows}


def _completed(fit: Fit, batch: Batch, values: Mapping[str, Tensor], finite: list[str]) -> dict[str, Tensor]:
    """What is still missing of the latents: from their exact conditional where there is one, else from the prior."""
    rest = [s.name for s in fit.info.select() if s.name not in values and s.name not in finite]
    drawn: dict[str, Tensor] = {}
    if rest and fit.program.local_posterior is not None:
        exact = fit.program.local_posterior(values, *batch.args, **batch.kwargs)
        drawn = {name: exact[name].sample() for name in rest if name in exact}
        values, rest = {**values, **drawn}, [name for name in rest if name not in drawn]
    if rest:
        trace = _run(fit, batch, values)
        drawn |= {name: trace.nodes[name]["value"] for name in rest if name in trace.nodes}
    if not finite:
        return drawn
    from ppl_gen.inference.enumeration import enumerated_trace, sample_discrete

    trace = enumerated_trace(
        fit.program.model,
        batch.args,
        batch.kwargs,
        discrete=finite,
        values={**values, **drawn},
        plate_nesting=fit.info.plate_nesting,
    )
    return drawn | sample_discrete(trace)


def _run(fit: Fit, batch: Batch, values: Mapping[str, Tensor], *, replicate: bool = False) -> poutine.Trace:
    model = poutine.uncondition(fit.program.model) if replicate else fit.program.model
    with Substitute(values):
        return poutine.trace(model).get_trace(*batch.args, **batch.kwargs)


def posterior_draws(fit: Fit, data: Any, draws: int, seed: int | None) -> dict[str, Tensor]:
    """See `Fit.posterior`."""
    _positive("draws", draws)
    if not fit.info.select():
        raise IncompatibleError(f"{fit.program.name!r} has no latent sites: there is nothing to draw a posterior of")
    _refuse_prior(fit)
    dataset = fit.dataset(data)
    with fit.bound(seed):
        batch = dataset.batch()
        latents = latent_draws(fit, batch, draws, training=data is None)
        extended = [values | _deterministic(fit, batch, values) for values in latents]
    return _stacked(extended)


def _refuse_prior(fit: Fit) -> None:
    """Draws of the prior must not pass for draws of a posterior that nobody learned (an adversarial fit, say)."""
    if not isinstance(fit.learned, PointPosterior):
        return
    exact = fit.program.local_posterior is not None
    asked = [site for site in fit.info.select() if not site.finite and not (site.local and exact)]
    unknown = [site.name for site in asked if site.name not in fit.learned.values]
    if unknown:
        raise IncompatibleError(
            f"{fit.algorithm} learned no posterior of {', '.join(unknown)} in {fit.program.name!r}; "
            "fit.sample(n) and fit.predict() draw what the program makes"
        )


def _deterministic(fit: Fit, batch: Batch, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = [site.name for site in fit.info.select(kind="deterministic")]
    if not names:
        return {}
    trace = _run(fit, batch, values)
    return {name: trace.nodes[name]["value"] for name in names if name in trace.nodes}


def predictive_draws(fit: Fit, data: Any, draws: int, seed: int | None) -> dict[str, Tensor]:
    """See `Fit.predict`."""
    _positive("draws", draws)
    dataset = fit.dataset(data)
    observed = [site.name for site in fit.info.select(kind="observed")]
    with fit.bound(seed):
        batch = dataset.batch()
        trace = poutine.trace(fit.program.model).get_trace(*batch.args, **batch.kwargs)
        missing = [name for name in observed if name in trace.nodes and not trace.nodes[name]["is_observed"]]
        replicate, names = not missing, missing or observed
        if len(missing) == len(observed):  # no observation informs the locals: they follow their prior
            latents = global_draws(fit, draws)
        else:
            latents = latent_draws(_given_rest(fit, missing), batch, draws, training=data is None)
        traces = (_run(fit, batch, values, replicate=replicate) for values in latents)
        return _stacked([{name: t.nodes[name]["value"] for name in names if name in t.nodes} for t in traces])


def _given_rest(fit: Fit, missing: list[str]) -> Fit:
    """The fit with sites that are missing here no longer among the observed (they are drawn, not latent)."""
    sites = {name: site for name, site in fit.info.sites.items() if name not in missing}
    return replace(fit, info=replace(fit.info, sites=sites)) if missing else fit


def prior_predictive(program: Any, data: Any, *, draws: int = 1000, seed: int = 0) -> dict[str, Tensor]:
    """Draws of every site from the prior, the observations of ``data`` removed: draws x shape.

    Args:
        program: a model function, a `Program` or a `Recipe`.
        data: what the model is called with: inputs, and the number of rows.
        draws: how many.
        seed: of all randomness here.

    Raises:
        ValueError, TypeError: as `pg.check` does, for a mistake in program or data.

    Example:
        >>> import pyro, torch, ppl_gen as pg
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> pg.prior_predictive(model, torch.zeros(3), draws=5, seed=0)["x"].shape
        torch.Size([5, 3])
    """
    from ppl_gen.driver import _built, _dtype_of, _modules_of
    from ppl_gen.isolation import Workspace, isolated
    from ppl_gen.program import as_recipe

    _positive("draws", draws)
    with isolated(seed, dtype=_dtype_of(data)), torch.no_grad():
        built, dataset = _built(as_recipe(program), data, None, None, None)
        with Workspace(dtype=dataset.dtype, training=False, modules=_modules_of(built, None)):
            batch = dataset.batch()
            trace = poutine.trace(built.model).get_trace(*batch.args, **batch.kwargs)
            _refuse_improper(
                built.name, {n for n, node in trace.nodes.items() if is_sample(node) and _is_flat(node["fn"])}
            )
            return prior_rows(built.model, batch, draws)


def prior_rows(model: Any, batch: Batch, draws: int) -> dict[str, Tensor]:
    """``draws`` runs of the model with its observations removed, stacked by site."""
    free = poutine.uncondition(model)
    runs = []
    for _ in range(draws):
        trace = poutine.trace(free).get_trace(*batch.args, **batch.kwargs)
        runs.append(
            {
                name: node["value"]
                for name, node in trace.nodes.items()
                if (is_sample(node) or _is_derived(node)) and not isinstance(node["fn"], Unit)
            }
        )
    return _stacked(runs)


def _is_flat(fn: Any) -> bool:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, ImproperUniform)


def sample_rows(fit: Fit, n: int, given: Mapping[str, Any], seed: int | None) -> dict[str, Tensor]:
    """See `Fit.sample`."""
    _positive("n", n)
    if not isinstance(given, Mapping):
        raise TypeError(f'given: expected a mapping of sites or inputs, such as {{"y": 3}}, got {type(given).__name__}')
    inputs = {name: value for name, value in given.items() if name in fit.data.entries}
    fixed = {name: value for name, value in given.items() if name not in inputs}
    unknown = [name for name in fixed if name not in fit.info.sites]
    if unknown:
        raise ValueError(f"given: no site or input named {unknown}; sites are {sorted(fit.info.sites)}")
    with fit.bound(seed):
        batch = _template(fit, n, inputs)
        values = dict(global_draws(fit, 1)[0]) if fit.info.select(local=False) else {}
        values.update({name: _fixed_value(fit, name, value, n) for name, value in {**fixed, **inputs}.items()})
        _refuse_improper(fit.program.name, {s.name for s in fit.info.select() if s.improper} - set(values))
        _refuse_teacher_forcing(fit, batch, values)
        trace = _run(fit, batch, values | {}, replicate=True)
        nodes = trace.nodes.items()
        return {
            name: node["value"].detach()
            for name, node in nodes
            if (is_sample(node) or _is_derived(node)) and not isinstance(node["fn"], Unit)
        }


def _refuse_improper(program: str, names: set[str]) -> None:
    if names:
        listed = ", ".join(sorted(names))
        raise IncompatibleError(
            f"{program!r} gives {listed} a flat (improper) prior, which has no draws. From a fit, draw rows at values "
            f"of your own: fit.sample(n, given={{{sorted(names)[0]!r}: ...}})"
        )


def _is_derived(node: Mapping[str, Any]) -> bool:
    return node["type"] == "sample" and bool(node["infer"].get("_deterministic"))


def _template(fit: Fit, n: int, inputs: Mapping[str, Any]) -> Batch:
    batch = fit.data.template(n)
    args, kwargs = list(batch.args), dict(batch.kwargs)
    for name, value in inputs.items():
        old = args[0] if name == fit.data.positional else kwargs[name]
        new = _spread(name, _given_numbers(name, value).to(old), tuple(old.shape))
        if name == fit.data.positional:
            args[0] = new
        else:
            kwargs[name] = new
    return replace(batch, args=tuple(args), kwargs=kwargs)


def _fixed_value(fit: Fit, name: str, value: Any, n: int) -> Tensor:
    site = fit.info.sites.get(name)
    tensor = _given_numbers(name, value).to(fit.data.device)
    if site is not None and not site.discrete:
        tensor = tensor.to(fit.data.dtype)
    if site is None:
        return tensor
    if not site.local:
        return _spread(name, tensor, (*site.batch_shape, *site.event_shape), whole=True)
    rows = [n] if site.batch_shape else []
    return _spread(name, tensor, (*rows, *site.event_shape), whole=len(site.batch_shape) <= 1)


def _given_numbers(name: str, value: Any) -> Tensor:
    try:
        tensor = torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"given: {name!r}: expected numbers, got {type(value).__name__}") from error
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"given: {name!r}: expected finite numbers, got NaN or infinity")
    return tensor


def _spread(name: str, value: Tensor, shape: tuple[int, ...], *, whole: bool = False) -> Tensor:
    """One value for all rows, or one for each; raises ValueError for another number of them (or another shape)."""
    try:
        spread = value.expand(shape) if value.dim() < len(shape) else value
    except RuntimeError:
        spread = value
    if spread.shape[:1] != shape[:1] or (whole and spread.shape != shape):
        raise ValueError(f"given: {name!r} has shape {tuple(value.shape)}, expected {shape} or one value for all rows")
    return spread


def _refuse_teacher_forcing(fit: Fit, batch: Batch, values: Mapping[str, Tensor]) -> None:
    """A program that reads x in order to make x cannot generate by forgetting its observation: say so."""
    if fit.program.energy is not None:
        return
    observed = [site.name for site in fit.info.select(kind="observed")]
    found = reads_own_observation(lambda b: _run(fit, b, values, replicate=True), batch, observed)
    reads = [name for name in found if name not in values]
    if reads:
        raise IncompatibleError(
            f"the program {fit.program.name!r} reads its own observation of {', '.join(reads)} to generate it, so "
            "removing the observation does not make new rows; generate step by step inside the model when it is None"
        )


def _positive(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")


def _stacked(draws: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    names = draws[0].keys() if draws else ()
    return {name: torch.stack([draw[name].detach() for draw in draws]) for name in names}


def observed_rows(fit: Fit, data: Dataset) -> dict[str, Tensor]:
    """Values of the observed sites; call inside ``fit.bound()``."""
    batch = data.batch()
    trace = poutine.trace(fit.program.model).get_trace(*batch.args, **batch.kwargs)
    names = [site.name for site in fit.info.select(kind="observed")]
    return {name: trace.nodes[name]["value"] for name in names if name in trace.nodes}
