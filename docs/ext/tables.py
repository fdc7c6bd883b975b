"""Directives that make tables from the code: offers, the catalogue, needs, and which algorithm fits which program."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape

from docutils import nodes
from facts import CATALOGUE, algorithms, found, matrix, missing, needs
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from ppl_gen.program.offers import OFFERS

Cell = str | nodes.Node


def table(header: Sequence[Cell], rows: Iterable[Sequence[Cell]], *, kind: str = "") -> nodes.table:
    """A docutils table; strings between backquotes become code."""
    group = nodes.tgroup(cols=len(header))
    group += [nodes.colspec(colwidth=1) for _ in header]
    head = nodes.thead()
    head += _row(header)
    body = nodes.tbody()
    body += [_row(row) for row in rows]
    group += [head, body]
    return nodes.table("", group, classes=[kind] if kind else [])


def _row(cells: Sequence[Cell]) -> nodes.row:
    row = nodes.row()
    for cell in cells:
        content = _text(cell) if isinstance(cell, str) else [cell]
        row += nodes.entry("", nodes.paragraph("", "", *content))
    return row


def _text(text: str) -> list[nodes.Node]:
    parts = text.split("`")
    return [nodes.literal(part, part) if i % 2 else nodes.Text(part) for i, part in enumerate(parts) if part]


def offers_table() -> nodes.table:
    """Every offer: what it means, and which programs of the catalogue make it."""
    rows = []
    for offer, meaning in OFFERS.items():
        by = [name for name in CATALOGUE if offer in found(name).offers]
        who = "all of the catalogue" if len(by) == len(CATALOGUE) else ", ".join(f"`{name}`" for name in by) or "none"
        rows.append((offer, meaning, who))
    return table(("offer", "what it means", "offered by"), rows, kind="stacked")


def catalogue_table() -> nodes.table:
    """Every program of the catalogue in a line."""
    return table(("program", "what it is"), [(f"`{entry.name}`", entry.about) for entry in CATALOGUE.values()])


def needs_table() -> nodes.table:
    """What every algorithm needs, at its defaults."""
    rows = [(f"`{label}`", "; ".join(needs(algorithm)) or "nothing") for label, algorithm in algorithms().items()]
    return table(("algorithm", "needs"), rows, kind="stacked")


def fits_matrix() -> nodes.table:
    """Programs against algorithms."""
    rows: list[list[Cell]] = []
    for program, row in matrix().items():
        rows.append([f"`{program}`", *(_answer(fits, missing(program, label)) for label, fits in row.items())])
    header = ["program", *(_breakable(label) for label in algorithms())]
    return table(header, rows, kind="matrix")


def _answer(fits: bool, lacks: Sequence[str]) -> nodes.Node:
    why = escape("lacks " + "; ".join(lacks) if lacks else "refused by the algorithm's own check")
    return nodes.raw("", '<b aria-label="fits">✓</b>' if fits else f'<abbr title="{why}">–</abbr>', format="html")


def _breakable(label: str) -> nodes.Node:
    """Long labels may break after a bracket and between words."""
    text = escape(label).replace("(", "(<wbr>").replace("Divergence", "<wbr>Divergence")
    return nodes.raw("", text, format="html")


def directive(make: Callable[[], nodes.table]) -> type[SphinxDirective]:
    """The directive that stands for the table ``make`` gives."""

    class Made(SphinxDirective):
        def run(self) -> list[nodes.Node]:
            return [make()]

    return Made


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    for make in (offers_table, catalogue_table, needs_table, fits_matrix):
        app.add_directive(make.__name__.replace("_", "-"), directive(make))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
