"""What a notebook shows: small HTML that needs nothing beside it and takes its colours from the page around it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppl_gen.offers import OFFERS
from ppl_gen.posterior import ChainPosterior

if TYPE_CHECKING:
    from ppl_gen.comparison import Comparison
    from ppl_gen.dryrun import ProgramInfo
    from ppl_gen.program import Program
    from ppl_gen.result import Fit

__all__ = ["comparison_html", "fit_html", "info_html", "program_html"]

#: Which field of a program declares which offer; all other offers are derived from the dry run.
_DECLARED = {
    "exact evidence": "evidence",
    "energy": "energy",
    "EM steps": "em",
    "CAVI updates": "cavi",
    "time steps": "time_steps",
}
_CURVES = ("program_loss", "log_likelihood", "elbo")  # what a history is known by, in this order
_WIDTH, _HEIGHT = 180, 36  # of the curve, in pixels
_SHOWN = 6  # numbers of a parameter written out; a larger one is summed up
_ROWS = 40  # parameters listed at most

# Mid tones for lines, which are seen on white and on black; text keeps the colour of the page.
_RULE = "rgba(128,128,128,.45)"
_TONES = {"good": "#2e9e5b", "fair": "#c98a1b", "bad": "#d64545"}
_ENDINGS = {"converged": "good", "finished": "good", "stopped": "fair", "interrupted": "fair"}
_GRADES = {"trusted": "good", "doubtful": "fair", "not diagnosed": "fair"}


def program_html(program: Program) -> str:
    """A program before it has met data: what it declares, and what it does not.

    >>> from ppl_gen import Program
    >>> "EM steps" in program_html(Program(lambda x: None, name="mine"))
    True
    """
    declared = [offer for offer, name in _DECLARED.items() if getattr(program, name) is not None]
    lacking = [offer for offer in _DECLARED if offer not in declared]
    known = {"model", "name", "data_plate", *_DECLARED.values()}
    others = [field.name for field in dataclasses.fields(program) if field.name not in known]
    brings = [name for name in others if not _absent(getattr(program, name))]
    if program.guide is not None:
        brings[brings.index("guide")] = f"guide ({getattr(program.guide, '__name__', type(program.guide).__name__)})"
    facts = {
        "declares": _meanings(declared) or "nothing beyond its model",
        "does not declare": _meanings(lacking) or "nothing: it declares all there is",
        "also brings": escape(", ".join(brings)) or "nothing",
        "rows in": f"the plate {escape(repr(program.data_plate))}",
    }
    text = "What else it offers is known once it has data: <code>pg.check(program, data)</code>."
    return _box(f"Program {escape(program.name)}", _facts(facts), _note(text))


def info_html(info: ProgramInfo) -> str:
    """What `pg.check` found: the site table, the offers and what is missing."""
    header = ("site", "kind", "distribution", "batch", "event", "plates", "guide")
    rows: list[Sequence[str]] = []
    for site in info.sites.values():
        partner = (info.guide_sites or {}).get(site.name) if site.latent else None
        summed = site.latent and site.finite and partner is None
        rows.append(
            (
                site.name,
                site.kind + (" (summed out)" if summed else ""),
                site.distribution,
                str(list(site.batch_shape)),
                str(list(site.event_shape)),
                ", ".join(site.plates) or "-",
                partner.distribution if partner is not None else "-",
            )
        )
    rows += [(name, "parameter", "", "", str(list(shape)), "", "") for name, shape in info.params.items()]
    plate = f"data plate {info.data_plate!r} over {info.rows} rows" if info.data_plate else "no data plate"
    facts = {
        "offers": _meanings(offer for offer in OFFERS if offer in info.offers) or "nothing",
        "lacks": _meanings(offer for offer in OFFERS if offer not in info.offers) or "nothing",
    }
    lost = {"not enumerable": info.unenumerable, "not differentiable": info.undifferentiable}
    warnings = "".join(_note(escape(f"{what}: {why}")) for what, why in lost.items() if why)
    return _box(escape(info.name), _table(header, rows, f"Sites; {plate}"), _facts(facts), warnings)


def fit_html(fit: Fit) -> str:
    """A fit: how it ended, what it cost, how the history went, and its parameters."""
    cost = [f"{value:.1f} s" if name == "seconds" else _counted(name, value) for name, value in fit.cost.items()]
    facts = {
        "status": f"{_mark(_ENDINGS.get(str(fit.status), 'bad'))}<b>{escape(str(fit.status))}</b>: "
        f"{escape(fit.message) or 'no message'}",
        "verdict": _judged(fit),
        "algorithm": f"{escape(fit.algorithm)}, seed {fit.seed}",
        "cost": escape(", ".join(cost)) or "not recorded",
        "history": _history(fit.records),
        **{escape(name): escape(str(text)) for name, text in fit.notes.items()},
    }
    return _box(f"Fit of {escape(fit.program.name)}", _facts(facts), _values(fit))


def _judged(fit: Fit) -> str:
    """The verdict where it is known already: showing a fit does not judge it."""
    found = fit.computed.get("verdict")
    if found is None:
        return "not diagnosed yet: <code>fit.verdict</code> says whether to trust it"
    tone = {"trust": "good", "doubtful": "fair"}.get(found.grade, "bad")
    advice = f" {escape(found.advice)}." if found.advice else ""
    return f"{_mark(tone)}<b>{escape(found.grade)}</b>: {escape(found.reason)}.{advice}"


def comparison_html(comparison: Comparison) -> str:
    """A comparison: the answer, the table that carries it, and what is said of each fit."""
    from ppl_gen.report.table import answer, frame, grade

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
        level = grade(line)
        cells = (
            _with_error(record[value], record[f"{value}_se"]),
            _with_error(record["difference"], record["difference_se"]),
            _number(record["shift_sd"], 2),
            _number(record["sd_ratio"], 2),
            _number(line.pareto_k, 2),
            level,
            _number(line.seconds, 1),
        )
        rows.append((line.label, str(line.seed), line.status, *cells))
        tone = _mark(_GRADES.get(level, "bad"))
        text = line.message if line.fit is None else line.verdict or line.message
        item = f"{tone}<b>{escape(line.label)}</b>, seed {line.seed}: {escape(text)}"
        said.append(f'<li style="white-space:pre-wrap;overflow-wrap:anywhere">{item}')
    kind = "log predictive density of " + ("the training rows" if comparison.in_sample else "held-out rows")
    caption = f"{comparison.program}: {kind}, the same for every fit; errors of differences are paired over rows"
    listed = f'<ul style="margin:.4em 0;padding-left:0;list-style:none">{"".join(f"{item}</li>" for item in said)}</ul>'
    return _box(escape(answer(comparison)), _table(header, rows, caption), listed)


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, Mapping) and not value)


def _box(title: str, *parts: str) -> str:
    style = f"border:1px solid {_RULE};border-radius:6px;padding:.6em .9em;max-width:62em;line-height:1.45"
    return f'<div style="{style}"><div style="font-weight:600;margin-bottom:.3em">{title}</div>{"".join(parts)}</div>'


def _mark(tone: str) -> str:
    """A coloured bar before words that say the same."""
    return f'<span style="border-left:4px solid {_TONES[tone]};padding-left:.4em"></span>'


def _note(text: str) -> str:
    return f'<div style="opacity:.75;font-size:.92em;margin-top:.3em">{text}</div>'


def _facts(facts: Mapping[str, str]) -> str:
    """Names beside their (already escaped) values."""
    row = '<tr><th scope="row" style="{}">{}</th><td style="{}">{}</td></tr>'
    left = "text-align:left;vertical-align:top;font-weight:400;opacity:.75;padding:1px 1em 1px 0;white-space:nowrap"
    right = "text-align:left;padding:1px 0;overflow-wrap:anywhere"
    body = "".join(row.format(left, name, right, value) for name, value in facts.items())
    return f'<table style="border-collapse:collapse;margin:0;background:none">{body}</table>'


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> str:
    """Cells are escaped here; a wide table scrolls inside its own box."""
    cell = f"text-align:left;padding:2px .9em 2px 0;border-bottom:1px solid {_RULE};white-space:nowrap"
    head = "".join(f'<th scope="col" style="{cell}">{escape(name)}</th>' for name in header)
    body = "".join(
        "<tr>" + "".join(f'<td style="{cell}">{escape(value)}</td>' for value in row) + "</tr>" for row in rows
    )
    style = "border-collapse:collapse;font-size:.92em;font-variant-numeric:tabular-nums;background:none;margin:.3em 0"
    title = f'<caption style="text-align:left;opacity:.75;padding-bottom:.2em">{escape(caption)}</caption>'
    table = f'<table style="{style}">{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div style="overflow-x:auto">{table}</div>'


def _meanings(offers: Iterable[str]) -> str:
    return ", ".join(f'<span title="{escape(OFFERS[offer])}">{escape(offer)}</span>' for offer in offers)


def _counted(name: str, value: float) -> str:
    words = name.replace("_", " ")
    return f"{value:.6g} {words.removesuffix('s') if value == 1 else words}"


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


def _with_error(value: float, error: float) -> str:
    from ppl_gen.report.table import rounded

    return rounded(value, error) if math.isfinite(value) else "-"


def _history(records: Mapping[str, Sequence[float]]) -> str:
    """The last value of the loss, and its whole course as a line."""
    name = next((name for name in _CURVES if records.get(name)), next((n for n, v in records.items() if v), None))
    if name is None:
        return "none was kept"
    values = [float(value) for value in records[name]]
    last = f"{escape(name)} {values[-1]:.5g} after {len(values)} steps"
    return f"{last} {_curve(name, values)}"


def _curve(name: str, values: Sequence[float]) -> str:
    """An SVG line; long histories are averaged in as many bins as there are pixels."""
    width = -(-len(values) // _WIDTH)
    bins = [[v for v in values[i : i + width] if math.isfinite(v)] for i in range(0, len(values), width)]
    points = [(i, math.fsum(part) / len(part)) for i, part in enumerate(bins) if part]
    if len(points) < 2:
        return ""
    low, high = min(y for _, y in points), max(y for _, y in points)
    across, up = (_WIDTH - 4) / max(1, len(bins) - 1), (_HEIGHT - 4) / ((high - low) or 1.0)
    path = " ".join(f"{2 + x * across:.1f},{_HEIGHT - 2 - (y - low) * up:.1f}" for x, y in points)
    label = escape(f"{name} over {len(values)} steps, between {low:.4g} and {high:.4g}")
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}" '
        f'style="vertical-align:middle;overflow:visible"><title>{label}</title><polyline points="{path}" fill="none" '
        'stroke="currentColor" stroke-width="1.3" stroke-linejoin="round" /></svg>'
    )


def _values(fit: Fit) -> str:
    """Parameters by name; for points and chains the latent sites too, which are what was learned."""
    rows: list[Sequence[str]] = []
    if isinstance(fit.learned, ChainPosterior):
        kind = "mean ± sd of the draws"
        rows = [(name, str(list(v.shape[2:])), _spread(v)) for name, v in fit.learned.draws.items()]
    else:
        kind = "values; large ones as mean ± sd of their entries"
        points = fit.point or {}
        rows = [(name, str(list(value.shape)), _summed(value)) for name, value in points.items()]
    rows += [(name, str(list(v.shape)), _summed(v)) for name, v in fit.state.params.items()]
    if not rows:
        return _note("No parameters.")
    hidden = f"; the first {_ROWS} of {len(rows)}" if len(rows) > _ROWS else ""
    return _table(("name", "shape", "value"), rows[:_ROWS], f"Parameters: {kind}{hidden}")


def _summed(value: Tensor) -> str:
    flat = value.detach().double().flatten()
    if flat.numel() <= _SHOWN:
        return ", ".join(f"{number:.4g}" for number in flat.tolist())
    return _plus_minus(flat.mean(), flat.std())


def _spread(draws: Tensor) -> str:
    """``draws`` is chains x draws x shape."""
    flat = draws.detach().double().flatten(0, 1).flatten(1) if draws.dim() > 2 else draws.double().reshape(-1, 1)
    if flat.shape[1] > _SHOWN:
        return f"{_plus_minus(flat.mean(), flat.std(0).mean())} (averaged over {flat.shape[1]} entries)"
    spread = flat.std(0) if len(flat) > 1 else torch.zeros(flat.shape[1])
    return ", ".join(_plus_minus(mean, sd) for mean, sd in zip(flat.mean(0), spread, strict=True))


def _plus_minus(mean: Any, sd: Any) -> str:
    return f"{float(mean):.4g} ± {float(sd):.2g}"
