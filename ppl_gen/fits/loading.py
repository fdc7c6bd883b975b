"""Reading a fit from disk: every file checked against its hash, then the fit made again."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppl_gen.fits.fingerprint import differences, fingerprint
from ppl_gen.fits.reloading import compare_draws, restored
from ppl_gen.fits.saved import SavedFit
from ppl_gen.fits.schema import FORMAT, check_meta, check_tensors, digest, read_json, refuse, tensors_of
from ppl_gen.runtime.atomic import as_path

if TYPE_CHECKING:
    from ppl_gen.fits.result import Fit
    from ppl_gen.fitting.algorithm import Algorithm
    from ppl_gen.program.program import Program, Recipe

__all__ = ["load"]


def load(
    path: str | Path,
    program: Program | Recipe | Callable[..., Any] | None = None,
    *,
    data: Any = None,
    algorithm: Algorithm | None = None,
) -> Any:
    """Read a saved fit; with its program all of it, without it draws, history and diagnostics.

    Args:
        path: the folder that `Fit.save` wrote.
        program: the model, `Program` or `Recipe` it was fitted with.
        data: the training data, needed for a recipe when they were too large to be saved with the fit (64 MiB).
        algorithm: what the fit was made with, given again; needed where the program alone does not say what the guide,
            the posterior or a game's critic is. It takes no step.

    Raises:
        ValueError: for a folder that is no saved fit, or is damaged (every file is checked against its hash), or
            whose parameters do not belong to ``program``, or that needs its ``algorithm`` or was made by another.

    Example:
        >>> load("no/such/folder")
        Traceback (most recent call last):
        ...
        ValueError: path: no saved fit at no/such/folder (fit.json is missing)
    """
    folder = as_path(path)
    _check_algorithm(algorithm, program)
    while True:
        meta = _checked_meta(folder, str(path))
        try:
            contents = _checked_contents(folder, meta)
            if program is None:
                return SavedFit(folder, meta, contents)
            tensors = tensors_of(contents / "tensors.safetensors")
            check_tensors(contents / "tensors.safetensors", meta, tensors)
        except (ValueError, OSError):
            if meta == _checked_meta(folder, str(path)):
                raise
        else:  # else the fit was replaced by another while it was read: read that one
            fit = restored(meta, tensors, program, data, algorithm)
            compare_draws(fit, meta, contents)
            return _compared(fit, meta["fingerprint"], str(path))


def _compared(fit: Fit, kept: Mapping[str, Any], shown: str) -> Fit:
    """The fit, with a warning and a note where its program is not the one that was fitted."""
    found = differences(kept, fingerprint(fit))
    if not found:
        return fit
    text = f"{'; '.join(found[:5])}{f'; and {len(found) - 5} more' if len(found) > 5 else ''}"
    warnings.warn(
        f"the fit in {shown} is of another program than {fit.program.name!r} is now: {text}. Its weights and draws are "
        "those of the old one; load it with that, or fit again",
        stacklevel=3,
    )
    return replace(fit, notes={**fit.notes, "program": f"not as it was when it was fitted: {text}"})


def _checked_meta(folder: Path, shown: str) -> dict[str, Any]:
    file = folder / "fit.json"
    if not file.exists():
        raise ValueError(f"path: no saved fit at {shown} (fit.json is missing)")
    try:
        outer = json.loads(file.read_text(encoding="utf-8"))
        whole = hashlib.sha256(outer["fit"].encode()).hexdigest() == outer["sha256"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise ValueError(f"path: {file} is damaged; the fit cannot be trusted and is not loaded") from error
    if not whole:
        raise ValueError(f"path: {file} is damaged; the fit cannot be trusted and is not loaded")
    meta = read_json(file, outer["fit"])
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        found = meta.get("format") if isinstance(meta, dict) else None
        raise ValueError(f"path: {file} has format {repr(found)[:40]}, this version of ppl_gen reads {FORMAT}")
    return check_meta(file, meta)


def _checked_contents(folder: Path, meta: dict[str, Any]) -> Path:
    contents = folder / next(iter(meta["files"])).partition("/")[0]
    for name, kept in meta["files"].items():
        file = folder / name
        if not file.is_file() or digest(file) != kept:
            raise ValueError(f"path: {file} is missing or damaged; the fit cannot be trusted and is not loaded")
        if file.is_symlink() or contents.is_symlink():
            refuse(file, "it is a link to another place")
    return contents


def _check_algorithm(algorithm: Any, program: Any) -> None:
    from ppl_gen.fitting.algorithm import Algorithm

    if algorithm is None:
        return
    if not isinstance(algorithm, Algorithm):
        raise TypeError(f"algorithm: expected an instance such as SVI(), what the fit was made with; got {algorithm!r}")
    if program is None:
        raise ValueError("algorithm: it is of use with a program only; pass program=... too")
