"""Whether rows that a Markov chain makes depend on where the chain began."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pyro import poutine
from torch import Tensor

from ppl_gen.diagnostics.grades import Finding
from ppl_gen.diagnostics.made_rows import FEWEST
from ppl_gen.errors import PROGRAM_ERRORS
from ppl_gen.nn.chain_rows import ChainRows

if TYPE_CHECKING:
    from ppl_gen.fits.result import Fit

__all__ = ["RESCUE", "unmixed"]

RESCUE = (
    "Take more sweeps for each row (sweeps=) or, of an energy of the rows, tempered chains (ContrastiveDivergence("
    "persistent=True, temperatures=10)); until chains mix, fit.sample(n) draws no rows of the program"
)
_ROWS = 500
_DIRECTIONS = 3
_APART = 6.0  # standard errors: false alarms below 1e-5 for thousands of numbers


def unmixed(fit: Fit) -> list[Finding]:
    """A finding where chains from rows of the data and from noise come to other means, as long as drawn rows take."""
    rows = fit.data.rows or 0
    if fit.data.streamed is not None or rows < FEWEST or not fit.program.drawn_by_chain:
        return []
    try:
        with fit.bound(), torch.no_grad():
            found = _ends(fit, rows)
    except (*PROGRAM_ERRORS, NotImplementedError):
        return []  # what cannot be drawn is told of where rows are compared
    if found is None:
        return []
    name, sweeps, ends = found
    one, other = _numbers(*(end.detach().cpu().double().flatten(1) for end in ends))
    error = ((one.var(0) + other.var(0)) / len(one)).sqrt()
    gap = (one.mean(0) - other.mean(0)).abs()
    apart = float(torch.where(gap > 0, gap / error, 0.0).max())
    if apart <= _APART:
        return []
    told = (
        f"chains of {sweeps} sweeps do not mix: a mean of {name} where they began at rows of the data lies {apart:.0f} "
        "standard errors from that where they began at noise"
    )
    return [(2, told, RESCUE)]


def _numbers(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of the rows, and their places along the principal directions of both ends: modes differ in many a little.

    The directions do not know which end a row is of, so that the errors of means along them are what they are.
    """
    both = torch.cat([one, other])
    away = both - both.mean(0)
    *_, directions = torch.linalg.svd(away, full_matrices=False)
    scores = away @ directions[:_DIRECTIONS].mT
    return torch.cat([one, scores[: len(one)]], 1), torch.cat([other, scores[len(one) :]], 1)


def _ends(fit: Fit, rows: int) -> tuple[str, int, tuple[Tensor, Tensor]] | None:
    """The site that a chain draws, its sweeps, and where chains end that begin at the data and at noise."""
    batch = fit.data.batch(torch.linspace(0, rows - 1, min(_ROWS, rows), device="cpu").long())
    trace = poutine.trace(fit.program.model).get_trace(*batch.args, **batch.kwargs)
    drawn = [name for name, node in trace.nodes.items() if isinstance(node.get("fn"), ChainRows)]
    if len(drawn) != 1:
        return None
    (name,) = drawn
    chain, begun = trace.nodes[name]["fn"], trace.nodes[name]["value"]
    if not trace.nodes[name]["is_observed"]:
        if fit.guide is None:
            return None
        begun = poutine.trace(fit.guide).get_trace(*batch.args, **batch.kwargs).nodes[name]["value"]
    noise = chain.machine.begin(begun.shape[: begun.dim() - len(chain.machine.row)])
    return name, chain.sweeps, (chain.machine.gibbs(begun, chain.sweeps), chain.machine.gibbs(noise, chain.sweeps))
