r"""The chain back, by a network that predicts the noise in x_t: a perceptron of vectors, a U-Net of images.

.. math:: \mu(x_t, t) = \frac{x_t - \beta_t \epsilon(x_t, t) / \sqrt{1 - \bar\alpha_t}}{\sqrt{1 - \beta_t}}
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ppl_gen.errors import require_whole
from ppl_gen.models.diffusion.learned_noising import LearnedNoising
from ppl_gen.models.diffusion.noising import Noising, at
from ppl_gen.nn.unet import UNet

__all__ = ["Denoiser", "check_network", "time_network", "time_waves"]

_WAVES = 4
CLOCK = 2 * _WAVES  #: numbers that tell the time
_HIDDEN = {1: 64, 3: 16}  # width of the network by the dimensions of a row


class TimedPerceptron(nn.Module):
    """Rows beside the time through layers of one width; the last one starts at zero."""

    def __init__(self, features: int, hidden: int, layers: int) -> None:
        super().__init__()
        widths = [features + CLOCK, *[hidden] * layers]
        parts: list[nn.Module] = []
        for before, after in zip(widths[:-1], widths[1:], strict=True):
            # Smooth units stay on a plateau at the normal distribution for a thousand steps (measured on a ring).
            parts += [nn.Linear(before, after), nn.ReLU()]
        last = nn.Linear(hidden, features)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*parts, last)

    def forward(self, x: Tensor, clock: Tensor) -> Tensor:
        return self.layers(torch.cat([x, clock.expand(*x.shape[:-1], -1)], -1))


class Denoiser(nn.Module):
    r"""p(x_{t-1} | x_t) from a network that predicts the noise in x_t (Ho et al. 2020).

    The network's last layer starts at zero and adds to sqrt(1 - abar_t) x_t, the best prediction for standard normal
    rows: so the untrained chain generates exactly those. The log variance of each step and number of a row lies on the
    line through those of q(x_{t-1} | x_t, x_0) and of q(x_t | x_{t-1}), at a learned place that starts at the latter
    (Nichol and Dhariwal 2021). Called with rows and a time step, it returns mean and standard deviation.

    Args:
        shape: of a row.
        noising: the chain into noise.
        network: ``network(x, clock)``, of the shape of x.
    """

    def __init__(self, shape: Sequence[int], noising: Noising | LearnedNoising, network: nn.Module) -> None:
        super().__init__()
        self._noising = (noising,)  # in a tuple: the guide registers a learned one, and a parameter has one name
        self.register_buffer("clock", time_waves(noising.steps))
        self.network = network
        self.place = nn.Parameter(torch.ones(noising.steps, *shape))

    def forward(self, x: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
        chain = self._noising[0].current()
        noise = at(chain.noise, t, x).sqrt()
        predicted = noise * x + self.network(x, self.get_buffer("clock")[t])
        beta = at(chain.betas, t, x, first=1)
        mean = (x - beta / noise * predicted) / (1 - beta).sqrt()
        lower, upper = (at(bound, t, x, first=1) for bound in chain.log_variances)
        return mean, (0.5 * torch.lerp(lower, upper, self.place[t - 1])).exp()


def time_waves(steps: int) -> Tensor:
    """Sines and cosines of the time: (steps + 1) x `CLOCK`."""
    waves = 2.0 ** torch.arange(_WAVES) * torch.arange(steps + 1)[:, None] * (math.pi / steps)
    return torch.cat([waves.sin(), waves.cos()], 1).to(torch.get_default_dtype())


def check_network(hidden: int | None, layers: int, shape: tuple[int, ...] | None) -> None:
    """Raise ValueError for sizes out of range, or rows that are neither vectors nor images large enough."""
    require_whole("layers", layers)
    if hidden is not None:
        require_whole("hidden", hidden)
    if shape is None:
        return
    if len(shape) not in _HIDDEN:
        raise ValueError(
            f"features: expected columns, or images (channels, height, width), got rows of shape {shape}; images "
            "without channels are x[:, None]"
        )
    if len(shape) == 3 and min(shape[1:]) < 2 ** (layers - 1):
        raise ValueError(
            f"layers: {layers} levels halve an image {layers - 1} times, and {shape[1]} x {shape[2]} is too small for "
            "that; take fewer"
        )


def time_network(shape: Sequence[int], hidden: int | None, layers: int) -> nn.Module:
    """A perceptron of vectors (features,), or a U-Net of images (channels, height, width); its output starts at 0."""
    width = hidden or _HIDDEN[len(shape)]
    return TimedPerceptron(shape[0], width, layers) if len(shape) == 1 else UNet(shape, width, layers, CLOCK)
