"""Encoders and decoders of autoencoders: mirror images of each other, dense or convolutional, tied or not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ppl_gen.nn.likelihoods import Likelihood
from ppl_gen.nn.networks import ACTIVATIONS, standardised

__all__ = ["MirrorDecoder", "MirrorEncoder", "Units"]

Units = Literal["linear", "sigmoid", "relu"]
_STRIDE = 2


class MirrorEncoder(nn.Module):
    """From rows to codes; in training mode from corrupted rows.

    Args:
        likelihood: knows the units of x: centre and spread.
        hidden: widths of the hidden layers, or the channels of convolutions that halve height and width each.
        code: numbers of a code.
        convolutional: whether ``hidden`` are channels; the last convolution is followed by one affine map.
        activation: between the layers, a name in `ACTIVATIONS`.
        units: what the numbers of a code go through.
        top_k: all but so many of them, the largest, become zero; None: none.
        corruption: how much of a row is destroyed while training: the share of the entries that are put to their
            column's mean ("masking"), or the standard deviation of what is added, in units of the data's ("normal").
        noise: "masking" or "normal".
    """

    centre: Tensor
    spread: Tensor

    def __init__(
        self,
        likelihood: Likelihood,
        hidden: Sequence[int],
        code: int,
        *,
        convolutional: bool,
        activation: str,
        units: Units,
        top_k: int | None,
        corruption: float,
        noise: str,
    ) -> None:
        super().__init__()
        self.shape, self.convolutional = likelihood.shape, convolutional
        self.units, self.top_k, self.corruption, self.noise = units, top_k, corruption, noise
        self.register_buffer("centre", likelihood.centre.clone())
        self.register_buffer("spread", likelihood.spread.clone())
        self.activation = ACTIVATIONS[activation]()
        self.sizes = [self.shape]
        layers: list[nn.Module] = []
        if convolutional:
            for channels in hidden:
                before, height, width = self.sizes[-1]
                layers.append(nn.Conv2d(before, channels, 3, stride=_STRIDE, padding=1))
                self.sizes.append((channels, -(-height // 2), -(-width // 2)))
        widths = [math.prod(self.sizes[-1]), *([] if convolutional else hidden), code]
        layers += [nn.Linear(before, after) for before, after in zip(widths[:-1], widths[1:], strict=True)]
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        y = standardised(x, self.centre, self.spread)
        if self.training and self.corruption:
            y = self.corrupted(y)
        lead = y.shape[: y.dim() - len(self.shape)]
        h = y.reshape(-1, *self.shape)
        for i, layer in enumerate(self.layers):
            h = layer(h.flatten(1) if isinstance(layer, nn.Linear) else h)
            h = h if i == len(self.layers) - 1 else self.activation(h)
        return self._coded(h).reshape(*lead, -1)

    def corrupted(self, y: Tensor) -> Tensor:
        """Rows in standardised units with some of what they say destroyed."""
        if self.noise == "normal":
            return y + self.corruption * torch.randn_like(y)
        return y * (torch.rand_like(y) >= self.corruption)

    def _coded(self, h: Tensor) -> Tensor:
        if self.units != "linear":
            h = h.sigmoid() if self.units == "sigmoid" else h.relu()
        if self.top_k is None:
            return h
        kept = h.topk(self.top_k, -1).indices
        return h * torch.zeros_like(h).scatter(-1, kept, 1.0)


class MirrorDecoder(nn.Module):
    """From codes to rows, the encoder's layers the other way round; called, it gives the mean of p(x | z).

    Args:
        encoder: whose layers are mirrored.
        likelihood: what the outputs mean.
        tied: every layer uses the transpose of the encoder's weight, that very tensor; only biases are its own.
    """

    def __init__(self, encoder: MirrorEncoder, likelihood: Likelihood, *, tied: bool) -> None:
        super().__init__()
        self.likelihood = likelihood
        self.mirrored = (encoder,)  # in a tuple: its parameters are registered with the encoder, once
        weights: list[Any] = [layer.weight for layer in encoder.layers]
        self.weights = None if tied else nn.ParameterList([_fresh(weight) for weight in weights])
        self.biases = nn.ParameterList([nn.Parameter(torch.zeros(weight.shape[1])) for weight in weights])
        start = likelihood.starting_bias()
        if start is not None and not encoder.convolutional:
            with torch.no_grad():
                self.biases[0].copy_(start)

    def weight(self, i: int) -> Tensor:
        """Of the layer that mirrors the encoder's layer ``i``, in the encoder's layout (outputs of it first)."""
        own: Any = self.mirrored[0].layers[i].weight if self.weights is None else self.weights[i]
        return own

    def raw(self, z: Tensor) -> Tensor:
        """What the likelihood turns into a distribution: ... x code -> ... x numbers of a row."""
        encoder = self.mirrored[0]
        h = z.reshape(-1, z.shape[-1])
        convolutions = len(encoder.sizes) - 1
        for i in reversed(range(len(encoder.layers))):
            if i >= convolutions:
                h = functional.linear(h, self.weight(i).mT, self.biases[i])
            else:
                h = self._widened(h, i)
            h = h if i == 0 else encoder.activation(h)
        return h.reshape(*z.shape[:-1], -1)

    def _widened(self, h: Tensor, i: int) -> Tensor:
        """The transposed convolution back to the size that the encoder's layer ``i`` was given."""
        small, large = self.mirrored[0].sizes[i + 1], self.mirrored[0].sizes[i]
        odd = [big - (2 * little - 1) for little, big in zip(small[1:], large[1:], strict=True)]
        maps = h.reshape(-1, *small)
        return functional.conv_transpose2d(maps, self.weight(i), self.biases[i], _STRIDE, padding=1, output_padding=odd)

    def distribution(self, z: Tensor) -> Any:
        """p(x | z) over rows."""
        return self.likelihood(self.raw(z))

    def forward(self, z: Tensor) -> Tensor:
        mean: Tensor = self.distribution(z).mean
        return mean


def _fresh(weight: Tensor) -> nn.Parameter:
    """Of the same shape, and as wide as torch starts a layer that reads the other side of it."""
    bound = (weight.shape[0] * weight[0, 0].numel()) ** -0.5
    return nn.Parameter(torch.empty_like(weight).uniform_(-bound, bound))
