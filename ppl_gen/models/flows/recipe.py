"""The programs around flows: rows with a density, and pixels, which are integers that a density is laid under."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from ppl_gen.data.atoms import MUCH, atoms, spoken
from ppl_gen.data.inputs import check_width, entries, row_shape, row_width
from ppl_gen.errors import require_number, require_whole
from ppl_gen.models.flows.base import Base, Flow, Layer
from ppl_gen.nn.pixels import Dequantised, Quantised
from ppl_gen.program.program import Program, Recipe

__all__ = ["Pixels", "check_convolutions", "checked_sizes", "flow_recipe", "image_shape"]

_SHADES = 255  # of bytes: images that hold nothing else are pixels
_FEW = 1e-3  # of a level: what float32 leaves of k / 4095
_MOST = 4096  # levels that float32 tells apart, with room between them
_LOOK = 10_000  # images that units are computed from: all numbers of a channel share them
_REPEATS = 4  # times that values are there on average, in images of pixels: real numbers hardly ever come again
_BEGIN = 1000  # rows that go through a flow whose layers start from data


@dataclass(frozen=True)
class Pixels:
    """Rows that hold ``levels`` evenly spaced values from 0 to 1, and the margin of the logit of their densities.

    Args:
        levels: how many; None: rows are real numbers.
        margin: see `Flow`; None: no logit.

    Raises:
        ValueError: for less than 2 levels or more than 4096, or a margin that is not between 0 and 0.5.
    """

    levels: int | None = None
    margin: float | None = None

    def __post_init__(self) -> None:
        if self.levels is not None:
            require_whole("levels", self.levels, 2, _MOST)
        if self.margin is not None:
            require_number("margin", self.margin, 0.0, 0.5, "a number between 0 and 0.5")
            if not self.margin:
                raise ValueError(f"margin: expected a number between 0 and 0.5, got {self.margin!r}")

    def middles(self, rows: Tensor, name: str) -> Tensor:
        """The middle of the interval of each pixel, of at most 10000 rows; real numbers as they are.

        Raises:
            ValueError: for other values than those of the levels, and for images of bytes where no levels were given.
        """
        if self.levels is None:
            if rows.dim() == 4:
                _refuse_levels(rows, name)
            return rows.double()
        rows = rows if rows.is_floating_point() else rows.double()
        if _off(rows, self.levels - 1) >= _FEW:
            raise ValueError(
                f"levels: expected rows of 0, 1/{self.levels - 1}, ..., 1 (bytes are divided by 255), got values from "
                f"{float(rows.min()):g} to {float(rows.max()):g}, some between the levels"
            )
        rows = _some(rows, _LOOK).double()
        return ((rows * (self.levels - 1)).round() + 0.5) / self.levels


def _refuse_levels(rows: Tensor, name: str) -> None:
    """Raise ValueError for images that hold nothing but a few evenly spaced values."""
    if _off(rows.double(), _SHADES) < _FEW:
        raise ValueError(
            f"data: these images hold nothing but 0, 1/{_SHADES}, ..., 1, and no density of {name} is bounded "
            "at such values; say levels=256 (zeros and ones: levels=2), and they are read as pixels"
        )
    some = _some(rows, _BEGIN).double()
    values = some.unique()
    if len(values) < 2 or len(values) > min(_MOST, some.numel() // _REPEATS):
        return
    low, high = float(values[0]), float(values[-1])
    steps = round((high - low) / float(values.diff().min()))
    if steps < _MOST and _off((values - low) / (high - low), steps) < _FEW:
        scaled = "x" if (low, high) == (0.0, 1.0) else f"(x - {low:g}) / {high - low:g}"
        raise ValueError(
            f"data: these images hold nothing but evenly spaced values from {low:g} to {high:g}, and no density of "
            f"{name} is bounded at such values; pass {scaled} and say how many values pixels have (levels={steps + 1}, "
            "or more where the data do not hold all), and they are read as pixels"
        )


def _off(rows: Tensor, steps: int) -> float:
    """How far rows are from whole multiples of 1/steps in [0, 1], in steps; infinite beyond."""
    if float(rows.min()) < 0 or float(rows.max()) > 1:
        return float("inf")
    return max(float((part * steps - (part * steps).round()).abs().max()) for part in rows.split(1000))


def _some(rows: Tensor, most: int) -> Tensor:
    """At most so many rows, from all over the data."""
    return rows[:: -(-len(rows) // most)]


def flow_recipe(
    name: str,
    features: int | Sequence[int] | None,
    layers: Callable[[Any], Sequence[Layer]],
    arguments: Mapping[str, Any],
    *,
    base: Base | None = None,
    single: bool = False,
    images: bool = False,
    pixels: Pixels = Pixels(),
    begin: bool = False,
    bounded: bool = False,
) -> Recipe:
    """The recipe of a flow: ``layers`` is called once per fit, after the data have been looked at.

    Args:
        name: of the recipe.
        features: columns of the data, or the shape of an image; None: as the data are.
        layers: makes the layers, from the rows to the codes, for a number of columns or the shape of an image.
        arguments: for the recipe's repr.
        base: see `Flow`.
        single: data of N numbers, without columns, are taken too.
        images: rows of channels x height x width are taken too.
        pixels: what rows of integers are.
        begin: pass some rows through the flow once, for layers that start from data.
        bounded: no density of the flow grows without bound at a value that many rows share.
    """

    def build(data: Any) -> Program:
        size = _size(features, data, name, images)
        rows = pixels.middles(_rows(data, name, size, single), name)
        _refuse_constant(rows, pixels)
        notes = {} if bounded or pixels.levels is not None else _repeated(rows, name)
        together = pixels.levels is not None and not isinstance(size, tuple)
        margin = None if pixels.levels is None else pixels.margin
        flow = Flow(layers(size), rows, base, margin=margin, together=together)
        if begin:
            with torch.no_grad():
                flow.to_code(_some(rows, _BEGIN))
        return _with_density(flow, name, notes) if pixels.levels is None else _of_pixels(flow, name, pixels.levels)

    return Recipe(build, name=name, arguments=arguments)


def _repeated(rows: Tensor, name: str) -> dict[str, str]:
    """A note on values that a few rows share.

    Raises:
        ValueError: where many do: a density that is fitted to them grows without bound there, and says nothing.
    """
    found = atoms(rows)
    if not found:
        return {}
    said = spoken(found, rows.shape[1:])
    if max(atom.share for atom in found) >= MUCH:
        raise ValueError(
            f"data: {said}: no density of {name} is bounded at a value that rows share. Leave it out, model by itself "
            "whether a row holds it and fit the others, add the noise that rounding took away, or say levels= where "
            "all values are evenly spaced levels"
        )
    return {"repeated values": f"{said}: the density may grow without bound there, and the evidence with it"}


def _with_density(flow: Flow, name: str, notes: Mapping[str, str]) -> Program:
    def model(x: Tensor) -> None:
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            pyro.sample("x", flow.rows(), obs=x.to(flow.loc))

    return Program(model, name=name, evidence=flow.log_prob, notes=notes)


def _of_pixels(flow: Flow, name: str, levels: int) -> Program:
    """p(x) = integral of p(v) over the interval of each pixel, v drawn evenly in it by the guide."""
    event = len(flow.shape)

    def model(x: Tensor) -> None:
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            v = pyro.sample("dequantised", flow.rows())
            pyro.sample("x", Quantised(v, levels).to_event(event), obs=x.to(flow.loc))

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("dequantised", Dequantised(x.to(flow.loc), levels).to_event(event))

    return Program(model, guide, name=name)


def _size(features: Any, data: Any, name: str, images: bool) -> int | tuple[int, ...]:
    """Columns, or the shape of an image."""
    if features is None and images:
        shape = row_shape(data, name)
        return shape if len(shape) == 3 else row_width(None, data, name)
    return features if isinstance(features, tuple) else row_width(features, data, name)


def _rows(data: Any, name: str, size: int | tuple[int, ...], single: bool) -> Tensor:
    (rows,) = entries(data, name, "x")
    assert rows is not None  # the first entry
    shape = size if isinstance(size, tuple) else (size,)
    if not (single and rows.dim() == 1) and tuple(rows.shape[1:]) != shape:
        if isinstance(size, tuple):
            wanted = f"images of shape {size}"
        else:
            wanted = "single numbers (N, or N x 1)" if single else f"rows of {size} columns"
        hint = "; images are rows x channels x height x width" if rows.dim() == 3 else ""
        if rows.dim() == 4 and not isinstance(size, tuple):
            hint = "; x.flatten(1) lays out each image as a row"
        raise ValueError(f"data: {name} takes {wanted}, got shape {tuple(rows.shape)}{hint}")
    return rows


def _refuse_constant(rows: Tensor, pixels: Pixels) -> None:
    """Raise ValueError for numbers without spread: of real numbers each column, channel and pixel needs some."""
    if pixels.levels is not None:
        if bool((rows == rows.flatten()[0]).all()):
            raise ValueError("data: all pixels have the same value")
        return
    image = rows.dim() == 4
    columns = rows.transpose(0, 1).flatten(1).T if image else rows.reshape(len(rows), -1)
    constant = (columns == columns[:1]).all(0) | (columns.std(0, correction=0).to(torch.get_default_dtype()) == 0)
    if bool(constant.any()):
        which = ", ".join(map(str, constant.nonzero().squeeze(-1).tolist()))
        what = "channel(s)" if image else "column(s)"
        raise ValueError(f"data: {what} {which} are constant: no density exists in that direction; leave them out")
    still = (rows == rows[:1]).all(0) if image else rows.new_zeros(1, dtype=torch.bool)
    if bool(still.any()):
        first = tuple(still.nonzero()[0].tolist())
        raise ValueError(
            f"data: {int(still.sum())} pixel(s) have the same value in all images, the first at channel, line and "
            f"column {first}: no density exists in that direction; crop the images, or say levels= where they hold a "
            "few evenly spaced values"
        )


def checked_sizes(features: Any, layers: int, hidden: Sequence[int], *, smallest: int = 1) -> tuple[int, ...]:
    """The hidden widths as a tuple, once all sizes that are known have been looked at.

    Raises:
        ValueError: naming the size that is out of its range.
    """
    check_width("features", features)
    if features is not None and features < 2:
        raise ValueError("features: one column depends on no other; take scalar_flow() or affine_flow(1)")
    require_whole("layers", layers)
    widths = tuple(hidden) if isinstance(hidden, Sequence) else (hidden,)
    if not widths:
        raise ValueError("hidden: expected the width of at least one layer, got none")
    for width in widths:
        require_whole("hidden", width)
        if width < smallest:
            raise ValueError(f"hidden: expected widths of at least {smallest} (one for each column), got {width}")
    return widths


def image_shape(features: Any) -> tuple[int, ...] | None:
    """The shape of an image where one is given: channels, height, width; None for a number of columns, or None.

    Raises:
        ValueError: for a sequence of anything but three whole numbers.
    """
    if not isinstance(features, Sequence) or isinstance(features, str):
        return None
    if len(features) != 3:
        raise ValueError(f"features: expected a number of columns or (channels, height, width), got {features!r}")
    for size in features:
        require_whole("features", size)
    return tuple(map(int, features))


def check_convolutions(channels: int, blocks: int, scales: int | None) -> None:
    """Raise ValueError for sizes of the layers of images that are out of their range."""
    require_whole("channels", channels)
    require_whole("blocks", blocks, 0)
    if scales is not None:
        require_whole("scales", scales)
