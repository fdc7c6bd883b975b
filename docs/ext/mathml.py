"""Formulas as MathML, which browsers draw themselves: no script and no font has to be fetched."""

from __future__ import annotations

import re

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

LOG = logging.getLogger(__name__)


def markup(latex: str, *, block: bool) -> str:
    """MathML of a formula; several lines, or several formulas apart by blank lines, are aligned as one.

    Raises:
        ValueError: if a command is not known, which the converter would pass through as text.
    """
    if block and ("\\\\" in latex or "&" in latex) and "\\begin" not in latex:
        latex = rf"\begin{{split}}{latex}\end{{split}}"
    latex = re.sub(r"\\arg\b", r"\\operatorname{arg}", latex)  # the one usual name that the converter lacks
    text = convert(latex, display="block" if block else "inline")
    if "\\" in text or "<mi>&</mi>" in text:
        raise ValueError(f"a command that the converter does not know: {latex}")
    return text


def _inline(self: HTML5Translator, node: nodes.math) -> None:
    self.body.append(_drawn(node, block=False))
    raise nodes.SkipNode


def _block(self: HTML5Translator, node: nodes.math_block) -> None:
    self.body.append(f'<div class="formula">{_drawn(node, block=True)}</div>')
    raise nodes.SkipNode


def _drawn(node: nodes.Element, *, block: bool) -> str:
    try:
        return markup(node.astext(), block=block)
    except Exception as error:  # whatever the converter stumbles over is a fault of the page, and a warning fails it
        LOG.warning("formula: %s", error, location=node)
        return ""


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
