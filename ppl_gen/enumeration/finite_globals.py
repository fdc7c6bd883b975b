r"""Finite latent sites outside the data plate that an algorithm summed out: change points, indicators, model choice.

What was learned are draws of the other globals :math:`\theta`. Each of them is extended by an exact draw of the finite
ones given it and *all* training rows, their own finite latents summed out and continuous ones at their joint draw:

.. math:: g_s \sim p(g \mid \theta_s, x), \qquad (\theta_s, g_s) \sim p(\theta, g \mid x),

so that new rows meet the values that the training rows speak for, and not those of the prior.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from torch import Tensor

from ppl_gen.data.batching import Batch
from ppl_gen.enumeration.marginals import drawn, eliminated, enumerated_trace, sample_discrete
from ppl_gen.errors import PROGRAM_ERRORS, IncompatibleError
from ppl_gen.program.checks import require_enumerable

if TYPE_CHECKING:
    from ppl_gen.fits.result import Fit

__all__ = ["combinations", "extended", "summed_globals"]

MAX_ELEMENTS = 4_000_000  # numbers of one table, over all draws that are looked at together
MOST = 1024  # combinations of values, where each needs a run of its own


def summed_globals(fit: Fit, known: Collection[str]) -> list[str]:
    """Names of the finite latent sites outside the data plate that are not ``known``."""
    return [s.name for s in fit.info.select(local=False, discrete=True) if s.finite and s.name not in known]


def extended(fit: Fit, draws: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Draws of all training latents, each with a draw of the finite globals given it; call inside ``fit.bound()``.

    Raises:
        IncompatibleError: where the finite ones depend on continuous latents of the rows that nobody drew.
    """
    names = summed_globals(fit, draws[0]) if draws else []
    if not names:
        return [dict(draw) for draw in draws]
    lacking = [s.name for s in fit.info.select() if not s.finite and s.name not in draws[0]]
    if lacking:
        raise IncompatibleError(
            f"{', '.join(names)} of {fit.program.name!r} follow from the training rows given their latent "
            f"{', '.join(lacking)}, of which {fit.algorithm} learned no draws; fit the program with SVI or NUTS"
        )
    sites = {site.name for site in fit.info.select()}
    known = [{name: value for name, value in draw.items() if name in sites} for draw in draws]
    found = _drawn(fit, fit.data.batch(), known, names)
    return [{**draw, **more} for draw, more in zip(draws, found, strict=True)]


def _drawn(
    fit: Fit, batch: Batch, draws: Sequence[Mapping[str, Tensor]], names: Sequence[str]
) -> list[dict[str, Tensor]]:
    """For each draw one of the finite sites ``names`` given it, in their shapes."""
    sums = [name for name in fit.info.finite_latents if name not in draws[0]]
    require_enumerable(fit.info, sums)

    def traced(values: Mapping[str, Tensor]) -> poutine.Trace:
        model, nesting = fit.joint, fit.info.plate_nesting
        return enumerated_trace(
            model, batch.args, batch.kwargs, discrete=sums, values=values, plate_nesting=nesting, varying=True
        )

    together: dict[str, Tensor] | None
    if fit.learned.point is not None:  # every draw is the same one
        together = sample_discrete(traced(draws[0]), draws=len(draws), sites=names)
    else:
        together = _vectorised(traced, draws, names) if len(draws) > 2 else None
    if together is not None:
        return [{name: value[i] for name, value in together.items()} for i in range(len(draws))]
    return [sample_discrete(traced(draw), sites=names) for draw in draws]


def _vectorised(
    traced: Callable[[Mapping[str, Tensor]], poutine.Trace],
    draws: Sequence[Mapping[str, Tensor]],
    names: Sequence[str],
) -> dict[str, Tensor] | None:
    """All draws at once, draws x shape; None where the program does not go through `torch.vmap`, or not as alone."""

    def one(values: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        trace = traced(values)
        total, steps = eliminated(trace)
        return drawn(trace, steps, sites=names), total

    ends = [eliminated(traced(draws[i])) for i in (0, -1)]
    size = max((term.numel() for _, steps in ends for step in steps for term in step.operands), default=1)
    stacked = {name: torch.stack([torch.as_tensor(draw[name]) for draw in draws]) for name in draws[0]}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that an operation has no batching rule costs time, no more
            values, totals = torch.vmap(one, randomness="different", chunk_size=max(1, MAX_ELEMENTS // size))(stacked)
    except PROGRAM_ERRORS:
        return None  # indexing by a drawn value, Python that depends on data: one draw at a time then
    alone = torch.stack([total for total, _ in ends])
    same = torch.allclose(totals[[0, -1]], alone, rtol=1e-4, atol=1e-4) and bool(totals.isfinite().all())
    found: dict[str, Tensor] | None = values if same else None
    return found


def combinations(fit: Fit, batch: Batch, names: Sequence[str]) -> list[dict[str, Tensor]]:
    """All values that the finite globals ``names`` can take together, in their shapes; call inside ``fit.bound()``.

    Raises:
        IncompatibleError: for more than `MOST` of them.
    """
    trace = poutine.trace(fit.program.model).get_trace(*batch.args, **batch.kwargs)
    choices = {name: _choices(trace.nodes[name]) for name in names}
    total = 1
    for _, count in choices.values():
        total *= count
    if total > MOST:
        raise IncompatibleError(
            f"{', '.join(names)} of {fit.program.name!r} take {total} values together, and each needs a run of its own "
            f"here, which is done for at most {MOST}"
        )
    every = itertools.product(*(values for values, _ in choices.values()))
    return [dict(zip(names, values, strict=True)) for values in every]


def _choices(node: dict[str, Any]) -> tuple[Iterator[Tensor], int]:
    """The values of one site, each of its batch shape x event, one after the other, and how many."""
    fn = node["fn"]
    support = fn.enumerate_support(expand=False).reshape(-1, *fn.event_shape)
    members = fn.batch_shape.numel()
    picks = itertools.product(range(len(support)), repeat=members)
    shape = (*fn.batch_shape, *fn.event_shape)
    return (support[list(pick)].reshape(shape) for pick in picks), len(support) ** members
