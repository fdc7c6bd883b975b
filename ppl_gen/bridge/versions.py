"""What differs between ArviZ 0.23 and 1.x: the container, its groups, summaries and smoothed importance weights."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas
    import xarray

__all__ = ["az_psis", "az_summary", "container", "group", "group_names"]

_INTERVAL = 0.94  # both bounds of the interval are named after it, whatever the ArviZ version defaults to
_INTERVAL_NAMES = ("hdi_3%", "hdi_97%")
_MOMENTS = ("mean", "sd", *_INTERVAL_NAMES)
_CHAIN_COLUMNS = ("mcse_mean", "mcse_sd", "ess_bulk", "ess_tail", "r_hat")


def _legacy() -> bool:
    """Whether the installed ArviZ is older than 1 (`InferenceData` rather than `DataTree`)."""
    return int(importlib.metadata.version("arviz").partition(".")[0]) < 1


def _arviz() -> Any:
    """ArviZ 0.23, without the daily notice of its refactoring, which says nothing about the user's program."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing a major refactor", FutureWarning)
        return importlib.import_module("arviz")


def container(datasets: Mapping[str, xarray.Dataset], attrs: Mapping[str, object]) -> Any:
    """The datasets by group, as `InferenceData` or `DataTree`."""
    if _legacy():
        return _arviz().InferenceData(attrs=dict(attrs), **datasets)
    import xarray as xr

    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=dict(attrs)), **datasets})


def group_names(tree: Any) -> list[str]:
    """Names of the groups of a tree, of either ArviZ version.

    >>> from ppl_gen.bridge import to_tree
    >>> group_names(to_tree({"prior": {"z": np.zeros((1, 5))}, "observed_data": {"x": np.zeros(3)}}))
    ['prior', 'observed_data']
    """
    return list(tree.groups()) if _legacy() else list(tree.children)


def group(tree: Any, name: str) -> xarray.Dataset | None:
    """One group of a tree as a dataset, or None where the tree does not have it.

    >>> from ppl_gen.bridge import to_tree
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

    >>> from ppl_gen.bridge import to_tree
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
