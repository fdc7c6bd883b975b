"""New rows from a fit: inputs and sites at values of one's own, everything else drawn."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from traceback import extract_tb
from typing import TYPE_CHECKING, Any

import torch
from pyro.distributions import Unit
from pyro.poutine import Trace
from torch import Tensor

from ppl_gen.data.batching import Batch
from ppl_gen.draws.forward import refuse_weighed_draws
from ppl_gen.draws.predictive import global_draws, is_derived, positive, refuse_improper, run
from ppl_gen.errors import PROGRAM_ERRORS, IncompatibleError
from ppl_gen.handlers.in_support import InSupport
from ppl_gen.handlers.sites import is_sample
from ppl_gen.handlers.whole_plates import RowsOf
from ppl_gen.inference.objectives.observed import reads_own_observation

if TYPE_CHECKING:
    from ppl_gen.fits.result import Fit

__all__ = ["fixed_value", "sample_rows", "template"]


def sample_rows(
    fit: Fit, n: int, given: Mapping[str, Any], seed: int | None, *, read: Tensor | None = None
) -> dict[str, Tensor]:
    """See `Fit.sample`; what the program reads comes from the rows ``read`` of the data, None: from the first ones."""
    from ppl_gen.draws.new_data import row_latents

    positive("n", n)
    if not isinstance(given, Mapping):
        raise TypeError(f'given: expected a mapping of sites or inputs, such as {{"y": 3}}, got {type(given).__name__}')
    inputs = {name: value for name, value in given.items() if name in fit.data.entries}
    fixed = {name: value for name, value in given.items() if name not in inputs}
    unknown = [name for name in fixed if name not in fit.info.sites]
    if unknown:
        whole = [name for name in unknown if name in fit.data.constants]
        said = f"; {', '.join(whole)} is passed whole with every call, and new rows take it as it is" if whole else ""
        raise ValueError(f"given: no site or input named {unknown}{said}; sites are {sorted(fit.info.sites)}")
    own = row_latents(fit)  # new rows get new ones
    with fit.bound(seed):
        batch = template(fit, n, inputs, read)
        shared = global_draws(fit, 1)[0] if fit.info.select(local=False) else {}
        values = {name: value for name, value in shared.items() if name not in own}
        values.update({name: fixed_value(fit, name, value, n) for name, value in {**fixed, **inputs}.items()})
        for name in set(fit.info.partly_observed) & set(values):  # a value given for a site is that of both its halves
            values |= {f"{name}_observed": values[name], f"{name}_unobserved": values[name]}
        refuse_improper(fit.program.name, {s.name for s in fit.info.select() if s.improper} - set(values))
        supports = InSupport({name: site.distribution for name, site in fit.info.sites.items() if name in given})
        rows = RowsOf(fit.info.data_plate, n, "the sample", _packed(fit))
        with _Generating(fit, n, given), rows, supports:
            _refuse_teacher_forcing(fit, batch, values)
            if fit.info.select(kind="factor"):
                refuse_weighed_draws(fit.program.name, partial(run, fit, replicate=True), batch, values, "sample")
            trace = run(fit, batch, values, replicate=True)
            _refuse_unheeded(fit, batch, values, trace, given)
        nodes, halves = trace.nodes.items(), fit.info.halves
        return {
            name: node["value"].detach()
            for name, node in nodes
            if (is_sample(node) or is_derived(node)) and not isinstance(node["fn"], Unit) and name not in halves
        }


def _packed(fit: Fit) -> str:
    """What to say of another number of rows where all rows come inside a value that is passed whole, a dict, say."""
    if fit.data.rows is not None:
        return ""
    held = [name for name, value in fit.data.constants.items() if isinstance(value, Mapping | list | tuple | Tensor)]
    if not held:
        return ""
    kinds = ", ".join(f"{name} ({type(fit.data.constants[name]).__name__})" for name in held)
    return (
        f"the rows of {fit.program.name!r} come inside {kinds}, passed whole, and cannot be repeated or left out one "
        "by one. fit.sample makes as many as it was fitted to; for other numbers, let the model name what has rows, "
        "as in `def model(x, y=None)`, and pass {'x': x, 'y': y} as data"
    )


class _Generating:
    """What the program itself raises as it generates is told as such: it may not be made to run without its data."""

    def __init__(self, fit: Fit, n: int, given: Collection[str]) -> None:
        self.fit, self.n = fit, n
        self.inputs = sorted(set(given) - set(fit.info.sites))

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        if not isinstance(error, PROGRAM_ERRORS):
            return
        if isinstance(error, LookupError) and self.inputs:
            program, names = self.fit.program.name, ", ".join(self.inputs)
            raise ValueError(
                f"given: the program {program!r} cannot be run on the values of {names}: {error}"
            ) from error
        last = extract_tb(error.__traceback__)[-1].filename
        if isinstance(error, IncompatibleError) or Path(last).is_relative_to(Path(__file__).parents[1]):
            return
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"sample: the program {self.fit.program.name!r} failed as it generated {self.n} rows without its "
            f"observations: {text}"
        ) from error


def template(fit: Fit, n: int, inputs: Mapping[str, Any], read: Tensor | None = None) -> Batch:
    batch = fit.data.template(n) if read is None else fit.data.batch(read, total=n)
    args, kwargs = list(batch.args), dict(batch.kwargs)
    for name, value in inputs.items():
        place = fit.data.positional.index(name) if name in fit.data.positional else None
        old = kwargs[name] if place is None else args[place]
        new = _spread(name, _as_kind_of(name, _given_numbers(name, value), old), tuple(old.shape))
        if place is not None:
            args[place] = new
        else:
            kwargs[name] = new
    return replace(batch, args=tuple(args), kwargs=kwargs)


def fixed_value(fit: Fit, name: str, value: Any, n: int) -> Tensor:
    site = fit.info.sites.get(name)
    tensor = _given_numbers(name, value).to(fit.data.device)
    if site is not None and not site.discrete:
        tensor = tensor.to(fit.data.dtype)
    if site is None:
        return tensor
    if not site.local:
        return _spread(name, tensor, (*site.batch_shape, *site.event_shape), whole=True)
    batch, at = list(site.batch_shape), 0
    if batch:  # the rows stand where the data plate has them, in front of other plates or behind
        at = len(batch) + dict(zip(site.plates, site.plate_dims, strict=True)).get(
            str(fit.info.data_plate), -len(batch)
        )
        batch[at] = n
    return _spread(name, tensor, (*batch, *site.event_shape), whole=len(batch) <= 1, at=at)


def _as_kind_of(name: str, value: Tensor, old: Tensor) -> Tensor:
    """The numbers in the type of an input; as they are where whole numbers there would cut them off."""
    cast = value.to(old)
    if old.is_floating_point() or bool((cast.cpu().double() == value.cpu().double()).all()):
        return cast
    if old.dtype is torch.bool:
        raise ValueError(f"given: {name!r} holds truth values in the data, got {value.flatten()[:3].tolist()}")
    return value.to(device=old.device, dtype=torch.get_default_dtype())


def _given_numbers(name: str, value: Any) -> Tensor:
    try:
        tensor = torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"given: {name!r}: expected numbers, got {type(value).__name__}") from error
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"given: {name!r}: expected finite numbers, got NaN or infinity")
    return tensor


def _spread(name: str, value: Tensor, shape: tuple[int, ...], *, whole: bool = False, at: int = 0) -> Tensor:
    """One value for all rows, or one for each along dimension ``at``; raises ValueError for another number or shape."""
    try:
        spread = value.expand(shape) if at or value.dim() < len(shape) else value
    except RuntimeError:
        spread = value
    fits = spread.dim() >= len(shape) and spread.shape[at : at + 1] == shape[at : at + 1]
    if not fits or (whole and spread.shape != shape):
        raise ValueError(f"given: {name!r} has shape {tuple(value.shape)}, expected {shape} or one value for all rows")
    return spread


def _refuse_unheeded(
    fit: Fit, batch: Batch, values: Mapping[str, Tensor], trace: Trace, given: Collection[str]
) -> None:
    """Raise ValueError for what was given and decides nothing: computed values, and observations by another name."""
    nodes = {name: node for name, node in trace.nodes.items() if node["type"] == "sample"}
    for name in sorted(set(given) & set(fit.info.sites)):
        value = nodes[name]["value"] if name in nodes else None
        heeded = value is not None and value.shape == values[name].shape and bool((value == values[name]).all())
        if not heeded and name not in fit.info.partly_observed:
            how = "is computed by the program" if name in nodes else "is not reached"
            raise ValueError(f"given: {name!r} {how}, so it cannot be fixed; give values of what it is computed from")
    for name in sorted(set(given) - set(fit.info.sites)):
        at = fit.data.positional.index(name) if name in fit.data.positional else None
        value = batch.kwargs[name] if at is None else batch.args[at]
        if found := [site for site, node in nodes.items() if node["infer"].get("obs") is value]:
            raise ValueError(
                f"given: {name!r} is what is observed at {found[0]!r}, which is drawn here; to fix that, give "
                f"{{{found[0]!r}: ...}}"
            )


def _refuse_teacher_forcing(fit: Fit, batch: Batch, values: Mapping[str, Tensor]) -> None:
    """A program that reads x in order to make x cannot generate by forgetting its observation: say so."""
    if fit.program.drawn_by_chain:
        return
    observed = [site.name for site in fit.info.select(kind="observed")]
    found = reads_own_observation(lambda b: run(fit, b, values, replicate=True), batch, observed)
    reads = [name for name in found if name not in values]
    if reads:
        raise IncompatibleError(
            f"the program {fit.program.name!r} reads its own observation of {', '.join(reads)} to generate it, so "
            "removing the observation does not make new rows; generate step by step inside the model when it is None"
        )
