r"""What a score loses when a part of the picture is covered.

.. math:: D(s) = S_k(x) - S_k(x \text{ with the square } s \text{ painted grey})
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ppl_gen.errors import is_number, require_whole
from ppl_gen.looking.alone import read_alone
from ppl_gen.looking.asking import (
    Scoring,
    Target,
    captum_attr,
    checked_network,
    checked_target,
    evaluating,
    in_pieces,
    scores,
)

__all__ = ["occlusion"]


def occlusion(
    network: nn.Module,
    x: Any,
    target: Target = None,
    *,
    size: int = 4,
    stride: int | None = None,
    grey: float | None = None,
) -> Tensor:
    r"""How much of a score is lost where a grey square covers the image.

    .. math:: O_{ij} = \frac{1}{|\{s \ni (i, j)\}|} \sum_{s \ni (i, j)}
              \left[ S_k(x) - S_k(x \text{ with } s \text{ grey}) \right]

    The square slides over the image, through all channels; each pixel shows the mean loss over the squares that cover
    it. With ``stride=size`` squares do not overlap, and every pixel of one shows its loss. Computed by
    `captum.attr.Occlusion`.

    Args:
        network: as for `saliency`.
        x: images, rows x channels x height x width.
        target: which score, as for `saliency`; it is chosen on the whole image.
        size: height and width of the square, in pixels.
        stride: pixels from one square to the next, at most ``size``; None: half of ``size``.
        grey: what a square is painted with, in the units of ``x``; None: the mean of each channel over all of ``x``.

    Returns:
        Rows x height x width, in units of the score; negative where the square helps.

    Raises:
        TypeError: for what is no module, or gives no numbers.
        ValueError: for rows that are no images, or a square larger than these.
        MissingExtraError: without captum (``ppl_gen[looking]``).

    References:
        Visualizing and understanding convolutional networks (Zeiler and Fergus, 2014).

    Example:
        >>> import torch
        >>> total = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 1, bias=False))
        >>> total[1].weight.data.fill_(1.0)  # the sum of all pixels
        tensor(...)
        >>> occlusion(total, torch.ones(1, 1, 4, 4), size=2, stride=2, grey=0.0)[0, 0].tolist()  # four pixels of 1
        [4.0, 4.0, 4.0, 4.0]
    """
    checked_network(network)
    rows = read_alone(x, network, images=True)
    require_whole("size", size)
    step = max(1, int(size) // 2) if stride is None else stride
    require_whole("stride", step)
    channels, height, width = rows.shape[1:]
    if size > min(height, width):
        raise ValueError(f"size: expected a square of at most {min(height, width)} pixels, got {size}")
    if step > size:
        raise ValueError(f"stride: expected at most the {size} pixels of the square, else some are never covered")
    if grey is not None and (not is_number(grey) or not abs(float(grey)) < float("inf")):
        raise ValueError(f"grey: expected a finite number or None, got {grey!r}")
    paint = rows.mean((0, 2, 3), keepdim=True) if grey is None else torch.full_like(rows[:1, :, :1, :1], float(grey))
    with evaluating(network), torch.no_grad():
        found = torch.cat([scores(network, piece) for piece in in_pieces(rows)])
        picked = checked_target(target, found)
        captum = captum_attr()
        lost = [
            captum.Occlusion(Scoring(network)).attribute(
                piece,
                (channels, int(size), int(size)),
                strides=(channels, int(step), int(step)),
                baselines=paint.expand(1, channels, height, width),
                target=which,
            )
            for piece, which in zip(in_pieces(rows), in_pieces(picked), strict=True)
        ]
    return torch.cat(lost)[:, 0].detach().to(rows.dtype)  # captum adds up in single precision
