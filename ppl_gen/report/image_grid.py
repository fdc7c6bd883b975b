"""Rows of data as a grid of small pictures on one pair of axes: images where they are images, else lines or bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ppl_gen.errors import MissingExtraError
from ppl_gen.report.plots import GREY, INK, PALE, _plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_cells", "draw_points", "flattened", "new_axes", "picture_shape", "titled"]

_SQUARE = 25  # columns at least, before a square number of them is taken for an image
_BARS = 12  # columns at most that are drawn as bars
_FINE = 28  # pixels that a cell has at least, so that the lines between cells stay thin
_CELL = 0.5  # inches
_KINDS = 20  # labels at most that get a colour each


def picture_shape(shape: Sequence[int]) -> tuple[int, int, int] | None:
    """Channels, height and width of a row of this shape; None where it is no image.

    >>> picture_shape((64,)), picture_shape((3, 8, 6)), picture_shape((16, 16)), picture_shape((7,))
    ((1, 8, 8), (3, 8, 6), (1, 16, 16), None)
    """
    if len(shape) == 3 and shape[0] in (1, 3):
        return shape[0], shape[1], shape[2]
    if len(shape) == 2 and min(shape) >= 4:
        return 1, shape[0], shape[1]
    side = math.isqrt(math.prod(shape))
    return (1, side, side) if len(shape) == 1 and shape[0] >= _SQUARE and side**2 == shape[0] else None


def draw_cells(
    axes: Axes, cells: Tensor, like: Tensor, *, side: Sequence[str] = (), below: Sequence[str] = (), gap: int = 1
) -> None:
    """A grid of rows, (down, across, *shape of a row); NaN stays empty.

    Args:
        axes: where to draw.
        cells: the rows.
        like: observed rows, whose range is that of shades and heights; 0 to 1 where they lie inside.
        side: a name for each line of the grid.
        below: a name for each column of it.
        gap: width of the lines between images.
    """
    down, across = cells.shape[:2]
    shape = picture_shape(cells.shape[2:])
    low, high = _range(like)
    values = cells.detach().cpu().double().numpy()
    axes.set_facecolor(PALE if shape else "white")
    if shape is not None:
        mosaic = _mosaic(values.reshape(down, across, *shape), gap, empty=low)
        extent = (0.0, float(across), float(down), 0.0)
        if shape[0] == 3:
            axes.imshow(((mosaic - low) / (high - low)).clip(0, 1), extent=extent, interpolation="nearest")
        else:
            axes.imshow(mosaic[..., 0], cmap="gray_r", vmin=low, vmax=high, extent=extent, interpolation="nearest")
        axes.set_aspect(shape[1] / shape[2])
    else:
        _draw_lines(axes, values.reshape(down, across, -1), low, high)
    axes.set_xticks([i + 0.5 for i in range(len(below))], below)
    axes.set_yticks([i + 0.5 for i in range(len(side))], side)
    axes.tick_params(colors=INK, labelsize=8, length=0)
    for edge in axes.spines.values():
        edge.set_visible(False)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)


def _range(like: Tensor) -> tuple[float, float]:
    low, high = float(like.min()), float(like.max())
    if low >= 0 and high <= 1:
        return 0.0, 1.0
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _mosaic(values: np.ndarray, gap: int, empty: float) -> np.ndarray:
    """(down, across, channels, height, width) as one image, NaN between the pictures."""
    down, across, channels, height, width = values.shape
    fine = max(1, _FINE // height)
    height, width = fine * height + gap, fine * width + gap
    whole = np.full((down * height + gap, across * width + gap, channels), np.nan)
    for i in range(down):
        for j in range(across):
            cell = np.nan_to_num(values[i, j], nan=empty).transpose(1, 2, 0).repeat(fine, 0).repeat(fine, 1)
            top, left = gap + i * height, gap + j * width
            whole[top : top + cell.shape[0], left : left + cell.shape[1]] = cell
    return whole


def _draw_lines(axes: Axes, values: np.ndarray, low: float, high: float) -> None:
    """Each row in its cell: bars from zero where it has few columns, else a line."""
    from matplotlib.collections import LineCollection

    down, across, columns = values.shape
    low, high = (min(low, 0.0), max(high, 0.0)) if columns <= _BARS else (low, high)
    places = 0.1 + 0.8 * (np.arange(columns) + 0.5) / columns
    segments, zeros = [], []
    for i in range(down):
        bottom = i + 0.92
        heights = bottom - 0.84 * ((values[i] - low) / (high - low)).clip(-0.08, 1.08)
        zero = bottom - 0.84 * (0.0 - low) / (high - low)
        for j in range(across):
            at = j + places
            if columns <= _BARS:
                segments += [[(x, zero), (x, y)] for x, y in zip(at, heights[j], strict=True)]
                zeros.append([(j + 0.1, zero), (j + 0.9, zero)])
            else:
                segments.append(list(zip(at, heights[j], strict=True)))
    width = max(1.0, 22.0 / columns) if columns <= _BARS else 0.9
    axes.add_collection(LineCollection(segments, colors=INK, linewidths=width, capstyle="butt"))
    grid = [[(0, i), (across, i)] for i in range(down + 1)] + [[(j, 0), (j, down)] for j in range(across + 1)]
    axes.add_collection(LineCollection(zeros, colors=GREY, linewidths=0.5))
    axes.add_collection(LineCollection(grid, colors=PALE, linewidths=0.6, zorder=0))
    axes.set_xlim(0, across)
    axes.set_ylim(down, 0)


def draw_points(axes: Axes, points: np.ndarray, labels: np.ndarray | None) -> None:
    """Points of the plane coloured by labels, or a histogram of numbers: points is rows x 2, or x 1."""
    from matplotlib import colormaps

    _plain(axes)
    kinds = np.unique(labels) if labels is not None else np.empty(0)
    if not 1 <= len(kinds) <= _KINDS:
        kinds = np.empty(0)
    parts = [(str(kind), points[labels == kind]) for kind in kinds] if len(kinds) else [("", points)]
    shades = colormaps["tab10" if len(parts) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    if points.shape[1] == 1:
        edges = np.linspace(points.min(), points.max() + 1e-12, 41).tolist()
        axes.hist([part[:, 0] for _, part in parts], edges, stacked=True, color=list(shades[: len(parts)]))
    elif labels is not None and not len(kinds):
        drawn = axes.scatter(points[:, 0], points[:, 1], s=8, c=labels, linewidths=0)
        axes.figure.colorbar(drawn, ax=axes)
    else:
        for (_, part), shade in zip(parts, shades, strict=False):
            axes.scatter(part[:, 0], part[:, 1], s=8, color=shade, alpha=0.8, linewidths=0)
    if len(parts) > 1:
        from matplotlib.lines import Line2D

        marks = [Line2D([], [], marker="o", linestyle="", color=shade, markersize=4) for shade in shades[: len(parts)]]
        axes.legend(
            marks, [name for name, _ in parts], fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5)
        )


def flattened(codes: np.ndarray, method: str, seed: int) -> np.ndarray:
    """Codes (rows x numbers) as rows x 2, or x 1 where they have one number."""
    if method == "first" or codes.shape[1] == 1:
        return codes[:, :2]
    if method == "pca":
        centred = codes - codes.mean(0)
        return np.asarray(centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T)
    if len(codes) < 5:
        raise ValueError(f"method: t-SNE needs at least 5 rows, got {len(codes)}; use 'pca' or 'first'")
    try:
        from sklearn.manifold import TSNE
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "method='tsne' takes t-SNE from scikit-learn: `pip install \"ppl_gen[sklearn]\"`; 'pca' and 'first' need "
            "nothing more"
        ) from error
    made = TSNE(perplexity=min(30.0, (len(codes) - 1) / 3), init="pca", random_state=seed)
    return np.asarray(made.fit_transform(codes.astype(np.float32)))


def new_axes(down: int, across: int) -> Axes:
    """Axes of a figure of its own, made without pyplot, for a grid of so many cells."""
    from matplotlib.figure import Figure

    scale = min(1.0, 16 / max(down, across))
    width, height = across * _CELL * scale + 1.0, down * _CELL * scale + 0.7
    return Figure(figsize=(max(3.2, width), height), layout="constrained").add_subplot()


def titled(axes: Axes, title: str) -> Figure:
    """The whole figure around the axes, which get a title."""
    from matplotlib.figure import Figure as Whole

    axes.set_title(title, fontsize=9, loc="left", color=INK)
    found = axes.figure  # a part of a figure, where the caller divided it
    while not isinstance(found, Whole):
        assert found is not None
        found = found.figure
    return found
