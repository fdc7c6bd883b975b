"""What a comparison is made of: what all its fits share, and one line per fit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ppl_gen.diagnostics.verdicts import Verdict
from ppl_gen.fits.result import Fit
from ppl_gen.fitting.algorithm import Algorithm
from ppl_gen.program.program import Recipe

if TYPE_CHECKING:
    import pandas

    from ppl_gen.evidence.estimates import Evidence

__all__ = ["Job", "Line", "Setup"]

Job = tuple[str, Algorithm, int]
_TRUST = {"trust": "trusted", "doubtful": "doubtful", "do not trust": "not trusted"}


@dataclass(frozen=True)
class Line:
    """One algorithm under one seed: its fit where there is one, and what the yardsticks say of it."""

    label: str
    seed: int
    status: str
    message: str
    seconds: float = math.nan
    fit: Fit | None = None
    evidence: Evidence | None = None
    verdict: Verdict | None = None
    pareto_k: float = math.nan
    summary: pandas.DataFrame | None = None
    traceback: str = ""
    undiagnosed: str = ""

    @property
    def grade(self) -> str:
        """How far the fit can be trusted, in a word or two."""
        if self.fit is None:
            return "no fit"
        return "not diagnosed" if self.verdict is None else _TRUST[self.verdict.grade]

    @property
    def verdict_text(self) -> str:
        """The verdict in a sentence or two, or why there is none."""
        return self.undiagnosed if self.verdict is None else str(self.verdict)


@dataclass(frozen=True)
class Setup:
    """What all fits of a comparison share; ``fingerprint`` tells whether another process holds the same program."""

    recipe: Recipe
    train: Any
    test: Any
    particles: int = 100
    draws: int = 500
    threads: int = 1
    device: str | torch.device | None = None
    dtype: torch.dtype | None = None
    fingerprint: str = ""
    folder: Path | None = None  # where rows are kept, and their runs as they go
