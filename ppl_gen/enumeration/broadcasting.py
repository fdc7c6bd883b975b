"""Whether a program means the same when its finite sites take all of their values at once.

Code that runs when a site is drawn need not run, or not mean the same, when that site carries one more dimension on the
left: a matrix product, a sum over everything, an index from the left, an ``if``. Where it runs, the densities of the
enumerated program at some drawn values are compared with those of the program run at these values.
"""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from torch import Tensor

from ppl_gen.data.batching import Batch
from ppl_gen.enumeration.contraction import dims_of
from ppl_gen.enumeration.enumerated_trace import batch_shape, enumerated_trace, is_discrete, outer_plates, packed_sites
from ppl_gen.handlers.last_site import LastSite
from ppl_gen.handlers.sites import is_sample, support
from ppl_gen.handlers.substitute import Substitute
from ppl_gen.handlers.whole_plates import RowsOf, whole_plates
from ppl_gen.program.info import ProgramInfo
from ppl_gen.workspace.isolation import validation_off, without_side_effects

__all__ = ["unenumerable"]

ROWS = 16  # rows that are looked at, where the program runs on that many
TRIES = 3  # joint values of the finite sites that are compared

_EDIT = (
    "An enumerated site has one more dimension, left of all plates: write code that broadcasts over it (index and sum "
    "from the right, torch.where for `if`). Where a row reads all members of another plate at once, as `X @ (b * g)`, "
    "give each member a site of its own: `for j in range(4): g_j = pyro.sample(f'g_{j}', ...)`"
)


def unenumerable(model: Callable[..., Any], batch: Batch, few: Callable[[int], Batch], info: ProgramInfo) -> str:
    """Why the finite latent sites cannot be summed out, naming one and what reads it; empty where they can.

    ``few`` gives the first rows of the data, which are enough unless the program is made for all of them.
    """
    finite = info.finite_latents
    if not finite:
        return ""
    with without_side_effects(), validation_off(), whole_plates():
        looked = few(ROWS) if (batch.rows or 0) > ROWS else batch
        drawn = _drawn(model, looked, info.data_plate)
        if drawn is None:
            looked, drawn = batch, _drawn(model, batch, info.data_plate)
        if drawn is None:  # then it does not run at all, and the dry run says so
            return ""
        return _problem(model, looked, info, finite, drawn)


def _drawn(model: Callable[..., Any], batch: Batch, plate: str | None) -> poutine.Trace | None:
    try:
        with RowsOf(plate, batch.rows):
            return poutine.trace(model).get_trace(*batch.args, **batch.kwargs)
    except Exception:
        return None


def _problem(
    model: Callable[..., Any], batch: Batch, info: ProgramInfo, finite: Collection[str], drawn: poutine.Trace
) -> str:
    values = _latents(drawn)
    rest = {name: value for name, value in values.items() if name not in finite}
    last = LastSite()
    try:
        with last:
            enumerated = enumerated_trace(
                model, batch.args, batch.kwargs, discrete=finite, values=rest, plate_nesting=info.plate_nesting
            )
    except Exception as error:
        return _fails(_culprit(model, batch, info, finite, values), error, last.where)
    for chosen in _assignments(enumerated, drawn):
        try:
            alone, again = (_at_values(model, batch, {**rest, **chosen}) for _ in range(2))
        except Exception:  # not every combination need be possible
            continue
        wrong = _differing(enumerated, alone)
        if wrong is not None and _steady(alone, again, wrong):
            reads = ", ".join(map(repr, _summed_in(enumerated, wrong) or finite))
            return (
                f"with {reads} enumerated, the density at site {wrong!r} differs from that with the values one by one, "
                f"so that their sum would be wrong. {_EDIT}"
            )
    return ""


def _at_values(model: Callable[..., Any], batch: Batch, values: Mapping[str, Tensor]) -> poutine.Trace:
    with Substitute(values):
        return poutine.trace(model).get_trace(*batch.args, **batch.kwargs)


def _steady(one: poutine.Trace, other: poutine.Trace, name: str) -> bool:
    """A network with dropout gives another density every time, which says nothing of enumeration."""
    if name not in one.nodes:
        return True
    first, second = (trace.nodes[name]["fn"].log_prob(trace.nodes[name]["value"]) for trace in (one, other))
    return torch.allclose(first, second, equal_nan=True)


def _assignments(enumerated: poutine.Trace, drawn: poutine.Trace) -> Iterator[dict[str, Tensor]]:
    """All finite sites (in their shapes) at their first values, last, and any: a sum over {0, 1} is right at 1."""
    sites = {name: site for name, site in packed_sites(enumerated) if is_discrete(site)}
    for i in range(2 + TRIES):
        chosen = {}
        for name, site in sites.items():
            value, event, values = drawn.nodes[name]["value"], site["fn"].event_dim, support(site)
            shape = value.shape[: value.dim() - event]
            index = torch.full(shape, -i) if i < 2 else torch.randint(len(values), shape)
            chosen[name] = values[index]
        yield chosen


def _latents(trace: poutine.Trace) -> dict[str, Tensor]:
    return {name: node["value"] for name, node in trace.nodes.items() if is_sample(node) and not node["is_observed"]}


def _culprit(
    model: Callable[..., Any], batch: Batch, info: ProgramInfo, finite: Collection[str], values: Mapping[str, Tensor]
) -> list[str]:
    """The sites that fail when enumerated alone; all where it takes several."""
    found = []
    for name in finite:
        rest = {other: value for other, value in values.items() if other != name}
        try:
            enumerated_trace(
                model, batch.args, batch.kwargs, discrete=[name], values=rest, plate_nesting=info.plate_nesting
            )
        except Exception:
            found.append(name)
    return found or list(finite)


def _fails(names: Collection[str], error: Exception, reached: str) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    line = _line_of_user(error)
    where = f" in `{line}`" if line else ""
    if any(words in text for words in ("size of tensor", "Shape mismatch", "shape mismatch", "broadcast")):
        where = f"{where} ({reached})" if "site '" not in text else where
        text = f"shapes do not fit, {text}; an index of its own, as m.unsqueeze(-1), moves the enumerated dimension"
    text = text.rstrip(".")
    return f"the program does not run with {', '.join(map(repr, names))} enumerated{where}: {text}. {_EDIT}"


def _line_of_user(error: Exception) -> str:
    """The last line that is neither ours nor of the libraries below."""
    lines = ""
    for frame in traceback.extract_tb(error.__traceback__):
        path = frame.filename.replace("\\", "/")
        if not any(part in path for part in ("/ppl_gen/", "/pyro/", "/torch/", "/contextlib.py", "/functools.py")):
            lines = frame.line or linecache.getline(frame.filename, frame.lineno or 0).strip()
    return lines


def _differing(enumerated: poutine.Trace, drawn: poutine.Trace) -> str | None:
    """The first site whose enumerated density at the drawn values is not the density there."""
    indices = {}
    for name, site in packed_sites(enumerated):
        if is_discrete(site):
            index = _index(site, drawn.nodes[name]["value"])
            if index is None:
                return None  # a support that moves with other sites
            indices[site["infer"]["_enumerate_symbol"]] = index, outer_plates(site)
    for name, site in packed_sites(enumerated):
        if name not in drawn.nodes:
            return name
        node = drawn.nodes[name]
        alone = node["fn"].log_prob(node["value"])
        together = _at(enumerated, site, indices)
        if together is None or not _same(together, alone, batch_shape(site)):
            return name
    return None


def _index(site: Any, value: Tensor) -> Tensor | None:
    """Which of the enumerated values a drawn one is, in the shape of its plates."""
    values, event = support(site), site["fn"].event_dim
    lead = value.reshape(*value.shape[: value.dim() - event], 1, *value.shape[value.dim() - event :])
    equal = sum_rightmost((lead == values.reshape(-1, *value.shape[value.dim() - event :])).long(), event)
    hit = equal == max(1, int(torch.tensor(value.shape[value.dim() - event :]).prod()) if event else 1)
    if not bool(hit.any(-1).all()):
        return None
    return hit.long().argmax(-1)


def _at(trace: poutine.Trace, site: Any, indices: Mapping[str, tuple[Tensor, list[Any]]]) -> Tensor | None:
    """The log density of a site at one value of every finite site that it depends on, in the shape of its plates."""
    table, plates = site["packed"]["unscaled_log_prob"], outer_plates(site)
    places = {trace.plate_to_symbol[f.name]: f for f in plates}
    depth = max((-f.dim for f in plates), default=0)
    picks = []
    for axis, symbol in enumerate(dims_of(table)):
        if symbol in places:
            frame = places[symbol]
            picks.append(torch.arange(table.shape[axis]).reshape(-1, *[1] * (-frame.dim - 1)))
            continue
        if symbol not in indices:
            return None
        index, of = indices[symbol]
        if any(f.size > 1 and f.name not in {g.name for g in plates} for f in of):
            return None  # a product over all members of a plate that it does not stand in
        picks.append(index.reshape(index.shape[max(0, index.dim() - depth) :]) if depth else index.reshape(()))
    return table[tuple(picks)] if picks else table


def _same(together: Tensor, alone: Tensor, shape: list[int]) -> bool:
    """Whether two log densities agree once both are broadcast to the plates of their site, ``shape``."""
    try:
        one, other = together.broadcast_to(shape), alone.broadcast_to(shape)
    except RuntimeError:
        return False
    return torch.allclose(one, other, rtol=1e-3, atol=1e-4, equal_nan=True)


def _summed_in(trace: poutine.Trace, name: str) -> list[str]:
    dims = dims_of(trace.nodes[name]["packed"]["unscaled_log_prob"])
    return [
        n for n, s in packed_sites(trace) if is_discrete(s) and s["infer"]["_enumerate_symbol"] in dims and n != name
    ]
