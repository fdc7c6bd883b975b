"""Panels of the report: drawn without pyplot, written as data addresses."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Picture", "picture"]


@dataclass(frozen=True)
class Picture:
    """One panel: an image as a data address, what it shows in words, and its caption."""

    source: str
    alt: str
    caption: str = ""
    width: int = 0


def picture(
    width: float, height: float, draw: Callable[[Any], None], alt: str, caption: str = "", *, pixels: bool = False
) -> Picture:
    """A panel at the size at which it is read, so that its letters are as large on a telephone as on a desk.

    Lines are kept as lines (SVG); what is made of ``pixels`` is smaller as PNG, at twice the resolution of a page.
    """
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    draw(figure.add_subplot())
    target = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "ppl_gen"}):
        if pixels:
            figure.savefig(target, format="png", dpi=192, metadata={"Software": None})
        else:
            figure.savefig(target, format="svg", dpi=150, metadata={"Date": None, "Creator": None})
    data = base64.b64encode(target.getvalue()).decode("ascii")
    kind = "png" if pixels else "svg+xml"
    return Picture(f"data:image/{kind};base64,{data}", alt, caption, round(96 * width))
