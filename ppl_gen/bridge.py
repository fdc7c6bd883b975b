"""Labelled draws: one face for ArviZ 0.23 (Python 3.11, `InferenceData`) and ArviZ 1.x (3.12 on, `xarray.DataTree`).

The xarray datasets are built here and ArviZ's container is put around them last, so both versions hold the same
variables, dimensions and coordinates, and a file written under one is read under the other.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import logging
import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ppl_gen.errors import MissingExtraError

if TYPE_CHECKING:
    import pandas
    import xarray

__all__ = ["GROUPS", "az_psis", "az_summary", "group", "group_names", "read_tree", "to_tree", "write_tree"]

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

_INTERVAL = 0.94  # both bounds of the interval are named after it, whatever the ArviZ version defaults to
_INTERVAL_NAMES = ("hdi_3%", "hdi_97%")
_MOMENTS = ("mean", "sd", *_INTERVAL_NAMES)
_CHAIN_COLUMNS = ("mcse_mean", "mcse_sd", "ess_bulk", "ess_tail", "r_hat")


# ---------------------------------------------------------------------------------------------- building a tree
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
    return _container(datasets, {key: _storable(value) for key, value in (attrs or {}).items()})


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


# ---------------------------------------------------------------------------------------------- the two versions
def _legacy() -> bool:
    """Whether the installed ArviZ is older than 1 (`InferenceData` rather than `DataTree`)."""
    return int(importlib.metadata.version("arviz").partition(".")[0]) < 1


def _arviz() -> Any:
    """ArviZ 0.23, without the daily notice of its refactoring, which says nothing about the user's program."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing a major refactor", FutureWarning)
        return importlib.import_module("arviz")


def _container(datasets: Mapping[str, xarray.Dataset], attrs: Mapping[str, object]) -> Any:
    if _legacy():
        return _arviz().InferenceData(attrs=dict(attrs), **datasets)
    import xarray as xr

    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=dict(attrs)), **datasets})


def group_names(tree: Any) -> list[str]:
    """Names of the groups of a tree, of either ArviZ version.

    >>> group_names(to_tree({"prior": {"z": np.zeros((1, 5))}, "observed_data": {"x": np.zeros(3)}}))
    ['prior', 'observed_data']
    """
    return list(tree.groups()) if _legacy() else list(tree.children)


def group(tree: Any, name: str) -> xarray.Dataset | None:
    """One group of a tree as a dataset, or None where the tree does not have it.

    >>> group(to_tree({"posterior": {"z": np.zeros((1, 5))}}), "prior") is None
    True
    """
    if name not in group_names(tree):
        return None
    found: xarray.Dataset = tree[name] if _legacy() else tree.children[name].to_dataset()
    return found


def az_psis(log_ratios: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ArviZ's Pareto smoothed importance sampling of every row: normalised log weights and k-hat.

    ``log_ratios`` has shape (rows, draws), the weights the same, k-hat has shape (rows,). ArviZ 1.x takes
    log-likelihoods, that is minus the log ratios. Ties and infinities are the caller's: see `ppl_gen.weights.psis`.

    >>> weights, k = az_psis(np.random.default_rng(0).normal(size=(2, 100)))
    >>> weights.shape, k.shape
    ((2, 100), (2,))
    """
    ratios = np.array(log_ratios, dtype=np.float64)
    with np.errstate(all="ignore"):
        if _legacy():
            weights, k = _arviz().psislw(ratios)
        else:
            weights, k = importlib.import_module("arviz_stats.base").array_stats.psislw(-ratios)
    return np.asarray(weights), np.asarray(k, dtype=np.float64)


def az_summary(tree: Any, var_names: Sequence[str] | None = None, *, chains: bool) -> pandas.DataFrame:
    """Summary of the posterior group, unrounded, with the same columns under both versions of ArviZ.

    Always mean, sd, ``hdi_3%`` and ``hdi_97%`` (the narrowest interval that holds 94 % of the draws); with
    ``chains=True`` also mcse_mean, mcse_sd, ess_bulk, ess_tail and r_hat (rank-normalised, split: Vehtari, Gelman,
    Simpson, Carpenter, Burkner 2021). Independent draws of a guide are no chains: pass ``chains=False``, since an
    R-hat of such draws is 1 however wrong the guide is. r_hat is NaN for a single chain and for constant quantities.

    Raises ValueError where the tree has no posterior or lacks a variable.

    >>> draws = np.random.default_rng(0).normal(size=(2, 100))
    >>> list(az_summary(to_tree({"posterior": {"mu": draws}}), chains=False).columns)
    ['mean', 'sd', 'hdi_3%', 'hdi_97%']
    """
    posterior = group(tree, "posterior")
    if posterior is None:
        raise ValueError(f"the tree has no posterior to summarise; its groups are {group_names(tree)}")
    missing = [name for name in var_names or () if name not in posterior]
    if missing:
        raise ValueError(f"var_names: the posterior has no {missing}; it has {list(posterior.data_vars)}")
    chosen = posterior[list(posterior.data_vars if var_names is None else var_names)]
    chosen = chosen.map(lambda values: values.astype(np.float64), keep_attrs=True)
    if not chosen.data_vars:
        raise ValueError("var_names: expected at least one variable, got none")
    kind = "all" if chains else "stats"
    with np.errstate(all="ignore"):
        frame = _summary_legacy(chosen, kind) if _legacy() else _summary_current(chosen, kind)
    if chains and chosen.sizes["chain"] < 2:
        frame["r_hat"] = math.nan  # ArviZ 1.x splits a single chain in two: agreement with itself is no evidence
    frame = frame[[*_MOMENTS, *(_CHAIN_COLUMNS if chains else ())]]
    frame.columns.name = frame.index.name = None
    return frame


def _summary_legacy(posterior: xarray.Dataset, kind: str) -> pandas.DataFrame:
    arviz = _arviz()
    with _quiet_short_chains(arviz):
        frame: pandas.DataFrame = arviz.summary(posterior, kind=kind, round_to="none", hdi_prob=_INTERVAL)
    return frame


def _summary_current(posterior: xarray.Dataset, kind: str) -> pandas.DataFrame:
    summary = importlib.import_module("arviz_stats").summary
    frame: pandas.DataFrame = summary(posterior, kind=kind, round_to="none", ci_kind="hdi", ci_prob=_INTERVAL)
    return frame.rename(columns={"hdi94_lb": _INTERVAL_NAMES[0], "hdi94_ub": _INTERVAL_NAMES[1]})


@contextlib.contextmanager
def _quiet_short_chains(arviz: Any) -> Iterator[None]:
    """ArviZ 0.23 logs every variable of a chain that is too short or alone; the NaN in the frame says it once."""
    log = arviz._log  # made by hand there, so `logging.getLogger` does not find it
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


# ---------------------------------------------------------------------------------------------- files
def write_tree(tree: Any, path: str | Path) -> None:
    """Write a tree to one netCDF file: values, dimensions, coordinates and attributes come back exactly.

    The layout (one netCDF group per group) is that of both ArviZ versions, whose ``from_netcdf`` reads the file too.

    Raises MissingExtraError where h5netcdf is not installed.

    >>> import tempfile
    >>> tree = to_tree({"posterior": {"z": np.arange(6.0).reshape(2, 3)}})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_tree(tree, Path(folder) / "draws.nc")
    ...     back = read_tree(Path(folder) / "draws.nc")
    >>> group(back, "posterior").identical(group(tree, "posterior"))
    True
    """
    import xarray as xr

    _need_h5netcdf()
    datasets = {name: group(tree, name) for name in group_names(tree)}
    xr.DataTree.from_dict({"/": xr.Dataset(attrs=dict(tree.attrs)), **datasets}).to_netcdf(
        Path(path), mode="w", engine="h5netcdf"
    )


def read_tree(path: str | Path) -> Any:
    """Read a tree that `write_tree` wrote, under either ArviZ version; nothing of the file stays open.

    Raises FileNotFoundError where there is no such file, MissingExtraError where h5netcdf is not installed.
    An example is at `write_tree`.
    """
    import xarray as xr

    _need_h5netcdf()
    if not Path(path).is_file():
        raise FileNotFoundError(f"no draws at {path}: expected a netCDF file written by write_tree")
    with xr.open_datatree(Path(path), engine="h5netcdf") as file:
        loaded = file.load()
        attrs = {str(key): _native(value) for key, value in loaded.attrs.items()}
        datasets = {name: child.to_dataset() for name, child in loaded.children.items()}
    return _container(datasets, attrs)


def _native(value: object) -> object:
    return value.item() if isinstance(value, np.generic) else value


def _need_h5netcdf() -> None:
    lacking = [name for name in ("h5netcdf", "h5py") if importlib.util.find_spec(name) is None]
    if lacking:
        raise MissingExtraError(f"draws are kept in netCDF files, which need {lacking}: pip install 'h5netcdf[h5py]'")
