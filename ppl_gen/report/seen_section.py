"""The section of the report on networks that read images: filters, activation maps, what an output depends on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ppl_gen.errors import PROGRAM_ERRORS, MissingExtraError
from ppl_gen.looking import activation_maps, filters, saliency
from ppl_gen.looking.asking import as_rows, evaluating, layers_of, scores
from ppl_gen.report.code_section import WIDTH, Group
from ppl_gen.report.figures import Picture, picture
from ppl_gen.report.image_grid import draw_cells, picture_shape

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ppl_gen.fits.result import Fit

__all__ = ["seen"]

ROWS = 8  # images that are shown
CHANNELS = 7  # of a layer, beside the image
FILTERS = 32  # at most


@dataclass(frozen=True)
class _Reader:
    """One network that reads images, and the images it is shown with."""

    label: str
    network: nn.Module
    x: Tensor

    @property
    def images(self) -> Tensor:
        shape = picture_shape(self.x.shape[1:])
        assert shape is not None  # else it would not be here
        return self.x.reshape(-1, *shape).cpu()

    @property
    def layer(self) -> str | None:
        """Of the first convolution; None where a linear layer reads the pixels."""
        return next(iter(layers_of(self.network, (nn.Conv2d,))), None)


def seen(fits: Mapping[str, Fit], test_rows: Any) -> tuple[list[Group], list[str]]:
    """Groups of pictures, one for each network that reads images, and why some are not drawn; empty without any."""
    problems: list[str] = []
    readers = [reader for label, fit in fits.items() for reader in _readers(label, fit, test_rows, problems)]
    groups = []
    for title, note, draw in _KINDS:
        group = Group(title, note)
        for reader in readers:
            try:
                panel = draw(reader)
            except MissingExtraError as error:
                panel, text = None, f"{title}: {error}"
                problems += [] if text in problems else [text]
            except Exception as error:  # a picture that cannot be drawn must not cost the report
                panel = None
                problems.append(f"{reader.label}, {title.lower()}: {type(error).__name__}: {error}")
            if panel is not None:
                group.pictures.append(panel)
        groups.append(group)
    return [group for group in groups if group.pictures], problems if readers else []


def _readers(label: str, fit: Fit, test_rows: Any, problems: list[str]) -> Iterator[_Reader]:
    names = [*fit.module_names, *fit.extra_modules]
    if not names:
        return
    try:
        x = _images(fit, test_rows)
    except Exception as error:  # rows that cannot be read must not cost the report
        problems.append(f"{label}: {type(error).__name__}: {error}")
        return
    for name in names if x is not None else []:
        network = fit.module(name)
        rows = _read(network, x)
        if rows is not None:
            yield _Reader(label if len(names) == 1 else f"{label}, {name}", network, rows)


def _images(fit: Fit, test_rows: Any) -> Tensor | None:
    """The first entry of the first rows, where these are images."""
    batch = (fit.data if test_rows is None else fit.dataset(test_rows)).glimpse()
    given = [*batch.args, *batch.kwargs.values()]
    rows = next((value for value in given if isinstance(value, Tensor) and value.dim() > 1), None)
    if rows is None or picture_shape(rows.shape[1:]) is None or len(rows.shape) == 3:
        return None
    return rows[:ROWS]


def _read(network: nn.Module, x: Tensor | None) -> Tensor | None:
    """The rows as the network takes them; None where it has no layer of pixels, or cannot read them."""
    kinds = layers_of(network, (nn.Conv2d, nn.Linear))
    first = next(iter(kinds.values()), None)
    if x is None or first is None:
        return None
    pixels = first.in_features == x[0].numel() if isinstance(first, nn.Linear) else x.dim() == 4
    if not pixels:
        return None
    try:
        rows = as_rows(x, network)
        with evaluating(network), torch.no_grad():
            scores(network, rows)
    except (*PROGRAM_ERRORS, ValueError, TypeError):
        return None
    return rows


def _filters(reader: _Reader) -> Picture | None:
    if reader.layer is not None:
        found = filters(reader.network, reader.layer)
        if found.shape[1] not in (1, 3):
            return None
    else:
        first = next(iter(layers_of(reader.network, (nn.Linear,))))
        weights = filters(reader.network, first)
        found = weights.reshape(len(weights), *reader.images.shape[1:])
    found = found[:FILTERS]
    across = min(8, len(found))
    empty = torch.full_like(found[:1], float("nan")).expand(-len(found) % across, *found.shape[1:])
    cells = torch.cat([found, empty]).reshape(-1, across, *found.shape[1:])
    most = found.abs().max()
    alt = f"{reader.label}: {len(found)} filters of the first layer, each {found.shape[-2]} x {found.shape[-1]} pixels"
    return _panel(reader, cells, torch.stack([-most, most]), alt, [], gap=4)


def _maps(reader: _Reader) -> Picture | None:
    if reader.layer is None:
        return None
    images = reader.images[:4]
    maps = activation_maps(reader.network, reader.x[: len(images)], reader.layer).clamp(min=0)
    most = maps.amax((0, 2, 3))
    chosen = most.argsort(descending=True)[:CHANNELS].sort().values
    scaled = maps[:, chosen] / most[chosen].clamp(min=1e-12).view(1, -1, 1, 1)
    wide = nn.functional.interpolate(scaled, size=images.shape[-2:], mode="nearest")
    low, high = images.min(), images.max()
    grey = ((images - low) / (high - low).clamp(min=1e-12)).mean(1, keepdim=True)
    cells = torch.cat([grey, wide.to(grey)], 1).unsqueeze(2)
    alt = f"{reader.label}: {len(images)} images, and where {len(chosen)} channels of the first layer respond to them"
    return _panel(reader, cells, torch.tensor([0.0, 1.0]), alt, ["row", *(str(int(k)) for k in chosen)])


def _saliency(reader: _Reader) -> Picture:
    images = reader.images
    found = saliency(reader.network, reader.x).reshape(len(images), -1, *images.shape[-2:]).amax(1, keepdim=True).cpu()
    scaled = found / found.amax((1, 2, 3), keepdim=True).clamp(min=1e-12)
    low, high = images.min(), images.max()
    shown = (images - low) / (high - low).clamp(min=1e-12)
    cells = torch.stack([shown, scaled.expand_as(shown).to(shown)])
    alt = f"{reader.label}: {len(images)} images, and below each the pixels on which its largest output depends"
    return _panel(reader, cells, torch.tensor([0.0, 1.0]), alt, [])


def _panel(reader: _Reader, cells: Tensor, like: Tensor, alt: str, below: list[str], gap: int = 1) -> Picture:
    down, across = cells.shape[:2]
    shape = picture_shape(cells.shape[2:])
    assert shape is not None  # images
    height = 0.3 + (WIDTH - 0.2) / across * shape[1] / shape[2] * down
    return picture(WIDTH, height, _drawn(cells, like, below, gap), alt, reader.label, pixels=True)


def _drawn(cells: Tensor, like: Tensor, below: list[str], gap: int) -> Callable[[Axes], None]:
    return lambda axes: draw_cells(axes, cells, like, below=below, gap=gap)


_KINDS: tuple[tuple[str, str, Callable[[_Reader], Picture | None]], ...] = (
    (
        "Filters",
        "Weights of the first layer that reads pixels: grey is zero, dark is positive.",
        _filters,
    ),
    (
        "Activation maps",
        "The first rows, and where channels of the first convolution respond; each channel on its own scale.",
        _maps,
    ),
    (
        "Saliency",
        "Rows, and below each the size of the gradient of the largest output: what it depends on, whichever way.",
        _saliency,
    ),
)
