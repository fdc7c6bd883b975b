"""Recorded benchmark results as pages: copied beside `benchmarks.md`, where the links of their README lead."""

from __future__ import annotations

import shutil
from pathlib import Path

from facts import TOP
from sphinx.application import Sphinx


def copy(app: Sphinx) -> None:
    """All of ``benchmarks/results``."""
    folder = Path(app.srcdir) / "results"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file in (TOP / "benchmarks" / "results").iterdir():
        if file.suffix in (".md", ".png", ".csv"):
            shutil.copy(file, folder / file.name)


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("builder-inited", copy)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
