"""The report: one HTML file that needs nothing beside it."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppl_gen.report.code_section import coded
from ppl_gen.report.draws import Scalar, distinct, global_scalars, replicates
from ppl_gen.report.figures import Picture, picture
from ppl_gen.report.plots import colours, curves_of, draw_apart, draw_curve, draw_density, draw_heldout, draw_predictive
from ppl_gen.report.posteriors import frame_of_posteriors, posterior_words
from ppl_gen.report.seen_section import seen
from ppl_gen.report.table import answer, frame, labels_of, standings, trust
from ppl_gen.runtime.atomic import replace_file

if TYPE_CHECKING:
    from ppl_gen.comparison.compare import Comparison
    from ppl_gen.comparison.runner import Line
    from ppl_gen.fits.result import Fit

__all__ = ["page", "write"]

Style = dict[str, tuple[str, str]]

PANELS = 12  # posterior panels at most: more than a reader compares


def write(comparison: Comparison, path: Path) -> Path:
    """See `Comparison.report`: made beside ``path`` under another name, then put in its place in one step."""
    path = path.expanduser().absolute()
    text = page(comparison)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text)
    return path


def page(comparison: Comparison) -> str:
    """The whole file as text."""
    from importlib import resources

    from jinja2 import Environment, StrictUndefined

    source = resources.files("ppl_gen.report").joinpath("template.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    style = colours(labels_of(comparison))
    fits = {label: fit for label in style if (fit := _first_fit(comparison, label)) is not None}
    densities, left_out, without = _densities(fits, style)
    predictive, no_predictive = _predictive(fits, style)
    groups, units, no_codes = coded(fits, comparison.test_rows, in_sample=comparison.in_sample)
    sights, unseen = seen(fits, comparison.test_rows)
    return environment.from_string(source).render(
        program=comparison.program,
        answer=answer(comparison),
        trust=trust(comparison),
        in_sample=comparison.in_sample,
        several=_several(comparison),
        facts=comparison.facts,
        columns=_columns(comparison),
        rows=[_cells(comparison, record) for record in frame(comparison).to_dict("records")],
        heldout=_heldout(comparison),
        curves=_curves(comparison),
        apart=_apart(comparison, style, [picture.caption for picture in densities]),
        apart_words=posterior_words(comparison),
        densities=densities,
        left_out=left_out,
        without=without,
        predictive=predictive,
        no_predictive=no_predictive,
        groups=groups,
        units=units,
        no_codes=no_codes,
        sights=sights,
        unseen=unseen,
        legend=[(label, *style[label]) for label in fits],
        verdicts=[_verdict(line) for line in comparison.lines if line.fit is not None and line.status != "diverged"],
        failures=[line for line in comparison.lines if line.fit is None or line.traceback or line.status == "diverged"],
        made=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )


def _first_fit(comparison: Comparison, label: str) -> Fit | None:
    lines = (line for line in comparison.lines if line.label == label and line.status != "diverged")
    return next((line.fit for line in lines if line.fit is not None), None)


def _several(comparison: Comparison) -> bool:
    return len({line.seed for line in comparison.lines}) > 1


def _columns(comparison: Comparison) -> list[tuple[str, str]]:
    value = "in-sample" if comparison.in_sample else "held-out"
    return [
        ("algorithm", "Algorithm"),
        ("status", "Status"),
        ("value", f"{value.capitalize()} nats/row"),
        ("difference", "Difference from best"),
        ("mc", "MC error"),
        ("shift", "Shift, sds"),
        ("ratio", "Sd ratio"),
        ("k", "Pareto k"),
        ("cost", "Cost"),
        ("grade", "Verdict"),
    ]


def _cells(comparison: Comparison, record: dict[str, Any]) -> dict[str, str]:
    value = "in_sample" if comparison.in_sample else "heldout"
    line = next(x for x in comparison.lines if (x.label, x.seed) == (record["algorithm"], record["seed"]))
    best = record["difference"] == 0 and record["difference_se"] == 0
    steps = "" if math.isnan(record["steps"]) else f", {int(record['steps'])} step{'s' if record['steps'] != 1 else ''}"
    seconds = "–" if math.isnan(record["seconds"]) else f"{record['seconds']:.1f} s{steps}"
    return {
        "algorithm": record["algorithm"] + (f", seed {record['seed']}" if _several(comparison) else ""),
        "status": record["status"],
        "value": _pm(record[value], record[f"{value}_se"], 4),
        "difference": "best" if best else _pm(record["difference"], record["difference_se"], 4),
        "mc": _number(record["mc_se"], 2),
        "shift": _number(record["shift_sd"], 2),
        "ratio": _number(record["sd_ratio"], 2),
        "k": _number(record["pareto_k"], 2),
        "cost": seconds,
        "grade": line.grade,
    }


def _number(value: float, digits: int) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}g}".replace("-", "−")


def _pm(value: float, error: float, digits: int) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:.{digits}f} ± {error:.{digits}f}".replace("-", "−")


def _verdict(line: Line) -> dict[str, Any]:
    assert line.fit is not None
    notes = {**line.fit.notes}
    table = None
    if line.summary is not None and len(line.summary):
        table = line.summary.head(40).to_html(float_format=lambda v: f"{v:.3g}", na_rep="–", border=0)
    return {
        "label": line.label,
        "seed": line.seed,
        "grade": line.grade,
        "text": _sentence(line.verdict_text.split(": ", 1)[-1] if line.verdict is not None else line.undiagnosed),
        "message": line.message,
        "settings": line.fit.settings,
        "notes": notes,
        "table": table,
        "hidden": max(0, len(line.summary) - 40) if line.summary is not None else 0,
    }


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _heldout(comparison: Comparison) -> Picture | None:
    ranks = standings(comparison)
    if not ranks:
        return None
    said = "; ".join(f"{s.label} {s.mean:.4f}, {s.difference:+.4f} ± {s.difference_se:.4f}" for s in ranks)
    alt = f"Difference of each algorithm to the best, in nats per row: {said}"
    return picture(3.9, 0.7 + 0.36 * len(ranks), lambda axes: draw_heldout(axes, comparison), alt)


def _curves(comparison: Comparison) -> list[Picture]:
    style = colours(labels_of(comparison))
    pictures = []
    for label, curves in curves_of(comparison).items():
        name, values = next(iter(curves.values()))
        alt = f"{label}: {name.replace('_', ' ')} over {len(values)} steps, from {values[0]:.4g} to {values[-1]:.4g}"
        drawn = picture(3.7, 2.5, _bind(draw_curve, curves, style[label][0]), alt, label)
        pictures.append(drawn)
    return pictures


def _apart(comparison: Comparison, style: Style, shown: list[str]) -> Picture | None:
    """Every fit beside the reference, in the numbers that have a panel of their own; None without a reference."""
    table = frame_of_posteriors(comparison)
    table = table[table["quantity"].isin(shown) & table["shift_sd"].notna()]
    table = table[table["algorithm"] != table["reference"]].drop_duplicates(["algorithm", "quantity"])  # the first seed
    if not len(table):
        return None
    said = "; ".join(
        f"{row['algorithm']}, {row['quantity']}: shift {row['shift_sd']:+.2f}, sd ratio {row['sd_ratio']:.2f}"
        for row in table.to_dict("records")
    )
    lines = table["quantity"].nunique() * (0.14 * table["algorithm"].nunique() + 0.12)
    alt = f"Means and sds of posteriors in sds of {table['reference'].iloc[0]}: {said}"
    return picture(5.6, 0.7 + lines, _bind(draw_apart, table, style), alt)


def _bind(draw: Callable[..., None], *rest: Any) -> Callable[[Any], None]:
    return lambda axes: draw(axes, *rest)


def _densities(fits: dict[str, Fit], style: Style) -> tuple[list[Picture], list[str], list[str]]:
    """Panels, names left out, and reasons why a fit is in none."""
    found: dict[str, Scalar] = {}
    problems = []
    for label, fit in fits.items():
        try:
            for name, draws in global_scalars(fit).items():
                found.setdefault(name, Scalar(name)).draws[label] = draws
        except Exception as error:  # a picture that cannot be drawn must not cost the report
            problems.append(f"{label}: no draws of the global sites ({type(error).__name__}: {error})")
    shown, left = distinct(list(found.values()))
    pictures = []
    for scalar in shown[:PANELS]:
        said = "; ".join(f"{k} mean {v.mean():.4g}, sd {v.std():.2g}" for k, v in scalar.draws.items())
        draw = _bind(draw_density, scalar, style)
        pictures.append(picture(3.7, 1.9, draw, f"Posterior of {scalar.name}: {said}", scalar.name))
    return pictures, [s.name for s in [*left, *shown[PANELS:]]], problems


def _predictive(fits: dict[str, Fit], style: Style) -> tuple[list[Picture], list[str]]:
    pictures, problems = [], []
    for label, fit in fits.items():
        try:
            found = replicates(fit)
        except Exception as error:  # a picture that cannot be drawn must not cost the report
            problems.append(f"{label}: no replicates ({type(error).__name__}: {error})")
            continue
        for shown in found[:2]:
            what = f"{label}, {shown.site}" if len(found) > 1 else label
            mean, again = shown.observed.mean(), shown.drawn.mean()
            alt = (
                f"{what}: {len(shown.observed)} observed rows beside replicates of them; "
                f"observed mean {mean:.4g} and sd {shown.observed.std():.3g}, "
                f"replicated mean {again:.4g} and sd {shown.drawn.std():.3g}"
            )
            draw = _bind(draw_predictive, shown, style[label][0])
            pictures.append(picture(3.7, 2.6, draw, alt, what))
    return pictures, problems
