"""A trace of a program at which the data are possible: bounds that depend on latent sites need not hold at any draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pyro import poutine
from torch import Tensor

from ppl_gen.data.batching import Batch
from ppl_gen.handlers.sites import sample_nodes
from ppl_gen.program.checks import OutsideSupportError, check_densities

__all__ = ["checked_trace"]

DRAWS = 100  # of the prior that are looked at


def checked_trace(
    model: Callable[..., Any], batch: Batch, start: Callable[[], Mapping[str, Tensor]] | None = None
) -> tuple[poutine.Trace, dict[str, Tensor]]:
    """A checked trace at one draw of the prior; where data lie outside of a support there, at ``start`` or at another.

    With it, the latent values that had to be looked for; none where any will do.

    ``a ~ Uniform(0, 3); x ~ Uniform(0, a)`` is right, and three draws of ``a`` in four may be below some x.

    Raises:
        OutsideSupportError: naming the site, where the data are impossible at all of them.
        ValueError, TypeError: for sites whose density cannot be taken.
    """
    first = _once(model, batch, {})
    if not isinstance(first, OutsideSupportError):
        return first, {}
    given = {} if start is None else dict(start())
    found, refusals = first, {str(first)}
    for attempt in range(DRAWS):
        found = _once(model, batch, given if attempt == 0 else {})
        if not isinstance(found, OutsideSupportError):
            return found, {n: node["value"] for n, node in sample_nodes(found) if not node["is_observed"]}
        refusals.add(str(found))
    if len(refusals) == 1:  # a support that no latent site moves
        raise first
    raise OutsideSupportError(
        f"{first}; it moves with the latent sites, and at none of {DRAWS} draws of the prior are all data inside. Give "
        "values of these sites at which they are: pg.Program(model, start=lambda: {...})"
    )


def _once(model: Callable[..., Any], batch: Batch, values: Mapping[str, Tensor]) -> Any:
    from ppl_gen.handlers.substitute import Substitute

    with Substitute(values):
        trace = poutine.trace(model).get_trace(*batch.args, **batch.kwargs)
    try:
        check_densities(trace)
    except OutsideSupportError as error:
        return error
    return trace
