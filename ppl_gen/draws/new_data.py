"""New rows for a fit: they must be such that its program can be run on them, and means the same by it."""

from __future__ import annotations

import contextlib
import string
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pyro
from pyro import poutine

from ppl_gen.capture.domains import refuse_outside
from ppl_gen.data.batching import Batch, Dataset
from ppl_gen.data.frames import check_column_names, frames
from ppl_gen.data.masks import refuse_unread_masks
from ppl_gen.draws.predictive import global_draws
from ppl_gen.enumeration.finite_globals import summed_globals
from ppl_gen.errors import PROGRAM_ERRORS, IncompatibleError
from ppl_gen.handlers.sites import is_sample
from ppl_gen.handlers.substitute import Substitute
from ppl_gen.handlers.whole_plates import RowsOf
from ppl_gen.program.checks import check_densities
from ppl_gen.program.honoured import refuse_idle_masks
from ppl_gen.program.missing import refuse_read_nan
from ppl_gen.workspace.isolation import without_side_effects

if TYPE_CHECKING:
    from ppl_gen.fits.result import Fit

__all__ = ["check_columns", "check_rows", "follows_rows", "require_shared", "row_latents"]

_NAMED = 3


def check_rows(fit: Fit, data: Dataset) -> None:
    """Run the program once on ``data`` (on a slice of them when they are large) at the learned parameters.

    Torch would stretch a column to as many as the program has, and answer: so a value must have the shape of its site.

    Raises:
        ValueError, TypeError: naming both shapes, if the program cannot be run on these rows, gives them other latent
            sites, or stretches them; or if observed values lie outside of their support.
    """
    idle = data.read - {*data.entries, *data.constants}  # a recipe read them once, and is not asked about new rows
    refuse_unread_masks(data, (*data.left_out, *idle), fit.program.name)
    _refuse_own_latents(fit, data)
    check_column_names("data", _frames(data), _frames(fit.data))
    if data.missing:
        with fit.bound():
            refuse_read_nan(fit.program.model, data)
    batch = data.glimpse()
    try:
        with fit.bound(), without_side_effects():
            values = global_draws(fit, 1)[0] if fit.info.select(local=False) else {}
            with pyro.validation_enabled(True), RowsOf(fit.info.data_plate, batch.rows), Substitute(values):
                trace = poutine.trace(fit.program.model).get_trace(*batch.args, **batch.kwargs)
                if _columns(data) != _columns(fit.data):
                    _check_sites(fit, trace)
                check_densities(trace)
            with Substitute(values):
                refuse_idle_masks(fit.program, batch)
            refuse_outside(fit.program.model, data, fit.info.data_plate)
    except IncompatibleError:
        raise
    except PROGRAM_ERRORS as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(_unlike(fit, data) + text) from error


def follows_rows(fit: Fit, batch: Batch) -> bool:
    """Whether the data plate has as many rows as ``batch``, whatever number the fit was made on; in ``fit.bound()``."""
    looked = RowsOf(fit.info.data_plate, batch.rows)
    with contextlib.suppress(*PROGRAM_ERRORS):
        with without_side_effects(), looked:
            fit.program.model(*batch.args, **batch.kwargs)
    return looked.fits


def row_latents(fit: Fit) -> list[str]:
    """Of a program without a data plate, the latent sites that follow the number of rows: in shape, or in being there.

    They belong to the training rows one by one, although no plate says so; other rows have their own.
    """
    rows = fit.data.rows
    if fit.info.data_plate is not None or rows is None or rows < 2 or not fit.info.select():
        return []
    if "row latents" not in fit.computed:
        few = fit.data.head(rows // 2)
        found = []
        with contextlib.suppress(*PROGRAM_ERRORS):
            with fit.bound(), without_side_effects():
                nodes = poutine.trace(fit.program.model).get_trace(*few.args, **few.kwargs).nodes
            whole = {site.name: (*site.batch_shape, *site.event_shape) for site in fit.info.select()}
            found = [n for n, shape in whole.items() if n not in nodes or tuple(nodes[n]["value"].shape) != shape]
            stems = {n.rstrip(string.digits) for n in found if n not in nodes}  # of z_1 ... z_9, z_1 is there for few
            found += [n for n in whole if n not in found and n.rstrip(string.digits) in stems]
        fit.computed["row latents"] = found
    names: list[str] = fit.computed["row latents"]
    return names


def _refuse_own_latents(fit: Fit, data: Dataset) -> None:
    """What was learned of the latents of the training rows says nothing of those of other rows."""
    if not data.same_rows(fit.data) and (names := row_latents(fit)):
        listed = ", ".join(names) if len(names) <= _NAMED else f"{', '.join(names[:_NAMED])} and {len(names) - 3} more"
        raise IncompatibleError(
            f"data: {listed} of {fit.program.name!r} follow the number of rows, and the program has no data plate: "
            "what was learned of them belongs to the training rows, and other rows have values of their own. Put rows "
            'that are independent into `with pyro.plate("data", len(x)):`; of rows that depend on each other, as in a '
            "series, only those that were fitted can be asked about, without data=, and fit.sample(n) makes new ones"
        )


def require_shared(fit: Fit, data: Dataset) -> None:
    """Refuse the evidence of new data without rows where finite latents are summed out of the training data.

    Without a data plate all data are one row, and its finite latents are summed out by their prior. New data follow
    from their values given the training data, of which nothing is left in such a sum.

    Raises:
        IncompatibleError: naming the sites.
    """
    if fit.info.data_plate is not None or fit.program.evidence is not None or data.same_rows(fit.data):
        return
    known = {*(fit.info.guide_sites or {}), *fit.learned.sites}
    if names := summed_globals(fit, known):
        raise IncompatibleError(
            f"data: {', '.join(names)} of {fit.program.name!r} {'is' if len(names) == 1 else 'are'} summed out, and "
            "the program has no data plate: whether new data share the values that the training data speak for, or "
            'have values of their own, cannot be determined. Put the rows into `with pyro.plate("data", len(x)):`; '
            "sites outside of it are shared, sites inside are each row's own"
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
    check_column_names(name, _frames(held), _frames(train))


def _frames(data: Dataset) -> dict[str, Any]:
    return frames(data.original, data.order, next(iter(data.entries), "data"))


def _columns(data: Dataset) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape[1:]) for name, value in data.entries.items()}


def _unlike(fit: Fit, data: Dataset) -> str:
    known, given = _columns(fit.data), _columns(data)
    if all(known.get(name) == shape for name, shape in given.items()):
        return f"data: the fit of {fit.program.name!r} cannot take these rows: "
    return f"data: the fit of {fit.program.name!r} was made on {_shown(known)}, and cannot take {_shown(given)}: "


def _shown(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} ({', '.join(map(str, ['rows', *shape]))})" for name, shape in shapes.items()) or "nothing"
