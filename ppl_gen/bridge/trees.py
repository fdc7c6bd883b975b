"""Arrays labelled and put into groups: a tree as ArviZ knows it, whichever version is installed."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ppl_gen.bridge.versions import container

if TYPE_CHECKING:
    import xarray

__all__ = ["GROUPS", "to_tree"]

_SAMPLE_DIMS = ("chain", "draw")
_DATA_GROUPS = ("observed_data", "constant_data")
GROUPS = (
    "posterior",
    "posterior_predictive",
    "log_likelihood",
    "sample_stats",
    "prior",
    "prior_predictive",
    *_DATA_GROUPS,
)
"""The groups a tree may have, in the order in which they are kept."""


def to_tree(
    groups: Mapping[str, Mapping[str, Any]],
    *,
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    attrs: Mapping[str, object] | None = None,
    unsampled: Collection[str] = (),
    pointwise: tuple[str, Sequence[Any]] | None = None,
) -> Any:
    """Label arrays and put them into the container of the installed ArviZ (`InferenceData` or `DataTree`).

    An array of a sample group has shape ``(chain, draw, *event)``, one of ``observed_data`` or ``constant_data`` (and
    one named in ``unsampled``, such as a history of losses) has shape ``event``. ``dims[name]`` names the leading axes
    of ``event``, in every group that has the variable; axes it does not name become ``{name}_dim_{i}``. Log-likelihoods
    have lost their event axes: surplus names are left out there, and ``pointwise``, the name of the axis of their rows
    and their numbers, goes before all else; they get those of the labels of ``coords``. Groups without variables are
    left out.

    Two things that netCDF and xarray do not allow are renamed: ``/`` in names of variables becomes ``.``, and a
    dimension that has the name of a variable (plate ``data``, site ``data``) becomes ``{dim}_dim``. Attributes that
    are no number or text are stored as JSON.

    Raises ValueError where a group is unknown, an array lacks its (chain, draw) axes, sizes disagree, or ``coords``
    are of no axis.

    >>> tree = to_tree({"posterior": {"z": np.zeros((2, 5, 3))}}, dims={"z": ["data"]}, attrs={"seed": 0})
    >>> from ppl_gen.bridge import group
    >>> group(tree, "posterior")["z"].dims
    ('chain', 'draw', 'data')
    """
    _check_groups(groups)
    names = {name: name.replace("/", ".") for variables in groups.values() for name in variables}
    if len(set(names.values())) < len(names):
        raise ValueError(f"names of variables clash once '/' is replaced by '.': {sorted(names)}; rename a sample site")
    taken = set(names.values())
    labels = {name: [_free_dim(dim, taken) for dim in given] for name, given in (dims or {}).items()}
    known = {_free_dim(dim, taken): values for dim, values in (coords or {}).items()}
    datasets, used = {}, set(_SAMPLE_DIMS)
    for group_name in GROUPS:
        arrays = {name: np.asarray(value) for name, value in groups.get(group_name, {}).items()}
        if not arrays:
            continue
        axes = {
            name: _axes(group_name, name, value, labels.get(name, ()), name not in unsampled, names[name])
            for name, value in arrays.items()
        }
        own = known
        if group_name == "log_likelihood" and pointwise is not None:
            dim = _free_dim(pointwise[0], taken)
            labels_there = [known[dim][i] for i in pointwise[1]] if dim in known else pointwise[1]
            axes, own = {name: (*_SAMPLE_DIMS, dim) for name in arrays}, {**known, dim: labels_there}
        used |= {dim for named in axes.values() for dim in named}
        datasets[group_name] = _dataset(group_name, arrays, axes, names, own)
    if idle := [dim for dim in known if dim not in used]:
        raise ValueError(f"coords: no axis is called {idle}; there is {sorted(used - set(_SAMPLE_DIMS))}")
    return container(datasets, {key: _storable(value) for key, value in (attrs or {}).items()})


def _check_groups(groups: Mapping[str, Mapping[str, Any]]) -> None:
    unknown = [name for name in groups if name not in GROUPS]
    if unknown:
        raise ValueError(f"groups: unknown {unknown}; expected some of {list(GROUPS)}")
    for group_name, variables in groups.items():
        for name in variables:
            if name in _SAMPLE_DIMS:
                raise ValueError(
                    f"{group_name}: a variable is named {name!r}, a name reserved for the draws; rename the sample site"
                )


def _free_dim(dim: str, taken: Collection[str]) -> str:
    dim = dim.replace("/", ".")
    if dim in _SAMPLE_DIMS:
        raise ValueError(f"dims: {dim!r} is reserved for the draws; rename the plate")
    while dim in taken:
        dim += "_dim"
    return dim


def _axes(
    group_name: str, name: str, value: np.ndarray, given: Sequence[str], sampled: bool, label: str
) -> tuple[str, ...]:
    lead = _SAMPLE_DIMS if sampled and group_name not in _DATA_GROUPS else ()
    if value.ndim < len(lead):
        raise ValueError(
            f"{group_name}[{name!r}]: expected leading axes (chain, draw), got shape {value.shape}; "
            "add the axes, or name the variable in unsampled"
        )
    event = value.ndim - len(lead)
    if len(given) > event and group_name != "log_likelihood":
        raise ValueError(
            f"{group_name}[{name!r}]: dims names {list(given)}, but shape {value.shape} has {event} axes"
            + (" after (chain, draw)" if lead else "")
        )
    rest = tuple(f"{label}_dim_{i}" for i in range(len(given), event))
    axes = (*lead, *given[:event], *rest)
    if len(set(axes)) < len(axes):
        raise ValueError(f"{group_name}[{name!r}]: two axes have the same name: {axes}; give each its own in dims")
    return axes


def _dataset(
    group_name: str,
    arrays: Mapping[str, np.ndarray],
    axes: Mapping[str, tuple[str, ...]],
    names: Mapping[str, str],
    coords: Mapping[str, Sequence[Any]],
) -> xarray.Dataset:
    import xarray as xr

    sizes: dict[str, tuple[int, str]] = {}
    for name, value in arrays.items():
        if value.dtype == object:
            raise TypeError(f"{group_name}[{name!r}]: expected numbers or text, got Python objects")
        for dim, size in zip(axes[name], value.shape, strict=True):
            other = sizes.setdefault(dim, (size, name))
            if other[0] != size:
                raise ValueError(
                    f"{group_name}: dimension {dim!r} has size {other[0]} in {other[1]!r} but {size} in {name!r}; "
                    "expand the smaller one, or name its axis differently in dims"
                )
    index: dict[str, np.ndarray] = {}
    for dim, (size, name) in sizes.items():
        values = np.asarray(coords[dim]) if dim in coords else np.arange(size)
        if values.shape != (size,):
            raise ValueError(
                f"coords[{dim!r}]: expected {size} labels for {group_name}[{name!r}], got shape {values.shape}"
            )
        index[dim] = values
    return xr.Dataset({names[name]: (axes[name], value) for name, value in arrays.items()}, coords=index)


def _storable(value: object) -> str | int | float:
    """What a netCDF attribute can hold without change; everything else as JSON text."""
    if isinstance(value, str):
        return value
    if isinstance(value, (float, np.floating)):
        return float(value)
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool) and -(2**63) <= value < 2**63:
        return int(value)
    return json.dumps(value, default=_plain)


def _plain(value: object) -> object:
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, (set, frozenset)) else str(value)
