"""A fit on disk: weights in safetensors, draws in netCDF, the rest JSON, every file hashed; no pickle anywhere."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ppl_gen.data.batching import Dataset
from ppl_gen.data.calls import ByStep
from ppl_gen.fits.fingerprint import fingerprint
from ppl_gen.fits.schema import FILES, FORMAT, digest, site_table
from ppl_gen.fitting.posteriors.kinds import CODE, held_whole
from ppl_gen.runtime.atomic import as_path, atomically
from ppl_gen.version import __version__

if TYPE_CHECKING:
    from ppl_gen.fits.result import Fit

__all__ = ["save_fit"]

MAX_DATA = 64 * 2**20  # bytes of training data kept beside a fit, so that recipes can be built again


def save_fit(fit: Fit, path: str | Path) -> Path:
    """Make ``path`` a folder that holds the fit, in one step: see `ppl_gen.runtime.atomic`.

    Nothing is computed but an excerpt of the draws: a diagnosis is kept where there is one already.
    """
    from safetensors.torch import save_file

    def write(folder: Path) -> str:
        save_file(_tensors(fit), folder / "tensors.safetensors")
        _write_draws(fit, folder)
        meta = _meta(fit)
        names = [name for name in FILES if (folder / name).exists()]
        meta["files"] = {f"{folder.name}/{name}": digest(folder / name) for name in names}
        text = json.dumps(meta, indent=1)
        return json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "fit": text})

    return atomically(as_path(path), "fit.json", "fit", write)


def _tensors(fit: Fit) -> dict[str, Tensor]:
    tensors = {f"param/{name}": value for name, value in fit.state.unconstrained.items()}
    tensors |= {f"buffer/{name}": value for name, value in fit.state.buffers.items()}
    if held_whole(type(fit.learned)):
        parts = fit.learned.tensors().items()
        tensors |= {f"{part}/{name}": value for part, values in parts for name, value in values.items()}
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
    if data.streamed is not None:
        return "came as a stream"
    size = sum(int(np.prod(value.shape)) * value.dtype.itemsize for value in _entries(data).values())
    if size > MAX_DATA:
        return "were too large to be saved with the fit"
    kept = ByStep | Tensor | bool | int | float | str | None
    odd = [name for name, value in data.constants.items() if not isinstance(value, kept)]
    return f"hold {', '.join(odd)}, which cannot be saved with the fit" if odd else None


def _write_draws(fit: Fit, folder: Path) -> None:
    from ppl_gen.bridge import write_tree
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
    settled = {k: v.at(None) if isinstance(v, ByStep) else v for k, v in fit.data.constants.items()}
    plain = {k: v for k, v in settled.items() if isinstance(v, bool | int | float | str | None)}
    return {
        "format": FORMAT,
        "version": __version__,
        "program": fit.program.name,
        "algorithm": fit.algorithm,
        "settings": fit.settings,
        "kind": fit.learned.kind if held_whole(type(fit.learned)) else CODE,
        "judged_by": fit.judged_by,
        "status": str(fit.status),
        "message": fit.message,
        "seed": fit.seed,
        "cost": {name: _plain(v) for name, v in fit.cost.items() if isinstance(v, str) or np.isfinite(v)},
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
        "criterion": fit.criterion,
        "fingerprint": fingerprint(fit),
    }


def _not_kept(fit: Fit) -> dict[str, str]:
    """What a saved fit says that it lacks; a posterior of the user's own class, without which it cannot be loaded."""
    lacking = []
    own, source = type(fit.learned), _guide_source(fit)
    if not held_whole(own):
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
    own = not held_whole(type(fit.learned))
    return "lost" if own and fit.guide_source != "own" else fit.guide_source


def _plain(value: float | str) -> float | int | str:
    """A number of NumPy's as one of Python's."""
    return value if isinstance(value, str) else float(value) if isinstance(value, float) else int(value)
