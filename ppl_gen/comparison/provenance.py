"""What was compared, in words: data, split, seeds, versions, and the call that repeats it."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch

from ppl_gen.comparison.split import SPLIT_SEED, row_count
from ppl_gen.data.batching import Constant, Dataset
from ppl_gen.data.streams import Stream

if TYPE_CHECKING:
    from ppl_gen.comparison.runner import Setup
    from ppl_gen.program.info import ProgramInfo
    from ppl_gen.program.program import Recipe

__all__ = ["facts_of", "versions", "written"]

_USUAL = {"n_jobs": None, "particles": 100, "draws": 500, "threads": 1, "device": None, "dtype": None}


def facts_of(
    setup: Setup,
    info: ProgramInfo,
    algorithms: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    given_test: bool,
    processes: str,
) -> dict[str, str]:
    """Name -> sentence, in the order a reader asks for them."""
    train, held = row_count(setup.train), row_count(setup.test)
    if given_test:
        split = f"{train} rows to train on, {held} given as held out"
    elif not settings["holdout"]:
        split = f"all {train} rows to train on, none held out: values are in-sample"
    else:
        split = f"{train} rows to train on, {held} held out, drawn at random under seed {SPLIT_SEED}"
    seeds = settings["seeds"]
    return {
        "program": _program_text(setup.recipe),
        "training data": described(setup.train),
        "rows": split,
        "seeds": ", ".join(map(str, seeds)),
        "evidence": f"{settings['draws']} posterior draws, {settings['particles']} importance samples",
        "processes": processes,
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        "machine": f"{platform.system()} {platform.machine()}"
        + ("" if setup.device is None else f", device {torch.device(setup.device)}"),
        "offers": ", ".join(sorted(info.offers)),
        "call": _call(setup.recipe, algorithms, settings, given_test),
    }


def _program_text(recipe: Recipe) -> str:
    if not recipe.arguments:
        return recipe.name
    return f"{recipe.name}({', '.join(f'{k}={v!r}' for k, v in recipe.arguments.items())})"


def _call(recipe: Recipe, algorithms: Mapping[str, Any], settings: Mapping[str, Any], given_test: bool) -> str:
    shown = {k: v for k, v in settings.items() if k not in _USUAL or v != _USUAL[k]}
    if given_test:
        shown = {"test": "test"} | {k: v for k, v in shown.items() if k != "holdout"}
    options = ", ".join(f"{k}={v if k == 'test' else written(v)}" for k, v in shown.items())
    rows = "".join(f"        {label!r}: {written(value)},\n" for label, value in algorithms.items())
    return f"pg.compare(\n    {_program_text(recipe)},\n    data,\n    {{\n{rows}    }},\n    {options},\n)"


def described(data: Any) -> str:
    """Shapes and types of the entries.

    >>> described(torch.zeros(3, 2))
    '(3, 2) float32'
    """
    if isinstance(data, Stream):
        return f"a stream of {data.rows} rows, in batches such as {described(data.first)}"
    if isinstance(data, Dataset):
        data = dict(data.entries)
    if not isinstance(data, Mapping):
        return f"{tuple(data.shape)} {str(data.dtype).removeprefix('torch.')}" if hasattr(data, "shape") else "a list"
    parts = {name: value.value if isinstance(value, Constant) else value for name, value in data.items()}
    return ", ".join(f"{k}: {described(v) if hasattr(v, 'shape') else repr(v)}" for k, v in parts.items())


def written(value: Any) -> str:
    """A dataclass as one would write it: only what differs from its defaults.

    >>> from ppl_gen.inference import IWAE, SVI
    >>> written(SVI(steps=100)), written(SVI())
    ('SVI(steps=100)', 'SVI()')
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        shown = [f for f in dataclasses.fields(value) if f.init and f.repr and not _is_default(value, f)]
        return f"{type(value).__name__}({', '.join(f'{f.name}={written(getattr(value, f.name))}' for f in shown)})"
    if isinstance(value, torch.dtype):
        return str(value)
    return str(getattr(value, "__name__", None) or repr(value))


def _is_default(value: Any, field: dataclasses.Field[Any]) -> bool:
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    try:
        return bool(getattr(value, field.name) == default)
    except (RuntimeError, ValueError):  # tensors and arrays have no single truth value
        return False


def versions() -> dict[str, str]:
    """The versions that decide the numbers, without importing anything.

    >>> list(versions())
    ['ppl_gen', 'Python', 'torch', 'pyro-ppl', 'arviz', 'numpy']
    """
    found = {"ppl_gen": "", "Python": platform.python_version()}
    for name in ("ppl_gen", "torch", "pyro-ppl", "arviz", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
