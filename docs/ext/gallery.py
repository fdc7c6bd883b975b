"""The gallery: every script of ``examples/`` is run as a user runs it, and its picture and output make a page.

Scripts run shortened unless the build is told otherwise (``PPL_GEN_QUICK= make docs``). One that fails, or that leaves
no picture, fails the build. Where ``docs/images`` keeps the picture of a full run, a shortened one shows that.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from docutils import nodes
from facts import TOP, examples
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

LOG = logging.getLogger(__name__)
LIMIT = 900  # seconds for one script
LINES = 60  # of output shown


@dataclass(frozen=True)
class Shown:
    """What one script left."""

    script: Path
    pictures: tuple[str, ...]
    kept: bool  # the picture is that of a full run, made earlier
    output: str
    seconds: float


def described(script: Path) -> tuple[str, str]:
    """Title and text of a script, from its docstring: the title ends at the first colon, full stop or mark.

    >>> described(TOP / "examples" / "crabs.py")[0]
    "Weldon's crabs"
    """
    text = " ".join((ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or script.stem).split())
    return re.split(r"[:.?!]", text)[0], text


def run(script: Path, folder: Path) -> Shown:
    """Run one script in a folder of its own; its pictures are copied to ``folder``.

    Raises:
        ExtensionError: if it fails or makes no picture.
    """
    quick = os.environ.get("PPL_GEN_QUICK", "1")
    environment = {**os.environ, "PPL_GEN_QUICK": quick, "MPLBACKEND": "Agg"}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as here:
        done = subprocess.run(
            [sys.executable, str(script)], cwd=here, env=environment, capture_output=True, text=True, timeout=LIMIT
        )
        if done.returncode:
            raise ExtensionError(f"examples/{script.name} failed:\n{done.stderr[-3000:]}")
        pictures = sorted(Path(here).glob("*.png"))
        if not pictures:
            raise ExtensionError(f"examples/{script.name} left no picture")
        full = TOP / "docs" / "images" / f"{script.stem}.png"
        kept = bool(quick) and full.exists()
        pictures = [full] if kept else pictures
        for picture in pictures:
            shutil.copy(picture, folder / picture.name)
        output = done.stdout.replace(f"{Path(here).resolve()}/", "").replace(f"{here}/", "")
    names = tuple(picture.name for picture in pictures)
    return Shown(script, names, kept, output.strip(), time.perf_counter() - began)


def page(shown: Shown) -> str:
    """The page of one script."""
    title, text = described(shown.script)
    lines = shown.output.splitlines()
    cut = [*lines[:LINES], "..."] if len(lines) > LINES else lines
    short = "shortened (`PPL_GEN_QUICK=1`), " if os.environ.get("PPL_GEN_QUICK", "1") else ""
    pictures = "\n\n".join(f"![{text}]({name})" for name in shown.pictures)
    code = f"```{{literalinclude}} {Path('../..') / shown.script.relative_to(TOP)}\n:language: python\n```"
    shows = "The picture is that of a full run. " if shown.kept else ""
    printed = "\n".join(["## What it prints", "", "```text", *cut, "```"]) if lines else ""
    ran = f"*{shows}Run {short}in {shown.seconds:.0f} s for this page: `python examples/{shown.script.name}`.*"
    return "\n\n".join([f"# {title}", text, pictures, ran, "## The script", code, printed]) + "\n"


def build(app: Sphinx) -> None:
    """Run all scripts, two at a time, and write their pages."""
    folder = Path(app.srcdir) / "gallery"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with ThreadPoolExecutor(2) as pool:
        for shown in pool.map(lambda script: run(script, folder), examples()):
            LOG.info("examples/%s: %.0f s", shown.script.name, shown.seconds)
            (folder / f"{shown.script.stem}.md").write_text(page(shown), encoding="utf-8")


class Cards(SphinxDirective):
    """All pictures in a grid, each leading to its page."""

    def run(self) -> list[nodes.Node]:
        """The grid."""
        cards = nodes.container(classes=["cards"])
        for made in sorted(Path(self.env.srcdir, "gallery").glob("*.md")):
            title, text = described(TOP / "examples" / f"{made.stem}.py")
            picture = re.findall(r"^!\[.*\]\((.*)\)$", made.read_text(encoding="utf-8"), re.M)[0]
            card = f"[![{text}](gallery/{picture})](gallery/{made.stem}.md)\n\n[{title}](gallery/{made.stem}.md)\n"
            cards += nodes.container("", *self.parse_text_to_nodes(card), classes=["card"])
        return [cards]


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("builder-inited", build)
    app.add_directive("cards", Cards)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
