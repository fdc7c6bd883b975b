r"""Where the posteriors of a comparison differ: held-out density hardly tells a posterior from one five times narrower.

.. math:: \mathrm{shift} = \frac{\bar\theta - \bar\theta_0}{s_0}, \qquad \mathrm{ratio} = \frac{s}{s_0}

with mean and sd of each number that all rows share, and those (index 0) of the chains that are taken as the reference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ppl_gen.arguments import require_choice

if TYPE_CHECKING:
    import pandas

    from ppl_gen.comparison.compare import Comparison
    from ppl_gen.comparison.runner import Line

__all__ = ["Apart", "apart", "frame_of_posteriors", "posterior_words", "reference_line"]

#: What counts as another posterior: a mean off by half an sd, or an sd outside of 0.6 to 1.6 times the reference's.
SHIFT, NARROW, WIDE = 0.5, 0.6, 1.6

_COLUMNS = ("algorithm", "seed", "quantity", "mean", "sd", "shift_sd", "sd_ratio", "reference")
_ORDER = ("trusted", "doubtful")


@dataclass(frozen=True)
class Apart:
    """How far one fit's posterior is from the reference: the worst of its numbers, and which they are."""

    shift: float = math.nan
    shifted: str = ""
    ratio: float = math.nan
    scaled: str = ""
    point: bool = False


def reference_line(comparison: Comparison, reference: str | None = None) -> Line | None:
    """The fit that the others are compared with: chains that are trusted, else doubtful ones, with the least R-hat.

    Raises:
        ValueError: if ``reference`` is no label of the comparison, left no fit, or is a point without an sd.
    """
    if reference is not None:
        require_choice("reference", reference, dict.fromkeys(line.label for line in comparison.lines))
        found = [line for line in comparison.lines if line.label == reference]
        if not found:
            labels = ", ".join(dict.fromkeys(repr(line.label) for line in comparison.lines))
            raise ValueError(f"reference: expected one of the labels {labels}, got {reference!r}")
        for line in found:
            if any(len(values) > 1 and _spread(values) > 0 for values in _draws(comparison, line).values()):
                return line
        raise ValueError(
            f"reference: {reference!r} has no posterior with a width (a point, or no fit); name another label"
        )
    chains = [line for line in comparison.lines if line.fit is not None and line.fit.judged_by == "chains"]
    usable = [line for line in chains if line.grade in _ORDER and _draws(comparison, line)]
    return min(usable, key=lambda line: (_ORDER.index(line.grade), _r_hat(line)), default=None)


def _r_hat(line: Line) -> float:
    if line.summary is None or "r_hat" not in line.summary or not len(line.summary):
        return math.inf
    return float(line.summary["r_hat"].max())


def _draws(comparison: Comparison, line: Line) -> dict[str, np.ndarray]:
    """Name -> draws of the numbers that all rows share, components in one order, made once; empty without any."""
    from ppl_gen.report.draws import global_scalars

    key = ("draws", line.label, line.seed)
    if key not in comparison.computed:
        try:
            usable = line.fit is not None and line.status != "diverged"
            comparison.computed[key] = global_scalars(line.fit) if usable and line.fit is not None else {}
        except Exception:  # a program that has no draws has no posterior to compare: its row stays empty
            comparison.computed[key] = {}
    found: dict[str, np.ndarray] = comparison.computed[key]
    return found


def _spread(values: np.ndarray) -> float:
    """The sd; 0 for a point, and for draws that differ by rounding alone."""
    sd = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return 0.0 if sd <= 1e-9 * max(1.0, abs(float(values.mean()))) else sd


def frame_of_posteriors(comparison: Comparison, reference: str | None = None) -> pandas.DataFrame:
    """See `Comparison.posteriors`."""
    import pandas

    base = reference_line(comparison, reference)
    known = {} if base is None else _draws(comparison, base)
    name = "" if base is None else base.label
    rows = []
    for line in comparison.lines:
        for quantity, values in _draws(comparison, line).items():
            mean, sd = float(values.mean()), _spread(values)
            shift = ratio = math.nan
            if base is not None and quantity in known and (width := _spread(known[quantity])) > 0:
                shift, ratio = (mean - float(known[quantity].mean())) / width, sd / width
            rows.append((line.label, line.seed, quantity, mean, sd, shift, ratio, name))
    return pandas.DataFrame(rows, columns=list(_COLUMNS))


def apart(comparison: Comparison, reference: str | None = None) -> dict[tuple[str, int], Apart]:
    """Label and seed -> the worst of what `Comparison.posteriors` lists; nothing where there is no reference."""
    found = {}
    for (label, seed), group in frame_of_posteriors(comparison, reference).groupby(["algorithm", "seed"], sort=False):
        group = group[np.isfinite(group["shift_sd"])]
        if not len(group):
            continue
        shifted = group.loc[group["shift_sd"].abs().idxmax()]
        point = bool((group["sd"] == 0).all())
        ratios = group[group["sd_ratio"] > 0]
        widest = None if point or not len(ratios) else ratios.loc[np.log(ratios["sd_ratio"]).abs().idxmax()]
        found[str(label), int(seed)] = Apart(
            float(shifted["shift_sd"]),
            str(shifted["quantity"]),
            math.nan if widest is None else float(widest["sd_ratio"]),
            "" if widest is None else str(widest["quantity"]),
            point,
        )
    return found


def posterior_words(comparison: Comparison) -> str:
    """One sentence on where posteriors differ; empty where no two fits have global numbers to compare."""
    lines = [line for line in comparison.lines if _draws(comparison, line)]
    wide = [line for line in lines if any(_spread(values) > 0 for values in _draws(comparison, line).values())]
    if len(lines) < 2 or not wide:
        return ""
    base = reference_line(comparison)
    if base is None:
        return "No chains can serve as a reference here, so the widths of the posteriors are not assessed"
    others = {key: found for key, found in apart(comparison).items() if key[0] != base.label}
    said = [text for label in dict.fromkeys(key[0] for key in others) if (text := _said(label, others))]
    points = dict.fromkeys(label for (label, _), found in others.items() if found.point)
    level = base.grade
    reference = base.label + ("" if level == "trusted" else f" (itself {level})")
    if said:
        text = f"Posteriors differ: compared with {reference}, {'; '.join(said)}"
    elif len(points) < len(dict.fromkeys(key[0] for key in others)):
        text = f"Posteriors agree with {reference} (means within {SHIFT} sd, sd ratios between {NARROW} and {WIDE})"
    else:
        text = ""
    if points:
        text += f"{'; ' if text else ''}{' and '.join(points)} {'is a point' if len(points) == 1 else 'are points'}"
    return text


def _said(label: str, others: dict[tuple[str, int], Apart]) -> str:
    """What is wrong with a label's posterior, by the worst of its seeds; empty where nothing is."""
    mine = [found for (name, _), found in others.items() if name == label]
    shift = max(mine, key=lambda found: abs(found.shift))
    parts = []
    if abs(shift.shift) > SHIFT:
        parts.append(f"off by {shift.shift:+.1f} sd in {shift.shifted}".replace("-", "\N{MINUS SIGN}", 1))
    ratios = [found for found in mine if math.isfinite(found.ratio)]
    if ratios:
        worst = max(ratios, key=lambda found: abs(math.log(found.ratio)))
        if worst.ratio < NARROW:
            parts.append(f"{1 / worst.ratio:.1f} times too narrow in {worst.scaled}")
        elif worst.ratio > WIDE:
            parts.append(f"{worst.ratio:.1f} times too wide in {worst.scaled}")
    return f"{label} is {' and '.join(parts)}" if parts else ""
