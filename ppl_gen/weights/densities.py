"""log p(x_i | theta_s) for many draws of theta at once, finite latents summed out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ppl_gen.data.batching import Batch
from ppl_gen.enumeration.marginals import enumerated_trace, log_joint, log_prior, row_log_density
from ppl_gen.errors import PROGRAM_ERRORS
from ppl_gen.handlers.substitute import Substitute
from ppl_gen.program.checks import require_enumerable
from ppl_gen.weights.sizes import Largest
from ppl_gen.workspace.isolation import without_side_effects

if TYPE_CHECKING:
    from ppl_gen.fits.result import Fit

__all__ = ["densities", "derived", "joint_densities", "of_each"]

MAX_ELEMENTS = 2_000_000  # draws x rows held at once
HELD = 1_000_000


def densities(fit: Fit, batch: Batch, draws: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Row densities (draws x rows) given each draw, and the log prior (draws) of its global sites, in nats.

    Local sites with a value are conditioned on; the finite ones without are summed out. Call inside ``fit.bound()``.
    All draws go through the program at once (`torch.vmap`) where that gives what one draw at a time gives.
    """
    info = fit.info
    local = [name for name in draws[0] if name in info.sites and info.sites[name].local]

    def one(values: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        trace = _enumerated(fit, batch, values)
        rows = row_log_density(trace, info.data_plate, without=local)
        return rows, torch.as_tensor(log_prior(trace, info.data_plate), dtype=rows.dtype)

    rows, prior = of_each(one, draws, batch.rows or 1)
    return rows, prior


def joint_densities(
    fit: Fit, batch: Batch, draws: Sequence[Mapping[str, Tensor]], *, alone: int | None = None
) -> Tensor:
    """log p(x, draw) in nats, shape (draws,): all sites with a value counted, finite ones without summed out jointly.

    As `densities`, whose rows fall apart only where no site outside the data plate is summed out. Where draws go
    through the program one at a time, of the first ``alone`` only.
    """

    def one(values: dict[str, Tensor]) -> tuple[Tensor]:
        return (log_joint(_enumerated(fit, batch, values), fit.info.data_plate),)

    result: Tensor = of_each(one, draws, batch.rows or 1, alone)[0]
    return result


def _enumerated(fit: Fit, batch: Batch, values: Mapping[str, Tensor]) -> poutine.Trace:
    sums = [name for name in fit.info.finite_latents if name not in values]
    require_enumerable(fit.info, sums)
    model, nesting = fit.joint, fit.info.plate_nesting
    return enumerated_trace(
        model, batch.args, batch.kwargs, discrete=sums, values=values, plate_nesting=nesting, varying=True
    )


def of_each(
    one: Callable[[dict[str, Tensor]], tuple[Tensor, ...]],
    draws: Sequence[Mapping[str, Tensor]],
    rows: int,
    alone: int | None = None,
) -> tuple[Tensor, ...]:
    """``one`` at every draw, its tensors draws x shape; at the first ``alone`` where not all can be asked at once."""
    if len(draws) == 1 or not draws[0]:
        return tuple(value.expand(len(draws), *value.shape) for value in one(dict(draws[0])))
    stacked = {name: torch.stack([torch.as_tensor(draw[name]) for draw in draws]) for name in draws[0]}
    checked: tuple[Tensor, ...] | None = _vectorised(one, stacked, rows)
    if checked is not None:
        return checked
    return tuple(torch.stack(column) for column in zip(*(one(dict(draw)) for draw in draws[:alone]), strict=True))


def derived(fit: Fit, batch: Batch, draws: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The deterministic sites outside the data plate at each draw, in their shapes; call inside ``fit.bound()``."""
    names = [site.name for site in fit.info.select(kind="deterministic", local=False)]
    if not names or not draws:
        return [{} for _ in draws]
    sums = [name for name in fit.info.finite_latents if name not in draws[0]]

    def one(values: dict[str, Tensor]) -> dict[str, Tensor]:
        if sums:
            trace = _enumerated(fit, batch, values)
        else:  # what has no value inside the data plate is drawn, and no site outside depends on it
            with Substitute(values):
                trace = poutine.trace(fit.program.model).get_trace(*batch.args, **batch.kwargs)
        return {name: trace.nodes[name]["value"] for name in names}

    if len(draws) > 1:
        stacked = {name: torch.stack([torch.as_tensor(draw[name]) for draw in draws]) for name in draws[0]}
        together = _vectorised(one, stacked, batch.rows or 1)
        if together is not None:
            return [{name: value[i] for name, value in together.items()} for i in range(len(draws))]
    return [one(dict(draw)) for draw in draws]


def _vectorised(one: Callable[[dict[str, Tensor]], Any], stacked: dict[str, Tensor], rows: int) -> Any | None:
    """All draws (draws x shape) at once, or None where the program does not allow it, or gives something else then."""
    firsts = {name: value[0] for name, value in stacked.items()}
    try:
        with without_side_effects(), Largest() as largest:
            alone = tree_leaves(one(firsts))
        most = max(1, min(MAX_ELEMENTS // rows, HELD // largest.numbers))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that an operation has no batching rule costs time, no more
            result = torch.vmap(one, chunk_size=most)(stacked)
    except PROGRAM_ERRORS:
        return None  # indexing by a drawn value, data-dependent Python: one draw at a time then
    last = tree_leaves(one({name: value[-1] for name, value in stacked.items()}))
    for together, first, single in zip(tree_leaves(result), alone, last, strict=True):
        for found, expected in ((together[0], first), (together[-1], single)):
            if not torch.allclose(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True):
                return None
    return result
