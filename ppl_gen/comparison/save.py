"""A comparison on disk: the table, the per-row values, and every fit."""

from __future__ import annotations

import json
import math
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppl_gen.report.table import answer, frame
from ppl_gen.runtime.atomic import atomically, replace_file

if TYPE_CHECKING:
    from ppl_gen.comparison.compare import Comparison

__all__ = ["save"]

FORMAT = 2


def save(comparison: Comparison, path: Path) -> Path:
    """See `Comparison.save`. A fit that cannot be saved is left out with a warning, and the JSON file says why."""
    tables = {}

    def write(folder: Path) -> str:
        table = frame(comparison).assign(message=[line.message for line in comparison.lines])
        tables.update({"table.csv": table.to_csv(index=False), "rows.csv": _rows(comparison)})
        for name, text in tables.items():
            (folder / name).write_text(text, encoding="utf-8")
        content = {
            "format": FORMAT,
            "program": comparison.program,
            "in_sample": comparison.in_sample,
            "answer": answer(comparison),
            "facts": dict(comparison.facts),
            "table": [{k: _plain(v) for k, v in row.items()} for row in table.to_dict("records")],
            "contents": folder.name,
            "fits": _write_fits(comparison, folder),
        }
        return json.dumps(content, indent=1)

    path = atomically(path, "comparison.json", "comparison", write)
    for name, text in tables.items():  # to be looked at; those that belong to comparison.json stand in its contents
        replace_file(path / name, text)
    return path


def _plain(value: Any) -> Any:
    """JSON has no NaN; whole numbers of numpy are no numbers to it."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rows(comparison: Comparison) -> str:
    """log p of every held-out row by fit: what paired comparisons of another kind need."""
    import pandas

    columns = {
        f"{line.label}, seed {line.seed}": pandas.Series(line.evidence.values.numpy())
        for line in comparison.lines
        if line.evidence is not None
    }
    text: str = pandas.DataFrame(columns).to_csv(index_label="row")
    return text


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
            line.fit.save(folder / "fits" / name)
        except Exception as error:  # one fit must not cost the others
            entry["why"] = f"{type(error).__name__}: {error}"
            warnings.warn(f"the fit {line.label!r}, seed {line.seed}, was not saved: {entry['why']}", stacklevel=6)
        else:
            entry["folder"] = f"{folder.name}/fits/{name}"
    return saved
