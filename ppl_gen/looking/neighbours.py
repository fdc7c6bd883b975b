"""Which images are alike to a network, beside which are alike pixel by pixel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ppl_gen.errors import require_whole
from ppl_gen.looking.alone import read_alone
from ppl_gen.looking.asking import (
    COARSE,
    as_rows,
    checked_network,
    chosen_layer,
    evaluating,
    in_pieces,
    recorded,
    scores,
)

__all__ = ["Neighbours", "nearest_images"]


@dataclass(frozen=True)
class Neighbours:
    """Indices of the nearest training rows, nearest first, and how far they are.

    Args:
        by_layer: rows x count, by what the layer gives.
        by_pixels: rows x count, by the rows themselves.
        layer_distances: Euclidean, rows x count.
        pixel_distances: the same between rows.

    Example:
        >>> import torch
        >>> x = torch.rand(10, 1, 4, 4)
        >>> nearest_images(torch.nn.Flatten(), x, x, count=1, layer="").by_layer[:, 0].tolist() == list(range(10))
        True
    """

    by_layer: Tensor
    by_pixels: Tensor
    layer_distances: Tensor
    pixel_distances: Tensor


def nearest_images(
    network: nn.Module, x: Any, training: Any, count: int = 6, *, layer: str | None = None
) -> Neighbours:
    r"""The training rows nearest to each row by a layer of the network, beside the nearest by raw pixels.

    .. math:: \arg\min_j \; \lVert h(x_i) - h(x_j) \rVert_2, \quad \arg\min_j \; \lVert x_i - x_j \rVert_2

    Rows that are nearest by a late layer show the same thing, though their pixels may have little in common.

    Args:
        network: any module.
        x: the rows that are asked about.
        training: the rows among which neighbours are sought, of the same shape.
        count: how many for each row.
        layer: h, the name of a layer; "" is the network's own output (the code of an encoder). None: what goes into its
            last linear layer, the features that its scores are computed from.

    Raises:
        TypeError: for what is no module.
        ValueError: for rows that it cannot read, fewer training rows than ``count``, or no such layer.

    References:
        ImageNet classification with deep convolutional neural networks (Krizhevsky, Sutskever and Hinton, 2012).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> nearest_images(net, torch.rand(3, 1, 4, 4), torch.rand(50, 1, 4, 4)).by_layer.shape
        torch.Size([3, 6])
    """
    checked_network(network)
    rows, known = read_alone(x, network), as_rows(training, network, "training")
    if rows.shape[1:] != known.shape[1:]:
        raise ValueError(
            f"training: expected rows of shape {tuple(rows.shape[1:])}, as x has, got {tuple(known.shape[1:])}"
        )
    require_whole("count", count)
    if count > len(known):
        raise ValueError(f"count: expected at most the {len(known)} training rows, got {count}")
    if layer is None:
        features = [_features(network, one) for one in (rows, known)]
    else:
        name = chosen_layer(network, layer, (nn.Module,), "layers")
        features = [recorded(network, one, [name])[name] for one in (rows, known)]
    far, by_layer = _nearest(features[0], features[1], int(count))
    apart, by_pixels = _nearest(rows.cpu(), known.cpu(), int(count))
    return Neighbours(by_layer, by_pixels, far, apart)


def _nearest(rows: Tensor, known: Tensor, count: int) -> tuple[Tensor, Tensor]:
    rows, known = (one.float() if one.dtype in COARSE else one for one in (rows, known))
    found = [
        torch.cdist(piece.flatten(1), known.flatten(1), compute_mode="donot_use_mm_for_euclid_dist").topk(
            count, largest=False
        )
        for piece in in_pieces(rows)
    ]
    return torch.cat([one.values for one in found]), torch.cat([one.indices for one in found])


def _features(network: nn.Module, x: Tensor) -> Tensor:
    """What goes into the linear layer that is called last."""
    kept: list[Tensor] = []
    seen: list[Tensor] = []
    linear = [part for part in network.modules() if isinstance(part, nn.Linear)]
    if not linear:
        raise ValueError('layer: the network has no linear layer; name one of its layers, or "" for its output')
    hooks = [part.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone())) for part in linear]
    try:
        with evaluating(network), torch.no_grad():
            for piece in in_pieces(x):
                seen.clear()
                scores(network, piece)
                if not seen or len(seen[-1]) != len(piece):
                    raise ValueError("layer: no linear layer has one row for each row of x; name a layer")
                kept.append(seen[-1].cpu())
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(kept)
