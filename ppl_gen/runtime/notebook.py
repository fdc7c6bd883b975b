"""Pieces of HTML for notebooks: small, in need of nothing beside them, in the colours of the page around them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

__all__ = ["box", "grid", "mark", "note", "number", "pairs"]


# Mid tones for lines, which are seen on white and on black; text keeps the colour of the page.
_RULE = "rgba(128,128,128,.45)"


_TONES = {"good": "#2e9e5b", "fair": "#c98a1b", "bad": "#d64545"}


def box(title: str, *parts: str) -> str:
    style = f"border:1px solid {_RULE};border-radius:6px;padding:.6em .9em;max-width:62em;line-height:1.45"
    return f'<div style="{style}"><div style="font-weight:600;margin-bottom:.3em">{title}</div>{"".join(parts)}</div>'


def mark(tone: str) -> str:
    """A coloured bar before words that say the same."""
    return f'<span style="border-left:4px solid {_TONES[tone]};padding-left:.4em"></span>'


def note(text: str) -> str:
    return f'<div style="opacity:.75;font-size:.92em;margin-top:.3em">{text}</div>'


def pairs(facts: Mapping[str, str]) -> str:
    """Names beside their (already escaped) values."""
    row = '<tr><th scope="row" style="{}">{}</th><td style="{}">{}</td></tr>'
    left = "text-align:left;vertical-align:top;font-weight:400;opacity:.75;padding:1px 1em 1px 0;white-space:nowrap"
    right = "text-align:left;padding:1px 0;overflow-wrap:anywhere"
    body = "".join(row.format(left, name, right, value) for name, value in facts.items())
    return f'<table style="border-collapse:collapse;margin:0;background:none">{body}</table>'


def grid(header: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> str:
    """Cells are escaped here; a wide table scrolls inside its own box."""
    cell = f"text-align:left;padding:2px .9em 2px 0;border-bottom:1px solid {_RULE};white-space:nowrap"
    head = "".join(f'<th scope="col" style="{cell}">{escape(name)}</th>' for name in header)
    body = "".join(
        "<tr>" + "".join(f'<td style="{cell}">{escape(value)}</td>' for value in row) + "</tr>" for row in rows
    )
    style = "border-collapse:collapse;font-size:.92em;font-variant-numeric:tabular-nums;background:none;margin:.3em 0"
    title = f'<caption style="text-align:left;opacity:.75;padding-bottom:.2em">{escape(caption)}</caption>'
    made = f'<table style="{style}">{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div style="overflow-x:auto">{made}</div>'


def number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"
