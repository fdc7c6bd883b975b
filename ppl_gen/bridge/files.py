"""Labelled draws in one netCDF file, the same under either version of ArviZ."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from ppl_gen.bridge.versions import container, group, group_names
from ppl_gen.errors import MissingExtraError

__all__ = ["read_tree", "write_tree"]


def write_tree(tree: Any, path: str | Path) -> None:
    """Write a tree to one netCDF file: values, dimensions, coordinates and attributes come back exactly.

    The layout (one netCDF group per group) is that of both ArviZ versions, whose ``from_netcdf`` reads the file too.

    Raises MissingExtraError where h5netcdf is not installed.

    >>> import tempfile
    >>> from ppl_gen.bridge import to_tree
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
    return container(datasets, attrs)


def _native(value: object) -> object:
    return value.item() if isinstance(value, np.generic) else value


def _need_h5netcdf() -> None:
    lacking = [name for name in ("h5netcdf", "h5py") if importlib.util.find_spec(name) is None]
    if lacking:
        raise MissingExtraError(f"draws are kept in netCDF files, which need {lacking}: pip install 'h5netcdf[h5py]'")
