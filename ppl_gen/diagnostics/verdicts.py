"""Verdicts: what the diagnostics of a fit mean, in a sentence or two, and what to do next."""

from __future__ import annotations

from ppl_gen.diagnostics.causes import Cause
from ppl_gen.diagnostics.chain_verdicts import verdict_chains
from ppl_gen.diagnostics.draws_verdicts import verdict_draws
from ppl_gen.diagnostics.grades import Verdict
from ppl_gen.diagnostics.guide_verdicts import verdict_variational
from ppl_gen.diagnostics.point_verdicts import verdict_point, with_points, with_repeats
from ppl_gen.diagnostics.trends import loss_trend

__all__ = [
    "Cause",
    "Verdict",
    "loss_trend",
    "verdict_chains",
    "verdict_draws",
    "verdict_point",
    "verdict_variational",
    "with_points",
    "with_repeats",
]
