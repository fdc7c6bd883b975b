"""Numbers for pictures: draws of global scalars, and observed rows beside replicates of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ppl_gen.data.batching import Dataset
from ppl_gen.draws.observations import observed_rows
from ppl_gen.draws.predictive import deterministic, global_draws

if TYPE_CHECKING:
    from ppl_gen.fits.result import Fit

__all__ = ["Replicates", "Scalar", "curve_of", "distinct", "global_scalars", "replicates"]

ROWS = 2000  # rows that a predictive picture shows at most
SMALL = 8  # entries of a parameter that are worth a panel each; weights of networks (name$$$weight) never are

_CURVES = ("log_likelihood", "elbo", "program_loss")


@dataclass(frozen=True)
class Scalar:
    """One number outside the data plate: its draws by label; a single draw is a point estimate."""

    name: str
    draws: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Replicates:
    """Observed values (rows x columns) of one site, replicates (draws x rows x columns), and a 1-D input if any."""

    site: str
    observed: np.ndarray
    drawn: np.ndarray
    given: tuple[str, np.ndarray] | None = None


def curve_of(fit: Fit) -> tuple[str, np.ndarray]:
    """Name and values of the training curve; empty where an algorithm records no steps (chains)."""
    names = [name for name in _CURVES if name in fit.records] or list(fit.records)
    return (names[0], np.asarray(fit.records[names[0]], dtype=np.float64)) if names else ("", np.empty(0))


def global_scalars(fit: Fit, count: int = 500) -> dict[str, np.ndarray]:
    """Draws of every number outside the data plate, by name; derived ones (in the user's units) first."""
    found: dict[str, np.ndarray] = {}
    for name, values in _globals(fit, count).items():
        for index in np.ndindex(values.shape[1:]):
            found[name + (str(list(index)) if index else "")] = values[(slice(None), *index)]
    return found


def _globals(fit: Fit, count: int) -> dict[str, np.ndarray]:
    local = {site.name for site in fit.info.sites.values() if site.local}
    derived = [site.name for site in fit.info.select(kind="deterministic") if site.name not in local]
    with fit.bound():
        if fit.info.select(local=False):
            batch = fit.data.glimpse()
            values = _one_order(fit, global_draws(fit, count if fit.learned.point is None else 1))
            extra = [deterministic(fit, batch, value) if derived else {} for value in values]
            names = [*derived, *(name for name in values[0] if name in fit.info.sites and name not in derived)]
            stacks = {n: torch.stack([{**v, **e}[n] for v, e in zip(values, extra, strict=True)]) for n in names}
        else:
            stacks = {
                n: v[None]
                for n, v in fit.params.items()
                if v.numel() <= SMALL and n in fit.info.params and "$$$" not in n
            }
    return {name: _array(value) for name, value in stacks.items() if value.is_floating_point()}


def _one_order(fit: Fit, draws: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Exchangeable components in the program's own order, so that fits can be compared number by number."""
    if fit.program.relabel is None or not draws:
        return draws
    stacks = {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}
    try:
        ordered = {**stacks, **fit.program.relabel(stacks)}
    except KeyError:  # it orders by local sites too, which are not drawn here
        return draws
    return [{name: value[i] for name, value in ordered.items()} for i in range(len(draws))]


def distinct(scalars: list[Scalar]) -> tuple[list[Scalar], list[Scalar]]:
    """Scalars worth a panel, and those that follow from one of them (a monotone function: the draws rank alike).

    >>> x = np.random.default_rng(0).normal(size=100)
    >>> shown, left = distinct([Scalar("sd", {"a": np.exp(x)}), Scalar("precision", {"a": np.exp(-2 * x)})])
    >>> [s.name for s in shown], [s.name for s in left]
    (['sd'], ['precision'])
    """
    shown: list[Scalar] = []
    left: list[Scalar] = []
    for scalar in scalars:
        (left if any(_alike(scalar, other) for other in shown) else shown).append(scalar)
    return shown, left


def _alike(one: Scalar, other: Scalar) -> bool:
    labels = [k for k, v in one.draws.items() if len(v) > 2 and len(other.draws.get(k, ())) == len(v)]
    return bool(labels) and all(abs(_rank_correlation(one.draws[k], other.draws[k])) > 0.99999 for k in labels)


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    ranks = [np.argsort(np.argsort(v)).astype(float) for v in (a, b)]
    return float(np.corrcoef(ranks)[0, 1])


def replicates(fit: Fit, count: int = 50) -> list[Replicates]:
    """Observed sites with posterior predictive replicates of them, on at most `ROWS` rows."""
    data: Dataset = fit.data
    if not fit.info.select(kind="observed"):
        return []
    if data.rows is not None and data.rows > ROWS:
        data = data.subset(torch.linspace(0, data.rows - 1, ROWS).round().long())
    drawn = fit.predict(None if data is fit.data else data, draws=count)
    with fit.bound():
        observed = observed_rows(fit, data.most())
    given = _given(data, observed)
    result = []
    for name, value in observed.items():
        if name in drawn and value.dim() > 0:
            rows = _array(value).reshape(len(value), -1)
            stacked = _array(drawn[name])
            result.append(Replicates(name, rows, stacked.reshape(len(stacked), len(rows), -1), given))
    return result


def _given(data: Dataset, observed: Mapping[str, Tensor]) -> tuple[str, np.ndarray] | None:
    """The one input with a single number per row, where there is exactly one: the axis of a regression."""
    found: list[tuple[str, Any]] = []
    for name, value in data.entries.items():
        array = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
        if array.dtype.kind == "f" and array.size == data.rows and not _among(array, observed):
            found.append((name, array.reshape(-1)))
    return found[0] if len(found) == 1 else None


def _among(array: np.ndarray, observed: Mapping[str, Tensor]) -> bool:
    same = (_array(value).reshape(-1) for value in observed.values() if value.numel() == array.size)
    return any(np.allclose(value, array.reshape(-1)) for value in same)


def _array(value: Tensor) -> np.ndarray:
    return value.detach().cpu().double().numpy()
