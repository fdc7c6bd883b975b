"""Pictures of a comparison, drawn on matplotlib axes without pyplot, so that the user's backend is left alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ppl_gen.report.draws import Replicates, Scalar, curve_of
from ppl_gen.report.table import labels_of, standings

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ppl_gen.comparison.compare import Comparison

__all__ = [
    "colours",
    "curves_of",
    "draw_apart",
    "draw_curve",
    "draw_density",
    "draw_heldout",
    "draw_predictive",
    "overview",
]

# Okabe and Ito's palette: distinguishable with every common form of colour blindness.
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#8C564B")
_STROKES = ("-", "--", "-.", ":")
INK, GREY, PALE = "#1f2933", "#7b8794", "#d3d9e0"
POINTS = 800  # of a curve: more than a panel has pixels


def colours(labels: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and stroke by label; the stroke tells them apart in print.

    >>> colours(["EM", "SVI"])
    {'EM': ('#0072B2', '-'), 'SVI': ('#D55E00', '--')}
    """
    return {n: (_PALETTE[i % len(_PALETTE)], _STROKES[i % len(_STROKES)]) for i, n in enumerate(labels)}


def overview(comparison: Comparison) -> Figure:
    """See `Comparison.plot`."""
    from matplotlib.figure import Figure

    style = colours(labels_of(comparison))
    curves = curves_of(comparison)
    columns = min(3, max(1, len(curves)))
    rows = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(3.4 * columns + 1.0, 0.9 + 0.42 * len(style) + 2.3 * rows), layout="constrained")
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[0.9 + 0.42 * len(style), *[2.3] * rows])
    draw_heldout(figure.add_subplot(grid[0, :]), comparison)
    for i, (label, curve) in enumerate(curves.items()):
        axes = figure.add_subplot(grid[1 + i // columns, i % columns])
        draw_curve(axes, curve, style[label][0])
        axes.set_title(label, fontsize=9, loc="left", color=INK)
    return figure


def curves_of(comparison: Comparison) -> dict[str, dict[int, tuple[str, np.ndarray]]]:
    """Label -> seed -> name and values, for the fits that recorded more than one step."""
    found: dict[str, dict[int, tuple[str, np.ndarray]]] = {}
    for line in comparison.lines:
        name, values = ("", np.empty(0)) if line.fit is None else curve_of(line.fit)
        if len(values) > 1:
            found.setdefault(line.label, {})[line.seed] = (name, values)
    return found


def draw_heldout(axes: Axes, comparison: Comparison) -> None:
    """Differences to the best algorithm with two paired standard errors; zero is as good as the best."""
    ranks = standings(comparison)[::-1]
    style = colours(labels_of(comparison))
    _plain(axes, grid="x")
    axes.axvline(0.0, color=GREY, linewidth=1, zorder=1)
    for y, s in enumerate(ranks):
        colour = style[s.label][0]
        error = 0.0 if math.isnan(s.difference_se) else 2 * s.difference_se
        axes.errorbar(s.difference, y, xerr=error, fmt="o", color=colour, capsize=3, markersize=6, linewidth=1.6)
    axes.set_yticks(range(len(ranks)), [_short(s.label) for s in ranks])
    axes.set_ylim(-0.6, max(len(ranks), 1) - 0.4)
    where = "in-sample row" if comparison.in_sample else "held-out row"
    axes.set_xlabel(f"nats per {where}, difference from best", fontsize=8)
    if not ranks:
        axes.text(0.5, 0.5, "no value to compare", transform=axes.transAxes, ha="center", color=GREY)
    axes.margins(x=0.08)
    axes.locator_params(axis="x", nbins=5)  # numbers such as -0.125 are wide, and the picture is narrow


def _short(label: str) -> str:
    return label if len(label) <= 20 else label[:19] + "\N{HORIZONTAL ELLIPSIS}"


def draw_curve(axes: Axes, curves: Mapping[int, tuple[str, np.ndarray]], colour: str) -> None:
    """What each step recorded, one line per seed; the first steps may leave the frame so that the rest can be seen."""
    _plain(axes, grid="y")
    everything = []
    for _, values in curves.values():
        steps = np.arange(1, len(values) + 1)
        keep = np.unique(np.linspace(0, len(values) - 1, min(len(values), POINTS)).round().astype(int))
        axes.plot(steps[keep], values[keep], color=colour, linewidth=1.2, alpha=0.9 if len(curves) == 1 else 0.6)
        everything.append(values[np.isfinite(values)])
    finite = np.concatenate(everything) if everything else np.empty(0)
    if len(finite) > 4:
        low, high = np.quantile(finite, [0.02, 0.98])
        point_value = np.quantile(finite[-max(2, len(finite) // 2) :], [0.0, 1.0])
        low, high = min(low, point_value[0]), max(high, point_value[1])
        if high > low:
            axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
    axes.ticklabel_format(axis="y", useOffset=False)
    name = next((name for name, _ in curves.values() if name), "")
    axes.set_ylabel(name.replace("_", " ") + (" per row" if name.endswith("loss") else ", nats"), fontsize=8)
    axes.set_xlabel("step", fontsize=8)


def draw_density(axes: Axes, scalar: Scalar, style: Mapping[str, tuple[str, str]]) -> None:
    """Densities of the draws by label; a point estimate is a vertical line. The frame holds the middle 99.8 %."""
    _plain(axes)
    edges = [np.quantile(v, [0.001, 0.999]) for v in scalar.draws.values()]
    low, high = min(e[0] for e in edges), max(e[1] for e in edges)
    room = 0.08 * (high - low) or max(abs(low), 1.0) * 0.05
    for label, values in scalar.draws.items():
        colour, stroke = style[label]
        if len(values) == 1 or float(np.ptp(values)) < 1e-9 * max(1.0, abs(float(values[0]))):
            axes.axvline(float(values[0]), color=colour, linestyle=stroke, linewidth=1.6, label=label)
            continue
        where, density = smoothed(values)
        axes.plot(where, density, color=colour, linestyle=stroke, linewidth=2.0 if stroke == ":" else 1.6, label=label)
        axes.fill_between(where, density, color=colour, alpha=0.10, linewidth=0)
    axes.set_xlim(low - room, high + room)
    axes.set_ylim(bottom=0.0)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)


def draw_apart(axes: Axes, table: pandas.DataFrame, style: Mapping[str, tuple[str, str]]) -> None:
    """Mean and sd of every number and label in units of the reference's sd, which is the grey band around zero."""
    _plain(axes, grid="x")
    axes.axvspan(-1.0, 1.0, color=PALE, linewidth=0, zorder=0)
    axes.axvline(0.0, color=GREY, linewidth=1, zorder=1)
    names = list(dict.fromkeys(table["quantity"]))
    labels = list(dict.fromkeys(table["algorithm"]))
    for row in table.to_dict("records"):
        at = names.index(row["quantity"]) + 0.7 * ((labels.index(row["algorithm"]) + 0.5) / len(labels) - 0.5)
        colour, stroke = style[row["algorithm"]]
        axes.plot(
            [row["shift_sd"] - row["sd_ratio"], row["shift_sd"] + row["sd_ratio"]],
            [at, at],
            color=colour,
            linestyle=stroke,
            linewidth=1.6,
        )
        axes.plot(row["shift_sd"], at, "o", color=colour, markersize=4)
    axes.set_yticks(range(len(names)), [_short(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    reach = max(1.5, min(8.0, 1.1 * float((table["shift_sd"].abs() + table["sd_ratio"]).max())))
    axes.set_xlim(-reach, reach)
    axes.set_xlabel("mean ± sd, in sds of the reference", fontsize=8)


def smoothed(values: np.ndarray, points: int = 160) -> tuple[np.ndarray, np.ndarray]:
    """A Gaussian kernel density with Silverman's width, reflected at the extremes so that bounds keep their mass.

    >>> where, density = smoothed(np.random.default_rng(0).uniform(size=2000))
    >>> bool(abs(density.mean() * np.ptp(where) - 1.0) < 0.02), bool(density.min() > 0.7)
    (True, True)
    """
    low, high = float(values.min()), float(values.max())
    spread = min(float(values.std()), float(np.subtract(*np.quantile(values, [0.75, 0.25]))) / 1.349 or math.inf)
    width = 0.9 * spread * len(values) ** -0.2
    where = np.linspace(low, high, points)
    doubled = np.concatenate([values, 2 * low - values, 2 * high - values])
    kernel = np.exp(-0.5 * ((where[:, None] - doubled) / width) ** 2)
    return where, kernel.sum(1) / (len(values) * width * math.sqrt(2 * math.pi))


def draw_predictive(axes: Axes, shown: Replicates, colour: str) -> None:
    """Observed rows in grey, replicates in colour: over an input, as counts, or as points in the plane."""
    _plain(axes)
    if shown.given is not None and shown.observed.shape[1] == 1:
        _draw_regression(axes, shown, colour)
    elif shown.observed.shape[1] == 1:
        _draw_counts(axes, shown, colour)
    else:
        _draw_plane(axes, shown, colour)


def _draw_counts(axes: Axes, shown: Replicates, colour: str) -> None:
    observed, drawn = shown.observed[:, 0], shown.drawn[:, :, 0]
    edges = bins(observed)
    counts = np.stack([np.histogram(row, edges)[0] for row in drawn])
    middle = (edges[:-1] + edges[1:]) / 2
    axes.stairs(np.histogram(observed, edges)[0], edges, fill=True, color=PALE, label="observed")
    axes.fill_between(middle, *np.quantile(counts, [0.05, 0.95], axis=0), color=colour, alpha=0.25, linewidth=0)
    axes.plot(middle, counts.mean(0), color=colour, linewidth=1.6, label="replicates")
    axes.set_xlabel(shown.site, fontsize=8)
    axes.set_ylabel("rows", fontsize=8)


def bins(values: np.ndarray) -> np.ndarray:
    """Edges of a histogram; values on a lattice (counts, classes) get a bin each, so that no comb appears.

    >>> bins(np.array([0.0, 1.0, 1.0, 3.0])).tolist()
    [-0.5, 0.5, 1.5, 2.5, 3.5]
    """
    seen = np.unique(values)
    if 2 <= len(seen) <= 80:
        step = float(np.diff(seen).min())
        places = (seen - seen[0]) / step
        if places[-1] <= 200 and np.allclose(places, places.round(), atol=1e-3):
            return np.asarray(seen[0] + step * (np.arange(round(float(places[-1])) + 2) - 0.5))
    return np.linspace(float(values.min()), float(values.max()) + 1e-12, min(40, 5 + int(math.sqrt(len(values)))))


def _draw_regression(axes: Axes, shown: Replicates, colour: str) -> None:
    assert shown.given is not None
    name, at = shown.given
    order = np.argsort(at)
    low, high = np.quantile(shown.drawn[:, order, 0], [0.05, 0.95], axis=0)
    axes.scatter(at, shown.observed[:, 0], s=6, color=GREY, linewidths=0, label="observed", rasterized=True)
    axes.fill_between(at[order], low, high, color=colour, alpha=0.25, linewidth=0)
    axes.plot(at[order], shown.drawn[:, order, 0].mean(0), color=colour, linewidth=1.6, label="replicates")
    axes.set_xlabel(name, fontsize=8)
    axes.set_ylabel(shown.site, fontsize=8)


def _draw_plane(axes: Axes, shown: Replicates, colour: str) -> None:
    """Two columns as they are; more of them along the two directions in which the observed rows vary most."""
    observed, drawn = shown.observed, shown.drawn[-1]
    names = [f"{shown.site}[{i}]" for i in range(2)]
    if observed.shape[1] > 2:
        centre = observed.mean(0)
        axis = np.linalg.svd(observed - centre, full_matrices=False)[2][:2]
        observed, drawn = (observed - centre) @ axis.T, (drawn - centre) @ axis.T
        names = [f"{shown.site}, principal direction {i + 1}" for i in range(2)]
    axes.scatter(
        observed[:, 0], observed[:, 1], s=5, color=GREY, alpha=0.6, linewidths=0, label="observed", rasterized=True
    )
    axes.scatter(
        drawn[:, 0], drawn[:, 1], s=5, color=colour, alpha=0.6, linewidths=0, label="one replicate", rasterized=True
    )
    room = 0.15 * np.ptp(observed, axis=0)
    axes.set_xlim(observed[:, 0].min() - room[0], observed[:, 0].max() + room[0])
    axes.set_ylim(observed[:, 1].min() - room[1], observed[:, 1].max() + room[1])
    axes.set_xlabel(names[0], fontsize=8)
    axes.set_ylabel(names[1], fontsize=8)


def _plain(axes: Axes, grid: str = "") -> None:
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(PALE)
    axes.tick_params(colors=INK, labelsize=8, color=PALE)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    if grid:
        axes.grid(True, axis=grid, color="#eef1f4", linewidth=0.8)  # type: ignore[arg-type]
