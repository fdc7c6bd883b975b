"""The directive `bad-input-table`: mistakes and the answers to them, made by making each one while the site is built.

``python docs/ext/bad_input.py`` prints the same tables as Markdown.
"""

from __future__ import annotations

import functools
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from bad_input_cases import CASES, names

if TYPE_CHECKING:
    from sphinx.application import Sphinx

__all__ = ["answers", "parts"]

HEADER = ("what is written", "error", "first line of the message")


def parts() -> list[str]:
    """The tables, in order."""
    return list(dict.fromkeys(case.part for case in CASES))


def answers(part: str) -> list[tuple[str, str, str]]:
    """Of one table: what is written, the class of the error, and the first line of its message.

    Raises:
        AssertionError: for a mistake that is not answered as the list of cases says.
    """
    return [(code, error, line) for belongs, code, error, line in _answers() if belongs == part]


@functools.cache
def _answers() -> list[tuple[str, str, str, str]]:
    found = []
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        known = names(Path(folder))
        for case in CASES:
            try:
                eval(case.code, known)
            except case.error as error:
                line = str(error).splitlines()[0].replace(folder, "...")
                assert line.startswith(case.words), f"{case.code}: {line}"
                found.append((case.part, case.code, type(error).__name__, line))
            else:
                raise AssertionError(f"{case.code}: no error")
    return found


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    from docutils import nodes
    from sphinx.util.docutils import SphinxDirective
    from tables import table

    class BadInputTable(SphinxDirective):
        """One table of mistakes; its argument is the part."""

        required_arguments = 1
        final_argument_whitespace = True

        def run(self) -> list[nodes.Node]:
            found = answers(self.arguments[0])
            return [table(HEADER, [(nodes.literal(code, code), f"`{error}`", line) for code, error, line in found])]

    app.add_directive("bad-input-table", BadInputTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _printed() -> str:
    pages = []
    for part in parts():
        rows = [HEADER, ("---",) * 3, *((f"`{code}`", f"`{error}`", line) for code, error, line in answers(part))]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        pages.append("\n".join([f"## {part}", "", *lines]))
    return "\n\n".join(pages)


if __name__ == "__main__":
    print(_printed())
