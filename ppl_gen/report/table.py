"""The table of a comparison, the differences that decide it, and the answer in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ppl_gen.report.posteriors import Apart, apart, posterior_words
from ppl_gen.runtime.notebook import number

if TYPE_CHECKING:
    import pandas

    from ppl_gen.comparison.compare import Comparison
    from ppl_gen.comparison.runner import Line
    from ppl_gen.evidence.estimates import Evidence

__all__ = [
    "Standing",
    "answer",
    "as_text",
    "best_label",
    "brief",
    "frame",
    "grades_of",
    "labels_of",
    "paired",
    "rounded",
    "standings",
    "trust",
]

#: Differences of fewer than so many standard errors are no differences.
NOTABLE = 2.0

_BRIEF = 60  # characters of a message in a table
_LONG = 400  # and under it

_GRADES = ("trusted", "doubtful", "not trusted", "not diagnosed", "no fit")


def frame(comparison: Comparison, reference: str | None = None) -> pandas.DataFrame:
    """See `Comparison.table`."""
    import pandas

    value = "in_sample" if comparison.in_sample else "heldout"
    best = {line.seed: line for line in comparison.lines if line.label == best_label(comparison)}
    places = apart(comparison, reference)
    rows = []
    for line in comparison.lines:
        place = places.get((line.label, line.seed), Apart())
        mean, stderr, mc = _numbers(line.evidence)
        difference, error = paired(line.evidence, best[line.seed].evidence if line.seed in best else None)
        cost = {} if line.fit is None else line.fit.cost
        rows.append(
            {
                "algorithm": line.label,
                "seed": line.seed,
                "status": line.status,
                value: mean,
                f"{value}_se": stderr,
                "mc_se": mc,
                "difference": difference,
                "difference_se": error,
                "shift_sd": place.shift,
                "sd_ratio": place.ratio,
                "pareto_k": line.pareto_k,
                "verdict": line.verdict_text,
                "seconds": line.seconds,
                "steps": cost.get("steps", math.nan),
                "gradient_evaluations": cost.get("gradient_evaluations", math.nan),
                "message": brief(line.message),
            }
        )
    return pandas.DataFrame(rows)


def brief(text: str, width: int = _BRIEF) -> str:
    r"""The text on one line of at most ``width`` characters, cut between words; the dots say that there is more.

    >>> brief("it gives\nup"), brief("expected a number of rows", 14)
    ('it gives up', 'expected a ...')
    """
    flat = " ".join(text.split())
    if len(flat) <= width:
        return flat
    cut = flat[: width - 3]
    return f"{cut.rpartition(' ')[0] or cut} ..."[:width] if " " in cut else f"{cut}..."


def _numbers(evidence: Evidence | None) -> tuple[float, float, float]:
    return (math.nan,) * 3 if evidence is None else (evidence.mean, evidence.stderr, evidence.mc_stderr)


def paired(one: Evidence | None, other: Evidence | None) -> tuple[float, float]:
    r"""Difference of two evidences of the same rows, and its standard error.

    With :math:`d_i = \log p_1(x_i) - \log p_2(x_i)`, the error is :math:`\mathrm{sd}(d) / \sqrt n` with the Monte Carlo
    errors of both added in quadrature. What makes a row hard is the same for both and cancels.
    """
    if one is None or other is None:
        return math.nan, math.nan
    if one is other:
        return 0.0, 0.0
    d = one.values - other.values
    spread = float(d.std() / math.sqrt(len(d))) if len(d) > 1 else math.nan
    return one.mean - other.mean, math.hypot(spread, one.mc_stderr, other.mc_stderr)


@dataclass(frozen=True)
class Standing:
    """One label over all its seeds: its mean, and its difference to the best label with a standard error."""

    label: str
    mean: float
    stderr: float
    difference: float
    difference_se: float
    seconds: float
    rows: int

    @property
    def equal(self) -> bool:
        """Whether the difference to the best is within `NOTABLE` of its standard errors."""
        return self.difference_se == 0.0 or abs(self.difference) <= NOTABLE * self.difference_se


def labels_of(comparison: Comparison) -> list[str]:
    """Labels in the order given."""
    return list(dict.fromkeys(line.label for line in comparison.lines))


def _valued(comparison: Comparison, label: str) -> list[Line]:
    lines = (line for line in comparison.lines if line.label == label)
    return [line for line in lines if line.evidence is not None and math.isfinite(line.evidence.mean)]


def best_label(comparison: Comparison) -> str | None:
    """See `Comparison.best`."""
    means = {}
    for label in labels_of(comparison):
        values = [line.evidence.mean for line in _valued(comparison, label) if line.evidence is not None]
        if values:
            means[label] = sum(values) / len(values)
    return max(means, key=lambda label: means[label]) if means else None


def standings(comparison: Comparison) -> list[Standing]:
    """Labels with a value, best first. With several seeds, their spread is part of the error."""
    best = best_label(comparison)
    if best is None:
        return []
    reference = {line.seed: line.evidence for line in _valued(comparison, best)}
    result = []
    for label in labels_of(comparison):
        lines = _valued(comparison, label)
        if not lines:
            continue
        means = torch.tensor([line.evidence.mean for line in lines if line.evidence is not None], dtype=torch.float64)
        pairs = [paired(line.evidence, reference.get(line.seed)) for line in lines if line.seed in reference]
        difference, error = _pooled([d for d, _ in pairs], [e for _, e in pairs])
        stderr = sum(line.evidence.stderr for line in lines if line.evidence is not None) / len(lines)
        seconds = sum(line.seconds for line in lines) / len(lines)
        rows = max(line.evidence.rows for line in lines if line.evidence is not None)
        result.append(Standing(label, float(means.mean()), stderr, difference, error, seconds, rows))
    return sorted(result, key=lambda s: -s.mean)


def _pooled(differences: Sequence[float], errors: Sequence[float]) -> tuple[float, float]:
    """Over seeds: all share the held-out rows, so their row errors do not average out; the seeds' own spread does."""
    if not differences:
        return math.nan, math.nan
    d = torch.tensor(differences, dtype=torch.float64)
    seeds = float(d.std() / math.sqrt(len(d))) if len(d) > 1 else 0.0
    return float(d.mean()), math.hypot(sum(errors) / len(errors), seeds)


def answer(comparison: Comparison) -> str:
    """Which algorithm, in one sentence."""
    ranks = standings(comparison)
    if not ranks:
        return "No algorithm gave a value that could be compared."
    unit = "nats per row, in-sample" if comparison.in_sample else "nats per held-out row"
    best = ranks[0]
    if len(ranks) == 1:
        return f"{best.label} reached {best.mean:.4g} {unit}; nothing else gave a value to compare it with."
    equal = [s for s in ranks if s.equal]
    worse = [s for s in ranks if not s.equal]
    grades = grades_of(comparison)
    if len(equal) == 1:
        text = f"{best.label} predicts best ({best.mean:.4g} {unit}){_reserve(grades[best.label], ', but is ')}"
    else:
        every = "Both" if len(equal) == 2 else f"All {len(equal)}"
        who = _listed(s.label for s in equal) if worse else f"{every} algorithms"
        rows = f"{best.rows} {'rows' if comparison.in_sample else 'held-out rows'}"
        text = f"{who} predict equally well as far as {rows} can tell ({best.mean:.4g} nats per row)"
        text += f"; {_fastest(equal, grades)}"
    if worse:
        text += "; " + ", ".join(f"{s.label} is worse by {rounded(-s.difference, s.difference_se)}" for s in worse)
    if words := posterior_words(comparison):
        text += f". {words}"
    if comparison.in_sample:
        text += ". In-sample values favour maximum likelihood by construction: hold out rows to compare predictions"
    return text.replace("(-", "(\N{MINUS SIGN}") + "."


def _fastest(equal: Sequence[Standing], grades: Mapping[str, str]) -> str:
    """Who is recommended among equals: never a fit that is not trusted, without saying so."""
    trusted = [s for s in equal if grades[s.label] == "trusted"]
    quick = min(trusted or equal, key=lambda s: s.seconds)
    if not trusted:
        return f"none of them is trusted; {quick.label}{_reserve(grades[quick.label], ', ')}, is the fastest"
    if len(trusted) == 1 and len(equal) > 1:
        return f"only {quick.label} is trusted"
    among = "of them" if len(trusted) == len(equal) else f"of the {len(trusted)} trusted ones"
    return f"{quick.label} is the {'faster' if len(trusted) == 2 else 'fastest'} {among}"


def _reserve(level: str, before: str) -> str:
    return "" if level == "trusted" else f"{before}{level}"


def rounded(value: float, error: float) -> str:
    """A value and its error to the error's second digit.

    >>> rounded(1.2345, 0.0567), rounded(36.7, 11.2)
    ('1.234 ± 0.057', '37 ± 11')
    """
    if not (error > 0 and math.isfinite(error) and math.isfinite(value)):
        return f"{value:.2g}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def trust(comparison: Comparison) -> dict[str, list[str]]:
    """Labels by how far they can be trusted; a label counts by the worst of its seeds."""
    grades = grades_of(comparison)
    groups = {name: [label for label, level in grades.items() if level == name] for name in _GRADES}
    return {name: labels for name, labels in groups.items() if labels}


def grades_of(comparison: Comparison) -> dict[str, str]:
    """The grade of each label: that of the worst of its seeds."""
    found: dict[str, str] = {}
    for line in comparison.lines:
        found[line.label] = max(found.get(line.label, _GRADES[0]), line.grade, key=_GRADES.index)
    return found


def _listed(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def as_text(comparison: Comparison, width: int = 100) -> str:
    """What a terminal shows: the answer, the numbers that carry it, and what is said of each fit."""
    import textwrap

    several = len({line.seed for line in comparison.lines}) > 1
    value = "in_sample" if comparison.in_sample else "heldout"
    title = "in-sample" if comparison.in_sample else "held-out"
    rows, said = [], []
    for line, record in zip(comparison.lines, frame(comparison).to_dict("records"), strict=True):
        best = record["difference"] == 0.0 and record["difference_se"] == 0.0
        rows.append(
            {
                "algorithm": line.label,
                "seed": str(line.seed),
                "status": line.status,
                title: number(record[value], 4),
                "difference from best": "best" if best else _with_error(record["difference"], record["difference_se"]),
                "shift/sd": number(record["shift_sd"], 2),
                "sd ratio": number(record["sd_ratio"], 2),
                "k-hat": number(record["pareto_k"], 2),
                "seconds": number(record["seconds"], 1),
                "verdict": line.grade,
            }
        )
        who = f"{line.label}, seed {line.seed}" if several else line.label
        text = line.verdict_text if line.fit is not None and line.verdict_text else brief(line.message, _LONG)
        said.append(textwrap.fill(f"{who}: {text}", width, subsequent_indent="    ", break_on_hyphens=False))
    columns = [name for name in rows[0] if name != "seed" or several] if rows else []
    columns = [name for name in columns if name == "algorithm" or any(row[name] != "-" for row in rows)]
    lines = [columns, *([row[name] for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    table = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([textwrap.fill(answer(comparison), width), "", *table, "", *said])


def _with_error(value: float, error: float) -> str:
    return rounded(value, error) if math.isfinite(value) else "-"
