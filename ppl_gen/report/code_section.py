"""The section of the report on codes: what each algorithm's codes keep of a row, and what is drawn from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ppl_gen.diagnostics.units import active_units, code_site
from ppl_gen.errors import IncompatibleError
from ppl_gen.report.figures import Picture, picture
from ppl_gen.report.image_grid import draw_cells, picture_shape
from ppl_gen.report.latents import plot_codes, plot_manifold, plot_samples, plot_traversal
from ppl_gen.report.reconstruct import pictured, reconstructed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ppl_gen.data.batching import Dataset
    from ppl_gen.fits.result import Fit

__all__ = ["Group", "coded"]

ROWS = 500  # that codes are computed of
ACROSS = 8  # rows that are reconstructed
TSNE = 50  # rows at least
WIDTH = 3.7  # inches


@dataclass
class Group:
    """Pictures of one kind, one for each algorithm."""

    title: str
    note: str
    pictures: list[Picture] = field(default_factory=list)


@dataclass(frozen=True)
class _Coded:
    """One fit with codes, and the rows that it is shown on."""

    label: str
    fit: Fit
    rows: Dataset
    site: str
    labels: np.ndarray | None

    @property
    def size(self) -> int:
        return torch.Size(self.fit.info.sites[self.site].event_shape).numel()


def coded(fits: Mapping[str, Fit], test_rows: Any, *, in_sample: bool) -> tuple[list[Group], list[str], list[str]]:
    """Groups of pictures, a sentence on the active units of each fit, and why some are not drawn.

    All are empty where no fit has codes. A chain of noisy copies of the rows (`denoising_diffusion`) is no code.
    """
    shown, problems = [], []
    for label, fit in fits.items():
        try:
            one = _with_codes(label, fit, test_rows)
        except Exception as error:  # a picture that cannot be drawn must not cost the report
            problems.append(f"{label}: {type(error).__name__}: {error}")
            continue
        if one is not None:
            shown.append(one)
    if not shown:
        return [], [], []
    drawn = {one.label for one in shown} | {text.split(":")[0] for text in problems}
    problems += [
        f"{label}: no codes, since no latents that follow the rows were learned" for label in fits if label not in drawn
    ]
    groups = [_reconstructions(shown, in_sample, problems)]
    for title, note, draw in _KINDS:
        group = Group(title, note)
        for one in shown:
            panel = _tried(draw, one, title, problems)
            if panel is not None:
                group.pictures.append(panel)
        groups.append(group)
    return [group for group in groups if group.pictures], _units(shown, problems), problems


def _with_codes(label: str, fit: Fit, test_rows: Any) -> _Coded | None:
    if fit.program.time_steps is not None:
        return None
    try:
        site = code_site(fit)
        pictured(fit)
    except IncompatibleError:
        return None
    rows = fit.data if test_rows is None else fit.dataset(test_rows)
    labels = _labels(test_rows, rows.rows)
    if rows.rows is not None and rows.rows > ROWS:
        rows, labels = rows.subset(torch.arange(ROWS)), None if labels is None else labels[:ROWS]
    return _Coded(label, fit, rows, site, labels)


def _labels(test_rows: Any, rows: int | None) -> np.ndarray | None:
    """The entry that looks like labels: one whole number for each row, of 2 to 20 different ones."""
    for value in test_rows.values() if isinstance(test_rows, Mapping) else ():
        if isinstance(value, Tensor | np.ndarray) and value.ndim == 1 and len(value) == rows:
            found = np.asarray(value.cpu() if isinstance(value, Tensor) else value)
            if found.dtype.kind in "iu" and 2 <= len(np.unique(found)) <= 20:
                return found
    return None


def _tried(draw: Callable[[_Coded], Picture | None], one: _Coded, title: str, problems: list[str]) -> Picture | None:
    try:
        return draw(one)
    except IncompatibleError as error:
        problems.append(f"{one.label}, {title.lower()}: {error}")
    except Exception as error:  # a picture that cannot be drawn must not cost the report
        problems.append(f"{one.label}, {title.lower()}: {type(error).__name__}: {error}")
    return None


def _reconstructions(shown: list[_Coded], in_sample: bool, problems: list[str]) -> Group:
    """All algorithms in one picture, under the rows themselves."""
    which = "Rows" if in_sample else "Held-out rows"
    group = Group(f"{which} and their reconstructions", "Each row, and below it what is expected given its own code.")
    drawn: list[tuple[str, Tensor, Tensor]] = []
    for one in shown:
        try:
            drawn.append((one.label, *reconstructed(one.fit, one.rows, ACROSS)))
        except Exception as error:  # a picture that cannot be drawn must not cost the report
            problems.append(f"{one.label}, reconstructions: {type(error).__name__}: {error}")
    if drawn:
        rows = drawn[0][1].to(drawn[0][2])
        cells = torch.stack([rows, *(again.to(rows) for _, _, again in drawn)])
        errors = (
            f"{label}, mean squared error {float((again - rows).square().mean()):.3g}" for label, _, again in drawn
        )
        alt = f"{len(rows)} rows and their reconstructions by {'; '.join(errors)}"
        height = 0.15 + _cell_height(rows, len(rows)) * len(cells)
        draw = _cells(cells, rows, ["rows", *(_short(label) for label, _, _ in drawn)])
        group.pictures.append(picture(1.25 * WIDTH, 1.25 * height, draw, alt, pixels=True))
    return group


def _cells(cells: Tensor, like: Tensor, side: list[str]) -> Callable[[Axes], None]:
    return lambda axes: draw_cells(axes, cells, like, side=side)


def _short(label: str) -> str:
    return label if len(label) <= 14 else label[:13] + "\N{HORIZONTAL ELLIPSIS}"


def _cell_height(rows: Tensor, across: int) -> float:
    shape = picture_shape(rows.shape[1:])
    width = (WIDTH - 0.7) / across
    return 0.45 if shape is None else width * shape[1] / shape[2]


def _plain(one: _Coded, plot: Callable[..., Any], alt: str, height: float, **options: Any) -> Picture:
    """A panel without a title of its own: the caption of the page says it."""

    def draw(axes: Axes) -> None:
        plot(one.fit, axes=axes, **options)
        axes.set_title("", loc="left")

    return picture(WIDTH, height, draw, alt, one.label, pixels=True)


def _samples(one: _Coded) -> Picture:
    return _plain(one, plot_samples, f"{one.label}: 64 new rows in a grid", WIDTH, n=64)


def _traversal(one: _Coded) -> Picture:
    found = active_units(one.fit, one.rows, site=one.site)
    units = [
        int(u) for u in found.variance.flatten().argsort(descending=True)[: min(8, max(1, int(found.active.sum())))]
    ]
    alt = f"{one.label}: the first row as units {', '.join(map(str, units))} of its code go from -3 to 3"
    first = one.rows.subset(torch.tensor([0]))
    seen = reconstructed(one.fit, first, 1)[0]
    height = 0.35 + _cell_height(seen, 9) * len(units)
    return _plain(one, plot_traversal, alt, height, row=first, units=units, site=one.site)


def _manifold(one: _Coded) -> Picture | None:
    if one.size != 2:
        return None
    alt = f"{one.label}: rows expected at a grid of 12 x 12 codes"
    return _plain(one, plot_manifold, alt, WIDTH, n=12, site=one.site)


def _points(one: _Coded) -> Picture:
    rows = one.rows.rows or 0
    tsne = one.size > 2 and rows >= TSNE and find_spec("sklearn") is not None
    method = "tsne" if tsne else "first" if one.size <= 2 else "pca"
    how = {"tsne": "t-SNE of the codes", "first": "the codes as they are", "pca": "principal directions of the codes"}
    alt = f"{one.label}: {how[method]} of {rows} rows" + ("" if one.labels is None else ", coloured by label")
    made = _plain(one, plot_codes, alt, 0.8 * WIDTH, data=one.rows, labels=one.labels, method=method, site=one.site)
    return Picture(made.source, made.alt, f"{one.label}: {how[method]}", made.width)


_KINDS: tuple[tuple[str, str, Callable[[_Coded], Picture | None]], ...] = (
    ("Samples", "Means of new rows, their latents drawn from the program.", _samples),
    (
        "Traversals",
        "The first of the rows above as one unit of its code at a time, most active first, goes from -3 to 3.",
        _traversal,
    ),
    ("Manifolds", "What is expected at a grid of quantiles of the prior of the code.", _manifold),
    (
        "Codes",
        "Mean codes of the rows. t-SNE keeps neighbours together; distances between groups mean nothing.",
        _points,
    ),
)


def _units(shown: list[_Coded], problems: list[str]) -> list[str]:
    said = []
    for one in shown:
        try:
            found = active_units(one.fit, one.rows, site=one.site)
        except Exception as error:  # a number that cannot be had must not cost the report
            problems.append(f"{one.label}, active units: {type(error).__name__}: {error}")
            continue
        said.append(f"{one.label}: {int(found.active.sum())} of {found.active.numel()} units of {one.site} active")
    return said
