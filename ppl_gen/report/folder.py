"""A comparison on disk: the table, the per-row values, and every fit."""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppl_gen.report.table import answer, frame
from ppl_gen.storage import _replace

if TYPE_CHECKING:
    from ppl_gen.comparison import Comparison

__all__ = ["save"]

FORMAT = 1


def save(comparison: Comparison, path: Path) -> Path:
    """See `Comparison.save`. A fit that cannot be saved is left out with a warning, and the JSON file says why."""
    path = path.expanduser().absolute()
    if path.exists() and not (path / "comparison.json").exists():
        raise ValueError(f"path: {path} exists and is no saved comparison; choose a new folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    try:
        table = frame(comparison)
        table.to_csv(folder / "table.csv", index=False)
        _write_rows(comparison, folder / "rows.csv")
        saved = _write_fits(comparison, folder / "fits")
        content = {
            "format": FORMAT,
            "program": comparison.program,
            "in_sample": comparison.in_sample,
            "answer": answer(comparison),
            "facts": dict(comparison.facts),
            "table": [{k: _plain(v) for k, v in row.items()} for row in table.to_dict("records")],
            "fits": saved,
        }
        (folder / "comparison.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        folder.chmod(0o755)
        _replace(folder, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return path


def _plain(value: Any) -> Any:
    """JSON has no NaN; whole numbers of numpy are no numbers to it."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_rows(comparison: Comparison, path: Path) -> None:
    """log p of every held-out row by fit: what paired comparisons of another kind need."""
    import pandas

    columns = {
        f"{line.label}, seed {line.seed}": pandas.Series(line.evidence.values.numpy())
        for line in comparison.lines
        if line.evidence is not None
    }
    pandas.DataFrame(columns).to_csv(path, index_label="row")


def _write_fits(comparison: Comparison, folder: Path) -> list[dict[str, Any]]:
    saved: list[dict[str, Any]] = []
    for number, line in enumerate(comparison.lines):
        entry: dict[str, Any] = {"algorithm": line.label, "seed": line.seed, "folder": None}
        saved.append(entry)
        if line.fit is None:
            entry["why"] = line.message
            continue
        name = f"{number:02d}-{re.sub(r'[^A-Za-z0-9]+', '-', line.label).strip('-') or 'fit'}-seed{line.seed}"
        try:
            line.fit.save(folder / name)
        except Exception as error:  # one fit must not cost the others
            entry["why"] = f"{type(error).__name__}: {error}"
            warnings.warn(f"the fit {line.label!r}, seed {line.seed}, was not saved: {entry['why']}", stacklevel=4)
        else:
            entry["folder"] = f"fits/{name}"
    return saved
