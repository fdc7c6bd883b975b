"""The data plate: which one it is, whether it fits the rows, and what stands outside of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine

from ppl_gen.data.batching import Batch
from ppl_gen.handlers.sites import sample_nodes
from ppl_gen.program.program import Program

if TYPE_CHECKING:
    from ppl_gen.program.info import Site

__all__ = ["check_plate", "check_sizes", "data_plate", "rows_outside", "vectorised"]


#: A trace on fewer rows and how many they are, or None where the rows cannot be cut.
Fewer = Callable[[], tuple[poutine.Trace, int] | None]


def data_plate(program: Program, batch: Batch, trace: poutine.Trace, fewer: Fewer) -> str:
    """The name of the plate over the rows: the program's own, or the one plate that grows and shrinks with them.

    Raises:
        ValueError: where some plate of another name has as many rows as the data, and need not be theirs.
    """
    frames, rows = vectorised(trace), batch.rows
    over_rows = [name for name, frame in frames.items() if frame.size == rows]
    if program.data_plate in frames or not over_rows:
        return program.data_plate
    few = fewer()
    if program.data_plate == "data" and few is not None:
        found, sizes = few
        follow = [name for name in over_rows if name in (f := vectorised(found)) and f[name].size == sizes]
        around = [{f.name for f in n["cond_indep_stack"]} for _, n in sample_nodes(trace) if n["is_observed"]]
        if len(follow) == 1 and follow[0] in set().union(*around):
            return follow[0]
        if len(over_rows) == 1 and around and all(over_rows[0] in names for names in around):  # its size is written out
            return over_rows[0]
    if len(over_rows) > 1:
        table = "\n".join(f"  {name!r}: {_inside(trace, name)}" for name in over_rows)
        raise ValueError(
            f"the program {program.name!r} has no plate named {program.data_plate!r} (its data_plate), and several "
            f"plates with as many rows as the data ({rows}):\n{table}\nSay which holds the rows, "
            f"pg.Program(model, data_plate={over_rows[0]!r}), or open one plate for all: `rows = pyro.plate(...)`, "
            "then `with rows:`."
        )
    raise ValueError(
        f"the program {program.name!r} has no plate named {program.data_plate!r} (its data_plate), but the plate "
        f"{over_rows[0]!r} has as many rows as the data ({rows}). Name it {program.data_plate!r}, or say "
        f"pg.Program(model, data_plate={over_rows[0]!r}){_across(batch, frames)}."
    )


def _across(batch: Batch, frames: Mapping[str, Any]) -> str:
    """A plate that runs along another dimension of the data than the first may be that of the rows."""
    for value in (*batch.args, *batch.kwargs.values()):
        for dim, size in enumerate(value.shape) if isinstance(value, torch.Tensor) else ():
            plates = [name for name, frame in frames.items() if dim and frame.size == size != batch.rows]
            if plates:
                return f"; if the rows are dimension {dim}, pg.Program(model, data_plate={plates[0]!r}, data_dim={dim})"
    return ""


def _inside(trace: poutine.Trace, plate: str) -> str:
    names = [n for n, node in sample_nodes(trace) if plate in (f.name for f in node["cond_indep_stack"])]
    return f"site(s) {', '.join(names)}"


def vectorised(trace: poutine.Trace) -> dict[str, Any]:
    """The frames of the vectorised plates of a trace, by name."""
    return {f.name: f for _, node in sample_nodes(trace) for f in node["cond_indep_stack"] if f.vectorized}


def check_plate(batch: Batch, frame: Any) -> None:
    """Raise ValueError unless the data plate holds the rows."""
    if frame is None:
        return
    if batch.rows is not None and frame.size not in (batch.rows,) and (frame.full_size or 0) != batch.rows:
        entries = [value for value in (*batch.args, *batch.kwargs.values()) if isinstance(value, torch.Tensor)]
        dims = [dim for value in entries for dim, size in enumerate(value.shape) if dim and size == frame.size]
        other = f"; or, where the rows are another dimension, pg.Program(model, data_dim={dims[0]})" if dims else ""
        raise ValueError(
            f"pyro.plate({frame.name!r}) has size {frame.size}, but the data has {batch.rows} rows here; size it by "
            f"the data it is given, pyro.plate({frame.name!r}, len(x)), so that minibatches and new rows fit too{other}"
        )


def rows_outside(batch: Batch, sites: dict[str, Site], frame: Any, fewer: Fewer) -> str:
    """Why a plate over the rows is not the data plate: a likelihood that runs over them stands outside; else "".

    On whole data the density is right, as that of a program without a data plate; a minibatch could not be rescaled.
    """
    outside = [site for site in sites.values() if site.kind == "observed" and not site.local and frame is not None]
    over_rows = [site.name for site in outside if _over_rows(site, batch.rows, fewer)]
    if not over_rows:
        return ""
    return (
        f"the observed site(s) {', '.join(map(repr, over_rows))} stand outside the data plate {frame.name!r} and run "
        "over its rows: all data count as one row, and on a minibatch their likelihood would not be rescaled. For rows "
        f"that are independent, move the statement into `with pyro.plate({frame.name!r}, len(x)):`"
    )


def check_sizes(batch: Batch, trace: poutine.Trace) -> None:
    """Raise ValueError where there are rows, and they may be those of a plate that does not say how many it holds."""
    for name, frame in vectorised(trace).items() if batch.rows is not None else ():
        inside = [n for _, n in sample_nodes(trace) if frame.size == -1 and frame in n["cond_indep_stack"]]
        batches = [torch.broadcast_shapes(_batch(n), n["fn"].batch_shape) for n in inside]
        held = [shape[frame.dim] for shape in batches if len(shape) >= -frame.dim]
        if any(size > 1 for size in held):
            raise ValueError(
                f"pyro.plate({name!r}) has no size and holds {max(held)}: say pyro.plate({name!r}, n), or, where these "
                f"are the rows of the data, pg.Program(model, data_plate={name!r})"
            )


def _batch(node: dict[str, Any]) -> torch.Size:
    shape: torch.Size = node["value"].shape
    return shape[: len(shape) - node["fn"].event_dim]


def _over_rows(site: Site, rows: int | None, fewer: Fewer) -> bool:
    """Whether a site has a dimension of rows; observations of groups, or of a constraint, have none."""
    shape = (*site.batch_shape, *site.event_shape)
    if rows is None or rows == 1 or rows not in shape:
        return False
    few = fewer()  # five groups and five rows: as many of them on fewer rows?
    if few is None or site.name not in few[0]:
        return True
    fn = few[0].nodes[site.name]["fn"]
    return (*fn.batch_shape, *fn.event_shape) != shape
