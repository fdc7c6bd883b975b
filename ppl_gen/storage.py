"""A fit on disk: weights in safetensors, draws in netCDF, the rest JSON, every file hashed; no pickle anywhere."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ppl_gen.atomic import as_path, atomically
from ppl_gen.data.batching import Dataset
from ppl_gen.data.calls import ByStep
from ppl_gen.fingerprint import differences, fingerprint
from ppl_gen.posterior import BUILT_IN, ChainPosterior, PointPosterior
from ppl_gen.reloading import compare_draws, restored, site_table
from ppl_gen.saved import SavedFit
from ppl_gen.schema import FILES, check_meta, check_tensors, read_json, refuse, tensors_of

if TYPE_CHECKING:
    from ppl_gen.inference.base import Algorithm
    from ppl_gen.program import Program, Recipe
    from ppl_gen.result import Fit

__all__ = ["load", "save_fit"]

FORMAT = 2
MAX_DATA = 64 * 2**20  # bytes of training data kept beside a fit, so that recipes can be built again


def save_fit(fit: Fit, path: str | Path) -> Path:
    """Make ``path`` a folder that holds the fit, in one step: see `ppl_gen.atomic`.

    Nothing is computed but an excerpt of the draws: a diagnosis is kept where there is one already.
    """
    from safetensors.torch import save_file

    def write(folder: Path) -> str:
        save_file(_tensors(fit), folder / "tensors.safetensors")
        _write_draws(fit, folder)
        meta = _meta(fit)
        names = [name for name in FILES if (folder / name).exists()]
        meta["files"] = {f"{folder.name}/{name}": _digest(folder / name) for name in names}
        text = json.dumps(meta, indent=1)
        return json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "fit": text})

    return atomically(as_path(path), "fit.json", "fit", write)


def _tensors(fit: Fit) -> dict[str, Tensor]:
    tensors = {f"param/{name}": value for name, value in fit.state.unconstrained.items()}
    tensors |= {f"buffer/{name}": value for name, value in fit.state.buffers.items()}
    if isinstance(fit.learned, PointPosterior):
        tensors |= {f"point/{name}": value for name, value in fit.learned.values.items()}
    if isinstance(fit.learned, ChainPosterior):
        tensors |= {f"draws/{name}": value for name, value in fit.learned.draws.items()}
        tensors |= {f"stats/{name}": value for name, value in fit.learned.stats.items()}
    for name, module in fit.extra_modules.items():
        tensors |= {
            f"module/{name}/{key}": value for key, value in module.state_dict().items() if isinstance(value, Tensor)
        }
    if _left_out(fit.data) is None:
        tensors |= {f"data/{name}": value for name, value in _entries(fit.data).items()}
        constants = fit.data.constants.items()
        tensors |= {f"constant/{name}": value for name, value in constants if isinstance(value, Tensor)}
    plain = {n: v if isinstance(v, Tensor) else torch.as_tensor(np.asarray(v)) for n, v in tensors.items()}
    return {name: value.detach().cpu().contiguous().clone() for name, value in plain.items()}


def _entries(data: Dataset) -> dict[str, Any]:
    """Entries of the training data, those included that only a recipe reads (labels, say)."""
    rest = data.original if isinstance(data.original, Mapping) else {}
    return {**{k: v for k, v in rest.items() if isinstance(v, Tensor | np.ndarray) and v.ndim}, **data.given}


def _left_out(data: Dataset) -> str | None:
    """Why the training data are not saved with a fit, or None when they are."""
    if data.on_batch is not None:
        return "are redrawn for every batch, by a function that is not saved"
    size = sum(int(np.prod(value.shape)) * value.dtype.itemsize for value in _entries(data).values())
    if size > MAX_DATA:
        return "were too large to be saved with the fit"
    kept = ByStep | Tensor | bool | int | float | str | None
    odd = [name for name, value in data.constants.items() if not isinstance(value, kept)]
    return f"hold {', '.join(odd)}, which cannot be saved with the fit" if odd else None


def _write_draws(fit: Fit, folder: Path) -> None:
    from ppl_gen.diagnostics.bridge import write_tree
    from ppl_gen.diagnostics.excerpt import excerpt

    write_tree(excerpt(fit), folder / "draws.nc")
    frame = fit.computed.get("diagnosis")
    if frame is None:
        return
    attrs = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in frame.attrs.items()}
    attrs = {key: None if isinstance(v, float) and not np.isfinite(v) else v for key, v in attrs.items()}  # JSON's NaN
    text = json.dumps({"frame": json.loads(frame.to_json(orient="split", double_precision=15)), "attrs": attrs})
    (folder / "diagnosis.json").write_text(text)


def _meta(fit: Fit) -> dict[str, Any]:
    import ppl_gen

    settled = {k: v.at(None) if isinstance(v, ByStep) else v for k, v in fit.data.constants.items()}
    plain = {k: v for k, v in settled.items() if isinstance(v, bool | int | float | str | None)}
    return {
        "format": FORMAT,
        "version": ppl_gen.__version__,
        "program": fit.program.name,
        "algorithm": fit.algorithm,
        "settings": fit.settings,
        "kind": fit.learned.kind if fit.learned.kind in ("chains", "point") else "variational",
        "status": str(fit.status),
        "message": fit.message,
        "seed": fit.seed,
        "cost": {name: float(v) if isinstance(v, float) else int(v) for name, v in fit.cost.items() if np.isfinite(v)},
        "notes": {name: str(note) for name, note in {**fit.notes, **_not_kept(fit)}.items()},
        "records": {name: [repr(float(v)) for v in values] for name, values in fit.records.items()},
        "checks": {name: [repr(float(v)) for v in values] for name, values in fit.checks.items()},
        "dtype": str(fit.data.dtype).removeprefix("torch."),
        "positional": list(fit.data.order),
        "data": _left_out(fit.data),
        "plate": fit.info.data_plate,
        "sites": site_table(fit.info),
        "constants": plain,
        "guide": _guide_source(fit),
        "fingerprint": fingerprint(fit),
    }


def _not_kept(fit: Fit) -> dict[str, str]:
    """What a saved fit says that it lacks; a posterior of the user's own class, without which it cannot be loaded."""
    lacking = []
    own, source = type(fit.learned), _guide_source(fit)
    if own not in BUILT_IN:
        lacking.append(f"the posterior, a {own.__name__}, which is code")
        warnings.warn(
            f"fit.save: the posterior of this fit is a {own.__name__}, which is code and is not saved: only draws, "
            "history and parameters are. pg.load(path) without program= reads them; with program= and algorithm= it "
            "makes the posterior again, if all that it learned is in parameters",
            stacklevel=6,
        )
    elif source == "lost":
        lacking.append("the guide, which is code of the algorithm")
        warnings.warn(
            f"fit.save: the guide of this fit was made by {fit.algorithm}, which does not implement outline(run), and "
            "is not saved: pg.load(path) without program= reads draws and history, with program= it is refused",
            stacklevel=6,
        )
    return {"not saved": "; ".join(lacking)} if lacking else {}


def _guide_source(fit: Fit) -> str | None:
    own = type(fit.learned) not in BUILT_IN
    return "lost" if own and fit.guide_source != "own" else fit.guide_source


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
    for name, digest in meta["files"].items():
        file = folder / name
        if not file.is_file() or _digest(file) != digest:
            raise ValueError(f"path: {file} is missing or damaged; the fit cannot be trusted and is not loaded")
        if file.is_symlink() or contents.is_symlink():
            refuse(file, "it is a link to another place")
    return contents


def _check_algorithm(algorithm: Any, program: Any) -> None:
    from ppl_gen.inference.base import Algorithm

    if algorithm is None:
        return
    if not isinstance(algorithm, Algorithm):
        raise TypeError(f"algorithm: expected an instance such as SVI(), what the fit was made with; got {algorithm!r}")
    if program is None:
        raise ValueError("algorithm: it is of use with a program only; pass program=... too")


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
