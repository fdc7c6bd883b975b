"""New rows for a fit: they must be such that its program can be run on them, and means the same by it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import pyro
from pyro import poutine

from ppl_gen.data.batching import LARGE, Batch, Dataset
from ppl_gen.errors import IncompatibleError
from ppl_gen.handlers.whole_plates import RowsOf
from ppl_gen.inference.objectives.particles import Substitute
from ppl_gen.inference.objectives.tracing import is_sample
from ppl_gen.isolation import looking
from ppl_gen.predictive import global_draws
from ppl_gen.sitechecks import check_densities

if TYPE_CHECKING:
    from ppl_gen.result import Fit

__all__ = ["check_columns", "check_rows", "follows_rows"]

_FEW = 256
_BOOLEAN = ("torch.bool", "bool")


def check_rows(fit: Fit, data: Dataset) -> None:
    """Run the program once on ``data`` (on a slice of them when they are large) at the learned parameters.

    Torch would stretch a column to as many as the program has, and answer: so a value must have the shape of its site.

    Raises:
        ValueError, TypeError: naming both shapes, if the program cannot be run on these rows, gives them other latent
            sites, or stretches them; or if observed values lie outside of their support.
    """
    _refuse_unread_mask(fit, data)
    batch = data.head(_FEW) if data.elements > LARGE else data.batch()
    try:
        with fit.bound(), looking():
            values = global_draws(fit, 1)[0] if fit.info.select(local=False) else {}
            with pyro.validation_enabled(True), RowsOf(fit.info.data_plate, batch.rows), Substitute(values):
                trace = poutine.trace(fit.program.model).get_trace(*batch.args, **batch.kwargs)
                if _columns(data) != _columns(fit.data):
                    _check_sites(fit, trace)
                check_densities(trace)
    except IncompatibleError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(_unlike(fit, data) + text) from error


def follows_rows(fit: Fit, batch: Batch) -> bool:
    """Whether the data plate has as many rows as ``batch``, whatever number the fit was made on; in ``fit.bound()``."""
    looked = RowsOf(fit.info.data_plate, batch.rows)
    with contextlib.suppress(ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        with looking(), looked:
            fit.program.model(*batch.args, **batch.kwargs)
    return looked.fits


def _refuse_unread_mask(fit: Fit, data: Dataset) -> None:
    """An entry that says what is missing, and that the program does not read, would be passed over without a word."""
    given = data.original if isinstance(data.original, Mapping) else {}
    whole = {tuple(value.shape) for value in data.entries.values() if value.ndim > 1}
    for name, value in given.items():
        if name in data.entries or name in data.constants or str(getattr(value, "dtype", "")) not in _BOOLEAN:
            continue
        if "mask" in str(name).lower() or tuple(value.shape) in whole:
            raise IncompatibleError(
                f"data: {name!r} looks like a mask, and the program {fit.program.name!r} does not read it: its answers "
                "would be those of whole rows. Leave it out, or use a program that takes a mask (ppca, factor_analysis)"
            )


def _check_sites(fit: Fit, trace: poutine.Trace) -> None:
    """Rows with other columns are all right where the program makes of them what it made of the training rows."""
    strange = {n for n, node in trace.nodes.items() if is_sample(node) and not node["is_observed"]} - set(
        fit.info.sites
    )
    if lost := strange or {site.name for site in fit.info.select()} - set(trace.nodes):
        raise ValueError(f"with them it has other latent sites: {', '.join(sorted(lost))}")
    for name in (site.name for site in fit.info.select(kind="observed")):
        if name in trace.nodes:
            got, made = tuple(trace.nodes[name]["value"].shape), tuple(trace.nodes[name]["fn"].shape())
            if got != made:
                raise ValueError(f"the site {name!r} has shape {made}, and the value {got}")


def check_columns(name: str, held: Dataset, train: Dataset) -> None:
    """Raise ValueError, naming the argument, unless held-out rows have the entries and columns of the training rows."""
    for entry, value in train.entries.items():
        if entry not in held.entries:
            raise ValueError(f"{name}: the training rows have an entry {entry!r}, and the held-out rows do not")
        if held.entries[entry].shape[1:] != value.shape[1:]:
            got, expected = tuple(held.entries[entry].shape), ("rows", *value.shape[1:])
            raise ValueError(f"{name}: expected {entry!r} of shape {expected} as in training, got {got}")


def _columns(data: Dataset) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape[1:]) for name, value in data.entries.items()}


def _unlike(fit: Fit, data: Dataset) -> str:
    known, given = _columns(fit.data), _columns(data)
    if all(known.get(name) == shape for name, shape in given.items()):
        return f"data: the fit of {fit.program.name!r} cannot take these rows: "
    return f"data: the fit of {fit.program.name!r} was made on {_shown(known)}, and cannot take {_shown(given)}: "


def _shown(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} ({', '.join(map(str, ['rows', *shape]))})" for name, shape in shapes.items()) or "nothing"
