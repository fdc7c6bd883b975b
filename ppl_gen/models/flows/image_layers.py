r"""Layers of images (channels x height x width): checkerboard and channel couplings, batch norm, several scales."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from torch.nn.modules.batchnorm import _NormBase

from ppl_gen.models.flows.base import Layer, run_through

__all__ = [
    "BatchNorm",
    "ChannelCoupling",
    "CheckerboardCoupling",
    "Conditioner",
    "Scale",
    "folded",
    "number_of_scales",
    "over_pixels",
]

MOST_SCALES = 3


def folded(network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """A network of rows x channels x height x width on images with any number of dimensions before these."""
    made = network(images.reshape(-1, *images.shape[-3:]))
    return made.reshape(*images.shape[:-3], *made.shape[-3:])


def over_pixels(each: Tensor) -> Tensor:
    """The sum over channels and pixels."""
    return each.sum((-3, -2, -1))


class Conditioner(nn.Module):
    """Convolutions with residual blocks; the last layer starts at zero, and with it the coupling at the identity.

    No norm inside: one over the batch would mix particles, and blocks that start at the identity need none.

    Args:
        channels: of the images that it reads, and of its output.
        width: channels of the hidden layers.
        blocks: residual blocks of two convolutions each.
        size: of the kernels: 3, or 1 for images of a single pixel.
    """

    def __init__(self, channels: tuple[int, int], width: int, blocks: int, size: int = 3) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels[0], width, size, padding=size // 2)
        self.blocks = nn.ModuleList(_Residual(width, size) for _ in range(blocks))
        self.last = nn.Conv2d(width, channels[1], 1)
        for value in self.last.parameters():
            nn.init.zeros_(value)

    def forward(self, images: Tensor) -> Tensor:
        made = self.first(images)
        for block in self.blocks:
            made = block(made)
        last: Tensor = self.last(made.relu())
        return last


class _Residual(nn.Module):
    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(width, width, size, padding=size // 2)
        self.two = nn.Conv2d(width, width, size, padding=size // 2)
        nn.init.zeros_(self.two.weight)

    def forward(self, images: Tensor) -> Tensor:
        made: Tensor = images + self.two(self.one(images.relu()).relu())
        return made


class _Coupling(Layer):
    """Shift t and logarithm of the scale s = g tanh(raw), one learned g for each channel, of Dinh et al."""

    def __init__(self, reads: int, changes: int, width: int, blocks: int, size: int = 3) -> None:
        super().__init__()
        self.network = Conditioner((reads, 2 * changes), width, blocks, size)
        self.gain = nn.Parameter(torch.ones(changes, 1, 1))

    def numbers(self, images: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = folded(self.network, images).chunk(2, -3)
        return shift, self.gain * raw.tanh()


class CheckerboardCoupling(_Coupling):
    r"""Every second pixel is scaled and shifted as a network of the others says.

    .. math:: z = b \odot x + (1 - b) \odot (x \odot e^{s(b \odot x)} + t(b \odot x))

    Args:
        shape: of the images.
        parity: whether the first pixel is read (0) or changed (1).
        width: see `Conditioner`.
        blocks: see `Conditioner`.
    """

    read: Tensor

    def __init__(self, shape: Sequence[int], parity: int, width: int, blocks: int) -> None:
        channels, height, long = shape
        super().__init__(channels, channels, width, blocks)
        place = torch.arange(height).unsqueeze(-1) + torch.arange(long) + parity
        self.register_buffer("read", (place % 2 == 0).to(torch.get_default_dtype()))

    def _changes(self, images: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = self.numbers(self.read * images)
        return (1 - self.read) * shift, (1 - self.read) * log_scale

    def to_code(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = self._changes(x)
        return x * log_scale.exp() + shift, over_pixels(log_scale)

    def to_data(self, z: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = self._changes(z)
        return (z - shift) * (-log_scale).exp(), -over_pixels(log_scale)


class ChannelCoupling(_Coupling):
    """One half of the channels is scaled and shifted as a network of the other half says.

    Args:
        channels: of the images, at least 2.
        parity: whether the first half is read (0) or changed (1).
        width: see `Conditioner`.
        blocks: see `Conditioner`.
        size: see `Conditioner`.
    """

    def __init__(self, channels: int, parity: int, width: int, blocks: int, size: int = 3) -> None:
        half = channels // 2
        self.sizes = [channels - half, half] if parity else [half, channels - half]
        super().__init__(half, channels - half, width, blocks, size)
        self.parity = parity

    def _halves(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What is read, and what is changed."""
        one, two = images.split(self.sizes, -3)
        return (two, one) if self.parity else (one, two)

    def _whole(self, read: Tensor, changed: Tensor) -> Tensor:
        return torch.cat([changed, read] if self.parity else [read, changed], -3)

    def to_code(self, x: Tensor) -> tuple[Tensor, Tensor]:
        read, changed = self._halves(x)
        shift, log_scale = self.numbers(read)
        return self._whole(read, changed * log_scale.exp() + shift), over_pixels(log_scale)

    def to_data(self, z: Tensor) -> tuple[Tensor, Tensor]:
        read, changed = self._halves(z)
        shift, log_scale = self.numbers(read)
        return self._whole(read, (changed - shift) * (-log_scale).exp()), -over_pixels(log_scale)


class BatchNorm(Layer, _NormBase):
    r"""Batch norm without gain and shift, as a layer of a flow.

    .. math:: z = \frac{x - m}{\sqrt{v + \epsilon}}, \quad \log \left| \det \frac{\partial z}{\partial x} \right| =
              - \frac{H W}{2} \sum_c \log (v_c + \epsilon)

    In training m and v are those of the batch, for each channel, and gradients go through them; averages run along,
    r' = rho r + (1 - rho) of the batch. Evidence, samples and all else outside of training take these averages. Rows
    are the last dimension before the channels: particles before them are normalised each by itself.

    Args:
        channels: of the images.
        rho: how slowly the averages run; PyTorch's ``momentum`` is 1 - rho.

    References:
        Density estimation using Real NVP (Dinh, Sohl-Dickstein and Bengio, 2017), section 3.7.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, rho: float = 0.9) -> None:
        _NormBase.__init__(self, channels, eps=1e-5, momentum=1 - rho, affine=False)
        self.rho = rho

    def to_code(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.training:
            over = (-2, -1) if x.dim() == 3 else (-4, -2, -1)
            _require_spread([x.shape[i] for i in over], x.shape[-3:])
            mean, variance = x.mean(over, keepdim=True), x.var(over, correction=0, keepdim=True)
            self._follow(mean, variance)
        else:
            mean, variance = (v[:, None, None] for v in (self.running_mean, self.running_var))
        inside = variance + self.eps
        log_det = (-0.5 * x.shape[-2] * x.shape[-1]) * inside.log().sum((-3, -2, -1))
        return (x - mean) * inside.rsqrt(), log_det.expand(x.shape[:-3])

    def to_data(self, z: Tensor) -> tuple[Tensor, Tensor]:
        inside = self.running_var[:, None, None] + self.eps
        log_det = (0.5 * z.shape[-2] * z.shape[-1]) * inside.log().sum()
        return z * inside.sqrt() + self.running_mean[:, None, None], log_det.expand(z.shape[:-3])

    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        with torch.no_grad():
            for running, now in ((self.running_mean, mean), (self.running_var, variance)):
                channels = now.reshape(-1, len(running)).mean(0)  # over particles
                running.mul_(self.rho).add_(channels, alpha=1 - self.rho)


def _require_spread(counts: Sequence[int], shape: Sequence[int]) -> None:
    """Raise torch's own error for a single number in a channel, whose variance is zero whatever it is."""
    if math.prod(counts) < 2:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got one image of shape {tuple(shape)}; take more "
            "rows, or fewer scales"
        )


class Scale(Layer):
    """Layers of one scale, layers of its squeezed images, and the other half of the channels through smaller scales.

    Four pixels of a channel become four channels of a pixel; after ``squeezed`` the first half of these is code, the
    second goes on through ``smaller``. Codes are put back into the shape of the image.

    Args:
        layers: at the size of the images.
        squeezed: after squeezing; none: the images are not squeezed.
        smaller: what the second half goes through; None: all of it is code.
    """

    def __init__(self, layers: Sequence[Layer], squeezed: Sequence[Layer] = (), smaller: Layer | None = None) -> None:
        super().__init__()
        self.layers, self.squeezed = nn.ModuleList(layers), nn.ModuleList(squeezed)
        self.smaller = smaller

    def to_code(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, total = run_through(self.layers, x)
        total = x.new_zeros(x.shape[:-3]) + total
        if not self.squeezed:
            return x, total
        x, log_det = run_through(self.squeezed, pixel_unshuffle(x, 2))
        total = total + log_det
        if self.smaller is not None:
            done, rest = x.chunk(2, -3)
            rest, log_det = self.smaller.to_code(rest)
            x, total = torch.cat([done, rest], -3), total + log_det
        return pixel_shuffle(x, 2), total

    def to_data(self, z: Tensor) -> tuple[Tensor, Tensor]:
        total: Tensor | float = 0.0
        if self.squeezed:
            z = pixel_unshuffle(z, 2)
            if self.smaller is not None:
                done, rest = z.chunk(2, -3)
                rest, log_det = self.smaller.to_data(rest)
                z, total = torch.cat([done, rest], -3), total + log_det
            z, squeezed = run_through(reversed(self.squeezed), z, inverse=True)
            z, total = pixel_shuffle(z, 2), total + squeezed
        z, last = run_through(reversed(self.layers), z, inverse=True)
        return z, z.new_zeros(z.shape[:-3]) + total + last


def number_of_scales(shape: Sequence[int], asked: int | None) -> int:
    """How many scales images of this shape have: each but the last halves height and width, which must be even.

    >>> number_of_scales((1, 28, 28), None), number_of_scales((1, 27, 27), None)
    (3, 1)

    Raises:
        ValueError: if more are asked for than the images have.
    """
    height, width = shape[-2:]
    found = 1
    while height % 2 == 0 and width % 2 == 0:
        height, width, found = height // 2, width // 2, found + 1
    if asked is not None and asked > found:
        raise ValueError(
            f"scales: images of {shape[-2]} x {shape[-1]} pixels can be halved {found - 1} time(s), which makes at "
            f"most {found} scales, got {asked}; pad the images to sizes that are divided by {2 ** (asked - 1)}, or ask "
            "for less"
        )
    return min(found, MOST_SCALES) if asked is None else int(asked)
