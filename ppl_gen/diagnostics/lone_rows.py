"""Rows that a point estimate has narrowed onto: a component of a mixture with a row to itself, and no bound."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ppl_gen.data.batching import Batch
from ppl_gen.enumeration.marginals import enumerated_trace, row_log_density
from ppl_gen.errors import PROGRAM_ERRORS
from ppl_gen.handlers.substitute import Nudged

if TYPE_CHECKING:
    from ppl_gen.fits.result import Fit

__all__ = ["lone_rows"]

NUDGE = 0.05  # of the standard deviation of what was observed, by which every row is moved
DROP = 10.0  # nats: a normal density falls so far within 4.5 of its sd, so one has less than 0.011 of the data's
SHARE = 0.05  # of the rows at most: where many are as sharply known, the program is sharp and no part of it collapsed


def lone_rows(fit: Fit) -> list[int]:
    """Rows of which a small nudge, in whatever direction, leaves next to nothing of the density, few as they are.

    Empty where the densities of rows are not to be had (continuous latents of rows, no density), and where what was
    observed is not continuous.
    """
    info = fit.info
    observed = [site for site in info.select(kind="observed") if site.local and not site.discrete]
    if "density" not in info.offers or not observed or any(not site.finite for site in info.select(local=True)):
        return []
    if fit.data.beyond_memory:  # all rows are nudged in one go
        return []
    with fit.bound():
        batch = fit.data.batch()
        try:
            values = fit.learned.draw(1, batch)[0]
            known = {name: value for name, value in values.items() if name in info.sites}
            here = _rows(fit, batch, known, None)
            there = [_nudged(fit, batch, known, way, sign) for way in (0, 1) for sign in (1.0, -1.0)]
        except PROGRAM_ERRORS:
            return []
    beside = [value for value in there if value is not None]
    if not beside:
        return []
    lost = here - torch.stack(beside).nan_to_num(nan=torch.inf).amax(0) > DROP
    few = max(2, int(SHARE * len(lost)))
    return lost.nonzero().flatten().tolist() if 0 < int(lost.sum()) <= few else []


def _nudged(fit: Fit, batch: Batch, values: Mapping[str, Tensor], way: int, sign: float) -> Tensor | None:
    """`_rows` with what was observed moved one way; None where a row leaves its support."""
    try:
        names = [site.name for site in fit.info.select(kind="observed") if site.local]
        return _rows(fit, batch, values, Nudged(names, way, sign * NUDGE))
    except ValueError:
        return None  # a row has left the support


def _rows(fit: Fit, batch: Batch, values: Mapping[str, Tensor], nudge: Messenger | None) -> Tensor:
    """Log densities of the rows at one draw, shape (rows,), nats; what was observed moved by ``nudge``."""
    info = fit.info

    def model(*args: Any, **kwargs: Any) -> Any:
        if nudge is None:
            return fit.joint(*args, **kwargs)
        with nudge:
            return fit.joint(*args, **kwargs)

    sums = [name for name in info.finite_latents if name not in values]
    trace = enumerated_trace(
        model, batch.args, batch.kwargs, discrete=sums, values=values, plate_nesting=info.plate_nesting, varying=True
    )
    return row_log_density(trace, info.data_plate, without=[]).detach()
