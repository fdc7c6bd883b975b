"""ppl_gen: one generative program, every way to learn it, one honest yardstick."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ppl_gen.data import load_data
from ppl_gen.data.batching import by_step, constant
from ppl_gen.data.streams import stream
from ppl_gen.errors import FitWarning, IncompatibleError, MissingExtraError, NonFiniteError, RankError
from ppl_gen.fits.driver import fit
from ppl_gen.fits.driver import inspect_program as check
from ppl_gen.fits.prior import prior_predictive
from ppl_gen.fits.result import Fit, Status
from ppl_gen.program import offers
from ppl_gen.program.program import Program, Recipe
from ppl_gen.version import __version__ as __version__

if TYPE_CHECKING:
    from ppl_gen.comparison.compare import Comparison, compare
    from ppl_gen.diagnostics.made_rows import compare_rows, modes_covered
    from ppl_gen.evidence.annealed import AIS
    from ppl_gen.fits.loading import load
    from ppl_gen.fits.saddle import exploitability


__all__ = [
    "AIS",
    "Comparison",
    "Fit",
    "FitWarning",
    "IncompatibleError",
    "MissingExtraError",
    "NonFiniteError",
    "Program",
    "RankError",
    "Recipe",
    "Status",
    "by_step",
    "check",
    "compare",
    "compare_rows",
    "constant",
    "exploitability",
    "fit",
    "load",
    "load_data",
    "modes_covered",
    "prior_predictive",
    "stream",
]


def _zoo(offer: str) -> list[str]:
    from ppl_gen.models.catalogue import programs_offering

    return programs_offering(offer)


offers.zoo[:] = [_zoo]

_LAZY = {
    "AIS": "evidence.annealed",
    "Comparison": "comparison.compare",
    "compare": "comparison.compare",
    "compare_rows": "diagnostics.made_rows",
    "exploitability": "fits.saddle",
    "load": "fits.loading",
    "modes_covered": "diagnostics.made_rows",
}


def __getattr__(name: str) -> Any:
    """Names whose modules need pandas or safetensors load when first used."""
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(f"ppl_gen.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'ppl_gen' has no attribute {name!r}")
