"""ppl_gen: one generative program, every way to learn it, one honest yardstick."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ppl_gen.data import load_data
from ppl_gen.data.batching import by_step, constant
from ppl_gen.driver import fit
from ppl_gen.driver import inspect_program as check
from ppl_gen.errors import FitWarning, IncompatibleError, MissingExtraError, NonFiniteError
from ppl_gen.predictive import prior_predictive
from ppl_gen.program import Program, Recipe
from ppl_gen.result import Fit, Status

if TYPE_CHECKING:
    from ppl_gen.comparison import Comparison, compare
    from ppl_gen.storage import load

__version__ = "0.1.0"

__all__ = [
    "Comparison",
    "Fit",
    "FitWarning",
    "IncompatibleError",
    "MissingExtraError",
    "NonFiniteError",
    "Program",
    "Recipe",
    "Status",
    "by_step",
    "check",
    "compare",
    "constant",
    "fit",
    "load",
    "load_data",
    "prior_predictive",
]

_LAZY = {"Comparison": "comparison", "compare": "comparison", "load": "storage"}


def __getattr__(name: str) -> Any:
    """Names whose modules need pandas or safetensors load when first used."""
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(f"ppl_gen.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'ppl_gen' has no attribute {name!r}")
