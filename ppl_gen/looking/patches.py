"""The pieces of pictures that a channel responds to most."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ppl_gen.errors import require_whole
from ppl_gen.looking.alone import read_alone
from ppl_gen.looking.asking import checked_network, chosen_layer, recorded
from ppl_gen.looking.fields import Box, field_boxes
from ppl_gen.looking.maps import CONVOLUTIONS

__all__ = ["Patches", "top_patches"]


@dataclass(frozen=True)
class Patches:
    """The strongest responses of one channel, strongest first, and what they saw.

    Args:
        patches: count x channels x height x width of the receptive field; NaN outside of the image.
        rows: which images they are from.
        places: line and column of each in the map of the channel.
        boxes: top, bottom, left and right of the receptive field in the image; bottom and right are the first pixels
            beyond.
        activations: the responses.

    Example:
        >>> import torch
        >>> found = top_patches(torch.nn.Conv2d(1, 2, 3), torch.rand(20, 1, 8, 8), channel=0)
        >>> found.patches.shape, len(found.boxes)
        (torch.Size([9, 1, 3, 3]), 9)
    """

    patches: Tensor
    rows: Tensor
    places: Tensor
    boxes: list[Box]
    activations: Tensor


def top_patches(network: nn.Module, x: Any, channel: int, layer: str | None = None, *, count: int = 9) -> Patches:
    r"""The patches of images to which one channel of a layer responds most, one from each image at most.

    .. math:: x_{i}[\mathrm{field}(u^*_i)], \quad u^*_i = \arg\max_u a_k(x_i)_u, \quad
              i \text{ among the largest } a_k(x_i)_{u^*_i}

    The patch is the whole receptive field of the place: all pixels that it can depend on. The field is computed by the
    network itself, run with positive weights and without rectifiers, so it holds for branches and skips as well.

    Args:
        network: any module with convolutions in two dimensions.
        x: images, rows x channels x height x width.
        channel: k.
        layer: the name of a layer that gives maps; None: the first convolution.
        count: how many patches; fewer where there are fewer images.

    Raises:
        TypeError: for what is no module.
        ValueError: for rows that are no images, a channel out of range, or a layer that gives no maps.

    References:
        Visualizing and understanding convolutional networks (Zeiler and Fergus, 2014).

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2))
        >>> top_patches(net, torch.rand(20, 1, 8, 8), channel=1, layer="2").patches.shape  # 2 x 2 places of 3 x 3
        torch.Size([9, 1, 4, 4])
    """
    checked_network(network)
    rows = read_alone(x, network, images=True)
    require_whole("count", count)
    name = chosen_layer(network, layer, CONVOLUTIONS, "convolutions")
    maps = recorded(network, rows, [name])[name]
    if maps.dim() != 4:
        raise ValueError(f"layer: expected one that gives maps of channels, {name!r} gives shape {tuple(maps.shape)}")
    require_whole("channel", channel, 0)
    if channel >= maps.shape[1]:
        raise ValueError(f"channel: expected one from 0 to {maps.shape[1] - 1}, got {channel}")
    best, where = maps[:, channel].flatten(1).max(1)
    chosen = best.topk(min(int(count), len(best))).indices
    lines, columns = where[chosen] // maps.shape[3], where[chosen] % maps.shape[3]
    places = torch.stack([lines, columns], 1)
    shape = tuple(rows.shape[1:])
    boxes = field_boxes(network, name, shape, [(int(i), int(j)) for i, j in places])
    whole = _whole_field(network, name, shape, maps.shape[2], maps.shape[3], boxes)
    patches = [_cut(rows[row].cpu(), box, whole) for row, box in zip(chosen, boxes, strict=True)]
    return Patches(torch.stack(patches), chosen, places, boxes, best[chosen])


def _whole_field(
    network: nn.Module, layer: str, shape: tuple[int, ...], height: int, width: int, boxes: list[Box]
) -> tuple[int, int]:
    """Height and width of a field that no border cuts: that of the middle of the map, or of the widest seen."""
    middle = field_boxes(network, layer, shape, [(height // 2, width // 2)])
    return (
        max(bottom - top for top, bottom, _, _ in [*middle, *boxes]),
        max(right - left for _, _, left, right in [*middle, *boxes]),
    )


def _cut(image: Tensor, box: Box, whole: tuple[int, int]) -> Tensor:
    """The pixels of the box where they stand in a field of the whole size; NaN beyond the border of the image."""
    top, bottom, left, right = box
    patch = torch.full((len(image), *whole), math.nan, dtype=image.dtype)
    down = whole[0] - (bottom - top) if top == 0 else 0
    across = whole[1] - (right - left) if left == 0 else 0
    patch[:, down : down + bottom - top, across : across + right - left] = image[:, top:bottom, left:right]
    return patch
