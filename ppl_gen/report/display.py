"""What a notebook shows of a comparison."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

from ppl_gen.runtime.notebook import box, grid, mark, number

if TYPE_CHECKING:
    from ppl_gen.comparison.compare import Comparison

__all__ = ["comparison_html"]


_GRADES = {"trusted": "good", "doubtful": "fair", "not diagnosed": "fair"}


def comparison_html(comparison: Comparison) -> str:
    """A comparison: the answer, the table that carries it, and what is said of each fit."""
    from ppl_gen.report.table import answer, frame

    value = "in_sample" if comparison.in_sample else "heldout"
    header = (
        "algorithm",
        "seed",
        "status",
        "nats per row",
        "difference from best",
        "shift/sd",
        "sd ratio",
        "k-hat",
        "verdict",
        "seconds",
    )
    rows, said = [], []
    for line, record in zip(comparison.lines, frame(comparison).to_dict("records"), strict=True):
        level = line.grade
        cells = (
            _with_error(record[value], record[f"{value}_se"]),
            _with_error(record["difference"], record["difference_se"]),
            number(record["shift_sd"], 2),
            number(record["sd_ratio"], 2),
            number(line.pareto_k, 2),
            level,
            number(line.seconds, 1),
        )
        rows.append((line.label, str(line.seed), line.status, *cells))
        tone = mark(_GRADES.get(level, "bad"))
        text = line.message if line.fit is None else line.verdict_text or line.message
        item = f"{tone}<b>{escape(line.label)}</b>, seed {line.seed}: {escape(text)}"
        said.append(f'<li style="white-space:pre-wrap;overflow-wrap:anywhere">{item}')
    kind = "log predictive density of " + ("the training rows" if comparison.in_sample else "held-out rows")
    caption = f"{comparison.program}: {kind}, the same for every fit; errors of differences are paired over rows"
    listed = f'<ul style="margin:.4em 0;padding-left:0;list-style:none">{"".join(f"{item}</li>" for item in said)}</ul>'
    return box(escape(answer(comparison)), grid(header, rows, caption), listed)


def _with_error(value: float, error: float) -> str:
    from ppl_gen.report.table import rounded

    return rounded(value, error) if math.isfinite(value) else "-"
