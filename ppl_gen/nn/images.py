"""Deep convolutional networks of images (Radford, Metz, Chintala 2016): from codes to pixels, from pixels to a number.

Both halve, or double, height and width at every step, down to seven pixels at most: ``stages((28, 28))``.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ppl_gen.arguments import require_choice
from ppl_gen.errors import require_whole

__all__ = ["LARGE_ENOUGH", "ConvolutionalCritic", "Writer", "image_shape", "is_image", "started_small", "stages"]

_COARSE, _LEAST = 7, 4  # the smallest maps have at most so many pixels a side; narrower than this none is halved
NORMS = ("batch", "none")
LARGE_ENOUGH = "(channels, height, width), the longer side at least 8 pixels and the shorter at least 4"


def stages(height: int, width: int) -> list[tuple[int, int]]:
    """Sizes of maps from the finest to the coarsest, each half of the one before, rounded up.

    >>> stages(28, 28), stages(64, 64)[-1]
    ([(28, 28), (14, 14), (7, 7)], (4, 4))
    """
    sizes = [(height, width)]
    while max(sizes[-1]) > _COARSE and min(sizes[-1]) >= _LEAST:
        sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
    return sizes


def is_image(shape: Sequence[int]) -> bool:
    """Whether rows of this shape are images that these networks can halve: channels x height x width.

    >>> is_image((1, 28, 28)), is_image((784,)), is_image((3, 4, 4))
    (True, False, False)
    """
    return len(shape) == 3 and len(stages(*shape[1:])) > 1


def image_shape(name: str, given: Any) -> tuple[int, int, int]:
    """``given`` as (channels, height, width); raises ValueError unless it is that of an image large enough."""
    if isinstance(given, Sequence | torch.Size) and not isinstance(given, str):
        for size in given:
            require_whole(name, size)
        if is_image(given):
            channels, height, width = map(int, given)
            return channels, height, width
    raise ValueError(f"{name}: expected {LARGE_ENOUGH}, got {given!r}")


def _kernel(large: Sequence[int]) -> tuple[int, int]:
    """Of the convolution that halves exactly, rounded up, and of the transposed one that undoes it."""
    return 4 - large[0] % 2, 4 - large[1] % 2


def started_small(network: nn.Module, spread: float = 0.02) -> None:
    """Weights of all layers normal with this standard deviation, gains of batch norm about one: as published."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.normal_(layer.weight, 0.0, spread)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1.0, spread)


class Writer(nn.Module):
    """Codes to pixels, ... x inputs -> ... x channels x height x width: a projection, then transposed convolutions.

    Each is followed by batch norm and a rectifier, but for the last; the outputs are unbounded.

    Args:
        shape: (channels, height, width) of an image.
        filters: channels of the finest maps but the image; twice as many at each coarser one.
        inputs: numbers of a code.
        normed: whether there is batch norm.
    """

    def __init__(self, shape: Sequence[int], filters: int, inputs: int, *, normed: bool = True) -> None:
        super().__init__()
        channels, height, width = shape
        sizes = stages(height, width)[::-1]
        widths = [filters * 2**i for i in range(len(sizes) - 1)][::-1]
        layers: list[nn.Module] = [
            nn.Linear(inputs, widths[0] * prod(sizes[0]), bias=not normed),
            nn.Unflatten(1, (widths[0], *sizes[0])),
        ]
        for before, after, large in zip(widths, [*widths[1:], channels], sizes[1:], strict=True):
            layers += [*([nn.BatchNorm2d(before)] if normed else []), nn.ReLU()]
            layers.append(
                nn.ConvTranspose2d(before, after, _kernel(large), 2, 1, bias=large == sizes[-1] or not normed)
            )
        self.layers = nn.Sequential(*layers)
        if normed:
            started_small(self)

    def forward(self, z: Tensor) -> Tensor:
        images: Tensor = self.layers(z.reshape(-1, z.shape[-1]))
        return images.reshape(*z.shape[:-1], *images.shape[1:])


class ConvolutionalCritic(nn.Module):
    r"""The discriminator of deep convolutional adversarial networks: rows x image -> rows x 1.

    Convolutions of stride two with leaky rectifiers (0.2), batch norm after each but the first, and one affine map; no
    pooling. For `Adversarial(critic=...)`, which takes it by itself where the observed rows are images.

    Batch norm ties the rows of a batch together, so a penalty on the gradient of each row means nothing beside it:
    take ``norm="none"`` for ``penalty="gradient"``.

    Args:
        shape: (channels, height, width) of an image, the longer side at least 8 pixels and the shorter at least 4.
        filters: channels of the first convolution; twice as many at each further one.
        norm: "batch" or "none".
        outputs: numbers given for each image.

    Raises:
        ValueError: for a shape that is no image's, or a setting out of its range.

    References:
        Unsupervised representation learning with deep convolutional generative adversarial networks (Radford, Metz and
        Chintala, 2016).

    Example:
        >>> ConvolutionalCritic((1, 28, 28), filters=4)(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 1])
    """

    def __init__(self, shape: Sequence[int], *, filters: int = 64, norm: str = "batch", outputs: int = 1) -> None:
        super().__init__()
        self.shape = image_shape("shape", shape)
        require_whole("filters", filters)
        require_choice("norm", norm, NORMS)
        require_whole("outputs", outputs)
        channels, height, width = self.shape
        sizes = stages(height, width)
        layers: list[nn.Module] = []
        before, after = channels, int(filters)
        for large in sizes[:-1]:
            normed = norm == "batch" and bool(layers)
            layers.append(nn.Conv2d(before, after, _kernel(large), 2, 1, bias=not normed))
            layers += [nn.BatchNorm2d(after)] if normed else []
            layers.append(nn.LeakyReLU(0.2))
            before, after = after, 2 * after
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(before * prod(sizes[-1]), outputs))
        if norm == "batch":
            started_small(self)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.layers(x)
        return scores
