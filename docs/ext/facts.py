"""What the site says about the code, taken from the code: needs, offers, which fits which, and all public names.

Nothing here knows of Sphinx, so that the tests can ask the same questions.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyro.infer

import ppl_gen as pg
import ppl_gen.inference as inference
from ppl_gen.data.batching import as_dataset
from ppl_gen.fits.preparing import dtype_of
from ppl_gen.fitting.run import Run
from ppl_gen.inference import SVI, Algorithm, Objective
from ppl_gen.models.catalogue import CATALOGUE
from ppl_gen.program.info import ProgramInfo
from ppl_gen.program.offers import require
from ppl_gen.workspace.isolation import isolated
from ppl_gen.workspace.workspace import Workspace

TOP = Path(__file__).parents[2]
MODULES = (
    "ppl_gen",
    "ppl_gen.inference",
    "ppl_gen.extending",
    "ppl_gen.models",
    "ppl_gen.report",
    "ppl_gen.looking",
    "ppl_gen.distances",
)


def public_names() -> dict[str, list[str]]:
    """Module -> the names it exports."""
    return {name: sorted(importlib.import_module(name).__all__) for name in MODULES}


def examples() -> list[Path]:
    """The scripts of ``examples/``."""
    return sorted(path for path in (TOP / "examples").glob("*.py") if not path.stem.startswith("_"))


def algorithms() -> dict[str, Algorithm]:
    """Label -> every algorithm at its defaults; SVI once per objective, and once with an ELBO of Pyro's.

    An objective over another one fits what that does, given what its documentation asks of the data: it has no column.
    """
    found: dict[str, Algorithm] = {}
    exported = [getattr(inference, name) for name in inference.__all__]
    for kind in exported:
        if _concrete(kind, Objective) and "objective" not in inspect.signature(kind).parameters:
            found[f"SVI({kind.__name__})"] = SVI(objective=kind())
        elif _concrete(kind, Algorithm) and kind is not SVI:
            found[kind.__name__] = kind()
    found["SVI(Trace_ELBO)"] = SVI(objective=pyro.infer.TraceEnum_ELBO(strict_enumeration_warning=False))
    return dict(sorted(found.items(), key=lambda item: (not item[0].startswith("SVI(ELBO"), item[0])))


def _concrete(kind: Any, base: type) -> bool:
    return isinstance(kind, type) and issubclass(kind, base) and not inspect.isabstract(kind)


def needs(algorithm: Algorithm) -> list[str]:
    """What it needs, each as its alternatives joined by "or"."""
    return [" or ".join(need) for need in algorithm.needs]


@functools.cache
def found(program: str) -> ProgramInfo:
    """The dry run of a model of the catalogue on its own few rows."""
    entry = CATALOGUE[program]
    return pg.check(entry.recipe(), entry.data())


@functools.cache
def refusal(program: str, label: str) -> str:
    """Why the algorithm refuses the program: its error as text, or nothing where it accepts.

    Objectives may refuse when their game is built, so that is done too; no step is taken.
    """
    algorithm, entry, info = algorithms()[label], CATALOGUE[program], found(program)
    try:
        require(label, algorithm.needs, program, info.offers)
        with isolated(0, dtype=dtype_of(entry.data())), Workspace() as workspace:
            built = entry.recipe()(entry.data())
            run = Run(built, as_dataset(entry.data(), built.model), info, workspace, 0)
            algorithm.check(run)
            if isinstance(algorithm, SVI):
                algorithm.init(run)
    except pg.IncompatibleError as error:
        return str(error)
    return ""


def matrix() -> dict[str, dict[str, bool]]:
    """Program -> algorithm -> whether it fits."""
    return {program: {label: not refusal(program, label) for label in algorithms()} for program in CATALOGUE}


def missing(program: str, label: str) -> Sequence[str]:
    """The needs of the algorithm that the program does not meet."""
    offers = found(program).offers
    return [" or ".join(need) for need in algorithms()[label].needs if not offers.intersection(need)]
