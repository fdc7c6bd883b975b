"""What the axes of exported draws are called, and what their entries are labelled with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ppl_gen.data.frames import frames

if TYPE_CHECKING:
    from ppl_gen.data.batching import Dataset
    from ppl_gen.program.info import ProgramInfo, Site

__all__ = ["Labels", "column_dims", "labels_of", "pandas_coords", "site_dims", "variable_shapes"]

Shapes = Mapping[str, Sequence[int]]
Labels = tuple[dict[str, list[str]], dict[str, list[Any]]]
_PLAIN = "iufUM"  # kinds of numpy that xarray and netCDF hold as they are


def labels_of(info: ProgramInfo, data: Dataset, shapes: Shapes, unsampled: Sequence[str], whole: Dataset) -> Labels:
    """Names of the axes by variable, and labels by axis, of variables of the ``shapes`` given (without chain, draw).

    ``data`` are the rows that were exported, the first of ``whole``; ``unsampled`` runs over the steps of training.
    """
    dims = site_dims(info, shapes, data.rows)
    dims |= column_dims(info, data, shapes, whole)
    dims |= {name: ["step"] for name in unsampled}
    return dims, pandas_coords(info, whole, data.rows)


def variable_shapes(groups: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
    """The shape of every variable without chain and draw, but of log likelihoods, which have lost their events."""
    shapes: dict[str, tuple[int, ...]] = {}
    for group, variables in groups.items():
        lead = 0 if group in ("observed_data", "constant_data") else 2
        if group not in ("log_likelihood", "sample_stats"):
            shapes |= {name: tuple(value.shape[lead:]) for name, value in variables.items() if name not in shapes}
    return shapes


def site_dims(info: ProgramInfo, shapes: Shapes, rows: int | None) -> dict[str, list[str]]:
    """Names of the axes of every site that plates run over: the plates' own; ``rows`` are those of the data plate.

    An axis keeps its number where no plate runs along it, where the site is not expanded over the plate, and where
    plates of one name differ in size.
    """
    sizes: dict[str, set[int]] = defaultdict(set)
    for site in info.sites.values():
        for plate, dim in zip(site.plates, site.plate_dims, strict=True):
            if -dim <= len(site.batch_shape):
                sizes[plate].add(site.batch_shape[dim])
    shared = {plate: next(iter(found)) for plate, found in sizes.items() if len(found) == 1}
    if info.data_plate is not None and rows is not None and info.data_plate in shared:
        shared[info.data_plate] = rows
    named = {name: _named_axes(info.sites[name], shape, shared) for name, shape in shapes.items() if name in info.sites}
    return {name: found for name, found in named.items() if found}


def _named_axes(site: Site, shape: Sequence[int], sizes: Mapping[str, int]) -> list[str]:
    batch = min(len(site.batch_shape), len(shape))  # a derived value need not be expanded over its plates
    label = site.name.replace("/", ".")
    names = [f"{label}_dim_{i}" for i in range(batch)]
    found = False
    for plate, dim in zip(site.plates, site.plate_dims, strict=True):
        axis = batch + dim
        if 0 <= axis < batch and sizes.get(plate) == shape[axis]:
            names[axis], found = plate, True
    return names if found else []


def column_dims(info: ProgramInfo, data: Dataset, shapes: Shapes, whole: Dataset) -> dict[str, list[str]]:
    """Axes of entries of the data that are no sites: the data plate, and the columns of a table that has names."""
    found = {}
    for name, shape in shapes.items():
        if name in info.sites or not len(shape) or name not in data.entries:
            continue
        plate = info.data_plate
        rows = plate if plate is not None and shape[0] == data.rows else f"{name}_dim_0"
        columns = [f"{name}_column"] if _columns(whole, name) is not None and len(shape) == 2 else []
        if rows == plate or columns:
            found[name] = [rows, *columns]
    return found


def pandas_coords(info: ProgramInfo, data: Dataset, rows: int | None = None) -> dict[str, list[Any]]:
    """Index and columns of the pandas objects that the data were given as, the first ``rows`` of them."""
    coords = {}
    indices = [list(part.index) for part in _named(data).values() if len(part) == data.rows]
    if info.data_plate is not None and indices and all(index == indices[0] for index in indices):
        coords[info.data_plate] = plain(indices[0][:rows])
    for name in data.entries:
        columns = _columns(data, name)
        if columns is not None:
            coords[f"{name}_column"] = plain(columns)
    return coords


def plain(values: Sequence[Any]) -> list[Any]:
    """Labels as netCDF keeps them: numbers, dates and text as they are, anything else as its text.

    >>> plain([("a", 1), ("b", 2)]), plain([3, 4])
    (["('a', 1)", "('b', 2)"], [3, 4])
    """
    try:
        array = np.asarray(values)
    except ValueError:
        return [str(value) for value in values]
    alike = len({type(value) for value in values}) <= 1
    return list(values) if array.ndim == 1 and array.dtype.kind in _PLAIN and alike else [str(v) for v in values]


def _columns(data: Dataset, name: str) -> list[Any] | None:
    """Names of the columns of an entry that was given as a table."""
    frame, value = _named(data).get(name), data.entries.get(name)
    if frame is None or value is None or value.ndim != 2 or not hasattr(frame, "columns"):
        return None
    columns = list(frame.columns)
    return columns if len(columns) == value.shape[1] else None


def _named(data: Dataset) -> dict[str, Any]:
    """The pandas objects among what was given (a frame of arguments: any name)."""
    return frames(data.original, data.order, next(iter(data.entries), "data"))
