"""What a program is made of, in numbers that can be kept: so that a loaded fit notices when it is given another one.

Described are the code of model and guide (and of what else answers questions: exact evidence, local posteriors ...), of
the user's own functions and classes that they call, and every constant they read: closures, defaults, globals, the
arguments of a recipe, the layout of networks. Not described: comments, docstrings, names of local variables, the place
of a file, the code of installed packages, and what a fit learns and therefore keeps (weights, starting values).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from ppl_gen.fits.description import SHOWN, Description, Entries
from ppl_gen.handlers.params import InitialValues
from ppl_gen.nn.copies import originals

if TYPE_CHECKING:
    from ppl_gen.data.batching import Batch
    from ppl_gen.fits.result import Fit
    from ppl_gen.program.program import Program, Recipe

__all__ = ["described", "differences", "fingerprint", "learned_of", "settings_of"]

_ANSWERS = (
    "evidence",
    "local_posterior",
    "imputes",
    "cavi",
    "energy",
    "time_steps",
    "transition",
    "terms",
)  # of a program, beside its pair
_TOLERANCE = 1e-5  # of constants computed from data, whose last bits differ from machine to machine


def fingerprint(fit: Fit) -> dict[str, Any]:
    """The program of a fit, described: ``entries`` maps names to what stands there. JSON, the same in every process."""
    return described(fit.program, fit.recipe, _learned(fit))


def described(program: Program, recipe: Recipe | None, learned: set[int], also: Iterable[str] = ()) -> dict[str, Any]:
    """A program described, values of the tensors with these identities apart: what `fingerprint` keeps of a fit."""
    description = Description(learned)
    for name, value in (recipe.arguments if recipe is not None else {}).items():
        description.add(f"{recipe.name if recipe is not None else ''}({name})", value)
    description.add("model", program.model)
    description.add("guide", program.guide)
    for name in (*_ANSWERS, *also):
        description.add(name, getattr(program, name))
    return {"python": sys.implementation.cache_tag, "entries": description.entries}


def differences(kept: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints, one sentence each; nothing where both have nothing to compare.

    >>> kept = {"python": "3", "entries": {"model": ["code", "a", None], "model.sigma": ["number", 0.3]}}
    >>> now = {"python": "3", "entries": {"model": ["code", "a", None], "model.sigma": ["number", 0.5]}}
    >>> differences(kept, now)
    ['model.sigma was 0.3, is 0.5']
    """
    same_python = kept["python"] == now["python"]
    found = []
    for name, before in kept["entries"].items():
        after = now["entries"].get(name)
        if after is not None and not _alike(before, after, same_python):
            found.append(_sentence(name, before, after))
    return found


def _sentence(name: str, before: list[Any], after: list[Any]) -> str:
    if before[0] == after[0] == "code":
        return f"the source of {name} changed"
    was, is_ = _shown(before), _shown(after)
    return f"{name} changed ({was})" if was == is_ else f"{name} was {was}, is {is_}"


def _shown(entry: list[Any]) -> str:
    if entry[0] == "code":
        return "a function"
    if entry[0] == "tensor":
        shape, numbers = entry[2], entry[3]
        size = int(np.prod(shape)) if shape else 1
        return f"{numbers[0] if not shape else numbers}" if size <= SHOWN else f"a tensor of shape {shape}"
    return str(entry[1])


def _alike(before: list[Any], after: list[Any], same_python: bool) -> bool:
    if before[0] != after[0]:
        return False
    if before[0] == "code":  # bytecode is what ran, but another Python writes another; the source may be out of date
        if same_python:
            return bool(before[1] == after[1])
        return before[2] is None or after[2] is None or bool(before[2] == after[2])
    if before[0] == "number":
        return _close([before[1]], [after[1]])
    if before[0] == "tensor":
        return before[1:3] == after[1:3] and _close(before[3], after[3])
    return before == after


def _close(before: Any, after: Any) -> bool:
    if isinstance(before, str) or isinstance(after, str):
        return bool(before == after)
    a, b = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    size = max(np.abs(a[np.isfinite(a)]).max(initial=0.0), np.abs(b[np.isfinite(b)]).max(initial=0.0))
    return a.shape == b.shape and bool(np.allclose(a, b, rtol=0.0, atol=_TOLERANCE * size, equal_nan=True))


def settings_of(values: Mapping[str, Any]) -> Entries:
    """Values that are not part of a program (an algorithm and its parts, constants) described under their names."""
    description = Description(set())
    for name, value in values.items():
        description.add(name, value)
    return description.entries


def _learned(fit: Fit) -> set[int]:
    """Identities of the tensors that a fit keeps, among those that its program holds."""
    with fit.bound():
        batch = fit.data.head(256) if fit.info.data_plate else fit.data.batch()
        return learned_of((fit.program.model, fit.guide), batch, fit.module_names.values())


def learned_of(functions: Iterable[Any], batch: Batch, modules: Iterable[nn.Module]) -> set[int]:
    """Identities of the tensors that model and guide start from and of the numbers in their networks."""
    initial = InitialValues()
    for function in functions:
        if function is not None:
            try:
                with initial:
                    function(*batch.args, **batch.kwargs)
            except Exception:  # rows that cannot be cut: then the starting values count as constants
                continue
    found = {id(value) for value in initial.found}
    held = list(modules)
    for module in [*held, *(passed for network in held for passed in originals(network))]:  # of copies that are trained
        found |= {id(p) for p in module.parameters() if p.requires_grad} | {id(b) for b in module.buffers()}
    return found
