"""Networks that programs share: they fold leading dimensions (particles, enumerated labels) into one batch."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ppl_gen.arguments import require_choice
from ppl_gen.errors import require_whole

__all__ = [
    "ACTIVATIONS",
    "ConvolutionalDecoder",
    "ConvolutionalEncoder",
    "Perceptron",
    "Reading",
    "Writing",
    "checked_widths",
    "standardised",
]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "softplus": nn.Softplus,
    "elu": nn.ELU,
    "sigmoid": nn.Sigmoid,
}


def checked_widths(hidden: Sequence[int], activation: str) -> tuple[int, ...]:
    """Widths as a tuple; raises ValueError for one that is no whole number, or for an unknown activation."""
    require_choice("activation", activation, ACTIVATIONS)
    widths: Any = (hidden,) if isinstance(hidden, numbers.Integral) else hidden  # whatever was passed
    if not isinstance(widths, Sequence) or isinstance(widths, str):
        raise ValueError(f"hidden: expected widths of layers, such as (128,), got {hidden!r}")
    for width in widths:
        require_whole("hidden", width)
    return tuple(widths)


class Perceptron(nn.Module):
    """Layers from rows of numbers to rows of numbers; labels, where there are any, shift the first layer.

    A label enters as W x + V[y], the same as a one-hot code joined to x, and is added after W x: a label that stands in
    a dimension of its own (enumerated) costs no second pass over x.

    Args:
        inputs: numbers of each row (the last dimension; any dimensions may lead).
        hidden: widths of the hidden layers; empty: one affine map.
        outputs: numbers of each output row.
        activation: a name in `ACTIVATIONS`.
        classes: how many values a label takes; None: no labels.
    """

    def __init__(
        self, inputs: int, hidden: Sequence[int], outputs: int, *, activation: str = "tanh", classes: int | None = None
    ) -> None:
        super().__init__()
        sizes = [inputs, *hidden, outputs]
        self.inputs = inputs
        self.first = nn.Linear(sizes[0], sizes[1])
        rest: list[nn.Module] = []
        for before, after in zip(sizes[1:-1], sizes[2:], strict=True):
            rest += [ACTIVATIONS[activation](), nn.Linear(before, after)]
        self.rest = nn.Sequential(*rest)
        self.label = None if classes is None else nn.Embedding(classes, sizes[1])
        if self.label is not None:
            # Without effect at first: where labels are guessed, arbitrary differences between them would be taken for
            # evidence, and the first guesses would lock in.
            nn.init.zeros_(self.label.weight)

    @property
    def last(self) -> nn.Linear:
        """The output layer."""
        layer = self.rest[-1] if len(self.rest) else self.first
        assert isinstance(layer, nn.Linear)
        return layer

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """... x inputs -> ... x outputs; labels ``y`` have a shape that broadcasts with the dimensions that lead."""
        wide = self.first(x)
        if self.label is not None and y is not None:
            wide = wide + self.label(y.long())
        return self.rest(wide)


class Reading(nn.Module):
    """A network that sees only the numbers ``used`` of its input."""

    used: Tensor

    def __init__(self, network: nn.Module, used: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("used", used)

    def forward(self, x: Tensor, *label: Tensor) -> Tensor:
        """``x`` as wide as the data; the network gets ... x used numbers."""
        return self.network(x[..., self.used], *label)


class Writing(nn.Module):
    """A network that gives only the numbers ``used`` of a wider output; the others are zero."""

    used: Tensor

    def __init__(self, network: nn.Module, used: Tensor, width: int) -> None:
        super().__init__()
        self.network, self.width = network, width
        self.register_buffer("used", used)

    def forward(self, x: Tensor, *label: Tensor) -> Tensor:
        """What the network gives, ... x used numbers, as ... x ``width``."""
        found = self.network(x, *label)
        return found.new_zeros(*found.shape[:-1], self.width).index_copy(-1, self.used, found)


def _halved(size: int) -> int:
    return -(-size // 2)


class ConvolutionalEncoder(nn.Module):
    """Two convolutions that halve height and width, then a hidden layer: ... x shape of an image -> ... x outputs.

    Args:
        shape: (channels, height, width) of an image.
        filters: channels of the two convolutions.
        hidden: width of the layer between them and the output.
        outputs: numbers given for each image.
    """

    def __init__(self, shape: Sequence[int], filters: Sequence[int], hidden: int, outputs: int) -> None:
        super().__init__()
        channels, height, width = shape
        self.shape = tuple(shape)
        small = filters[1] * _halved(_halved(height)) * _halved(_halved(width))
        self.layers = nn.Sequential(
            nn.Conv2d(channels, filters[0], 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(filters[0], filters[1], 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(small, hidden),
            nn.ReLU(),
            nn.Linear(hidden, outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        lead = x.shape[:-3]
        return self.layers(x.reshape(-1, *self.shape)).reshape(*lead, -1)


class ConvolutionalDecoder(nn.Module):
    """A hidden layer, then two transposed convolutions that double height and width: ... x inputs -> ... x outputs.

    Args:
        shape: (channels, height, width) of an image.
        filters: channels of the two transposed convolutions, in the encoder's order.
        hidden: width of the first layer.
        inputs: numbers of each code.
        depth: numbers given for each number of the image; they stand in the last dimension of the output, flat.
    """

    def __init__(self, shape: Sequence[int], filters: Sequence[int], hidden: int, inputs: int, depth: int = 1) -> None:
        super().__init__()
        channels, height, width = shape
        middle, small = (_halved(height), _halved(width)), (_halved(_halved(height)), _halved(_halved(width)))
        self.depth, self.channels = depth, channels
        self.layers = nn.Sequential(
            nn.Linear(inputs, hidden),
            nn.ReLU(),
            nn.Linear(hidden, filters[1] * prod(small)),
            nn.ReLU(),
            nn.Unflatten(1, (filters[1], *small)),
            _doubling(filters[1], filters[0], small, middle),
            nn.ReLU(),
            _doubling(filters[0], channels * depth, middle, (height, width)),
        )

    @property
    def last(self) -> nn.ConvTranspose2d:
        """The output layer."""
        layer = self.layers[-1]
        assert isinstance(layer, nn.ConvTranspose2d)
        return layer

    def forward(self, z: Tensor) -> Tensor:
        """... x inputs -> ... x outputs: channels x height x width (x depth), flat."""
        images = self.layers(z.reshape(-1, z.shape[-1]))
        if self.depth > 1:
            # rows x channels*depth x height x width -> the numbers of one pixel side by side
            images = images.unflatten(1, (self.channels, self.depth)).movedim(2, -1)
        return images.reshape(*z.shape[:-1], -1)


def _doubling(before: int, after: int, small: Sequence[int], large: Sequence[int]) -> nn.ConvTranspose2d:
    """The transposed convolution from ``small`` to exactly ``large``, which is twice that or one less."""
    odd = tuple(int(big == 2 * little) for little, big in zip(small, large, strict=True))
    return nn.ConvTranspose2d(before, after, 3, stride=2, padding=1, output_padding=(odd[0], odd[1]))


def standardised(x: Tensor, centre: Tensor, spread: Tensor) -> Tensor:
    """(x - centre) / spread as floating numbers; both broadcast to the shape of a row."""
    wide = x if x.is_floating_point() else x.to(torch.get_default_dtype())
    return (wide - centre.to(wide)) / spread.to(wide)
