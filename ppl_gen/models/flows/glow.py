r"""Glow: activation norm, invertible 1 x 1 convolutions and affine couplings, over several scales."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ppl_gen.errors import require_whole
from ppl_gen.models.flows.base import Layer
from ppl_gen.models.flows.image_layers import ChannelCoupling, Scale, folded, number_of_scales
from ppl_gen.models.flows.recipe import Pixels, check_convolutions, flow_recipe, image_shape
from ppl_gen.program.program import Recipe

__all__ = ["ActNorm", "InvertibleConvolution", "glow"]


class ActNorm(Layer):
    r"""One scale and one shift for each channel, which start at its mean and standard deviation on some data.

    .. math:: z = e^s \odot (x + b), \quad \log \left| \det \frac{\partial z}{\partial x} \right| = H W \sum_c s_c

    The first images that go through after the layer was made set it, and no later ones: `glow` sends the training data
    through once, when it builds its program.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(channels, 1, 1))
        self.log_scale = nn.Parameter(torch.zeros(channels, 1, 1))
        self.fresh = True

    def to_code(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.fresh:
            self._begin(x)
        return (x + self.shift) * self.log_scale.exp(), self._log_det(x)

    def to_data(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z * (-self.log_scale).exp() - self.shift, -self._log_det(z)

    def _log_det(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        return (height * width * self.log_scale.sum()).expand(images.shape[:-3])

    def _begin(self, x: Tensor) -> None:
        channels = x.detach().reshape(-1, *x.shape[-3:]).transpose(0, 1).flatten(1)
        spread = channels.std(1, correction=0).clamp(min=1e-6)
        with torch.no_grad():
            self.shift.copy_(-channels.mean(1)[:, None, None])
            self.log_scale.copy_(-spread.log()[:, None, None])
        self.fresh = False


class InvertibleConvolution(Layer):
    r"""A 1 x 1 convolution, the same square matrix for the channels of every pixel, by its LU decomposition.

    .. math:: W = P L (U + \mathrm{diag}(\sigma \odot e^s)), \quad
              \log \left| \det \frac{\partial z}{\partial x} \right| = H W \sum_c s_c

    P is a fixed permutation and sigma are fixed signs, L lower triangular with ones on its diagonal, U strictly upper
    triangular; W starts at a random rotation, drawn under the fit's seed.

    Args:
        channels: of the images.
    """

    permutation: Tensor
    signs: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))[0]
        permutation, lower, upper = (part.to(torch.get_default_dtype()) for part in torch.linalg.lu(rotation))
        diagonal = upper.diagonal()
        self.register_buffer("permutation", permutation.clone())
        self.register_buffer("signs", diagonal.sign())
        self.lower, self.upper = nn.Parameter(lower.tril(-1)), nn.Parameter(upper.triu(1))
        self.log_scale = nn.Parameter(diagonal.abs().log())

    def to_code(self, x: Tensor) -> tuple[Tensor, Tensor]:
        lower, upper = self._factors()
        return _at_each_pixel(self.permutation @ lower @ upper, x), self._log_det(x)

    def to_data(self, z: Tensor) -> tuple[Tensor, Tensor]:
        lower, upper = self._factors()
        left = torch.linalg.solve_triangular(lower, self.permutation.mT, upper=False, unitriangular=True)
        return _at_each_pixel(torch.linalg.solve_triangular(upper, left, upper=True), z), -self._log_det(z)

    def _factors(self) -> tuple[Tensor, Tensor]:
        unit = torch.eye(len(self.signs), dtype=self.signs.dtype, device=self.signs.device)
        return self.lower.tril(-1) + unit, self.upper.triu(1) + (self.signs * self.log_scale.exp()).diag()

    def _log_det(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        return (height * width * self.log_scale.sum()).expand(images.shape[:-3])


def _at_each_pixel(matrix: Tensor, images: Tensor) -> Tensor:
    return folded(lambda rows: nn.functional.conv2d(rows, matrix[:, :, None, None]), images)


class _AsImages(Layer):
    """Rows of columns as images of one pixel with as many channels."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer

    def to_code(self, x: Tensor) -> tuple[Tensor, Tensor]:
        made, log_det = self.layer.to_code(x[..., None, None])
        return made[..., 0, 0], log_det

    def to_data(self, z: Tensor) -> tuple[Tensor, Tensor]:
        made, log_det = self.layer.to_data(z[..., None, None])
        return made[..., 0, 0], log_det


def _steps(channels: int, steps: int, width: int, blocks: int, size: int) -> list[Layer]:
    made: list[Layer] = []
    for i in range(steps):
        made += [ActNorm(channels), InvertibleConvolution(channels)]
        made += [ChannelCoupling(channels, i % 2, width, blocks, size)]
    return made


def _image_scales(shape: Sequence[int], scales: int, steps: int, width: int, blocks: int) -> Layer:
    """Squeezing, steps, half of the channels through the next scale; the last is squeezed where its size is even."""
    channels, height, long = shape
    even = height % 2 == 0 and long % 2 == 0
    if scales == 1 and not even:
        return Scale(_steps(channels, steps, width, blocks, 3))
    smaller = None
    if scales > 1:
        smaller = _image_scales((2 * channels, height // 2, long // 2), scales - 1, steps, width, blocks)
    return Scale([], _steps(4 * channels, steps, width, blocks, 3), smaller)


def _check_coupled(shape: Sequence[int], scales: int | None) -> None:
    """Raise ValueError for images whose channels cannot be halved: one channel of an odd size."""
    odd = shape[1] % 2 or shape[2] % 2
    number_of_scales(shape, scales)
    if shape[0] < 2 and odd:
        raise ValueError(
            f"features: glow couples halves of the channels, and images of shape {tuple(shape)} have one channel and a "
            "size that cannot be halved; pad them to an even size, or take real_nvp"
        )


def glow(
    features: int | Sequence[int] | None = None,
    *,
    steps: int = 4,
    channels: int = 32,
    blocks: int = 1,
    scales: int | None = None,
    levels: int | None = None,
    margin: float | None = 0.05,
) -> Recipe:
    r"""A flow over images (N x channels x height x width) or rows of numbers, whose channels mix by learned matrices.

    .. math:: x \to e^s \odot (x + b) \to W x \to [x_A, \; x_B \odot e^{s(x_A)} + t(x_A)], \quad
              \log | \det | = H W \Bigl( \sum_c s_c + \log | \det W | \Bigr) + \sum s(x_A)

    Each step is an activation norm, an invertible 1 x 1 convolution and a coupling of half of the channels. Scales are
    those of `real_nvp`: 2 x 2 pixels squeezed into channels, the steps, half of the channels done. Activation norms
    start at the training data, when the program is built: every channel of every step then has mean 0 and variance 1.
    Rows of numbers are images of one pixel. Units, program, network and ``levels`` are those of `real_nvp`.

    Args:
        features: columns of the data, at least 2, or the shape of an image; None: as the data are.
        steps: at each scale.
        channels: width of the networks of the couplings.
        blocks: residual blocks of each coupling.
        scales: of images; None: as many as their size can be halved, at most 3.
        levels: how many values pixels have (256 for bytes divided by 255); None: rows are real numbers.
        margin: a of the logit log(y / (1 - y)), y = a + (1 - 2 a) x, of pixels; None: no logit.

    Returns:
        A recipe; it raises ValueError for data of another shape, not finite, between levels, with a constant column or
        channel, or with a value that many rows share exactly.

    Raises:
        ValueError: for an argument out of its range.

    References:
        Glow: generative flow with invertible 1x1 convolutions (Kingma and Dhariwal, 2018).

    Example:
        >>> import torch, ppl_gen as pg
        >>> from ppl_gen.inference import SVI
        >>> x = torch.randn(20, 1, 4, 4)
        >>> fit = pg.fit(glow(steps=1, channels=4), x, SVI(steps=5), seed=0)
        >>> flow = fit.module("flow")
        >>> fit.evidence().exact, torch.allclose(flow.decode(flow.encode(x)), x, atol=1e-4)
        (True, True)
    """
    shape = image_shape(features)
    require_whole("steps", steps)
    check_convolutions(channels, blocks, scales)
    pixels = Pixels(levels, margin)
    if shape:
        _check_coupled(shape, scales)
    elif features is not None:
        require_whole("features", features, 2)

    def made(size: int | tuple[int, ...]) -> list[Layer]:
        if isinstance(size, tuple):
            _check_coupled(size, scales)
            return [_image_scales(size, number_of_scales(size, scales), steps, channels, blocks)]
        require_whole("features", size, 2)
        return [_AsImages(layer) for layer in _steps(size, steps, channels, blocks, 1)]

    arguments = {"features": features, "steps": steps, "channels": channels, "levels": levels}
    return flow_recipe("glow", shape or features, made, arguments, images=True, pixels=pixels, begin=True)
