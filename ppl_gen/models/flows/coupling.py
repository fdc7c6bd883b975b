r"""RealNVP: affine coupling layers, equally fast in both directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from pyro.nn import DenseNN
from torch import Tensor, nn

from ppl_gen.models.flows.base import Layer
from ppl_gen.models.flows.image_layers import (
    BatchNorm,
    ChannelCoupling,
    CheckerboardCoupling,
    Scale,
    number_of_scales,
)
from ppl_gen.models.flows.recipe import Pixels, check_convolutions, checked_sizes, flow_recipe, image_shape
from ppl_gen.program.program import Recipe

__all__ = ["Coupling", "clamped", "coupling_orders", "real_nvp"]

LOG_SCALES = (-5.0, 3.0)


def coupling_orders(features: int, layers: int) -> list[Tensor]:
    """The order of the columns before each coupling layer, whose first half stays as it is.

    Layers come in pairs, an order and its reverse, so that every column is changed; the first pair has the order of the
    data, and later ones a random order, drawn under the fit's seed, since halves that never mix would limit the flow.
    """
    orders: list[Tensor] = []
    while len(orders) < layers:
        order = torch.randperm(features) if orders else torch.arange(features)
        orders += [order, order.flip(0)]
    return orders[:layers]


class Coupling(Layer):
    """The second half of the columns, in the layer's order, is changed as a perceptron of the first half says.

    Inside, columns are the first dimension: halves are then pieces of memory, a new order moves whole rows of it, and
    sums over columns run over many rows at a time.

    Args:
        order: of the columns.
        hidden: widths of the perceptron.
        sizes: how many numbers it gives of each kind.
    """

    order: Tensor

    def __init__(self, order: Tensor, hidden: Sequence[int], sizes: Callable[[int], list[int]]) -> None:
        super().__init__()
        self.register_buffer("order", order)
        self.kept = len(order) // 2
        self.sizes = sizes(len(order) - self.kept)
        self.network = DenseNN(self.kept, list(hidden), self.sizes, nonlinearity=nn.ReLU())
        for value in self.network.layers[-1].parameters():
            nn.init.zeros_(value)  # the flow starts at the identity

    def change(self, changed: Tensor, raw: Sequence[Tensor], inverse: bool) -> tuple[Tensor, Tensor]:
        """The second half (columns x rows) by the network's numbers (each kind x rows); and log slopes, of its shape.

        Towards the rows, or ``inverse``: towards the codes.
        """
        raise NotImplementedError

    def _run(self, value: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        columns = value.reshape(-1, value.shape[-1]).mT.index_select(0, self.order)
        kept, changed = columns.split([self.kept, len(columns) - self.kept])
        raw = _perceptron(self.network, kept).split(self.sizes)
        made, log_slopes = self.change(changed, raw, inverse)
        columns = torch.cat([kept, made]).index_select(0, self.order.argsort())
        return columns.mT.reshape(value.shape), log_slopes.sum(0).reshape(value.shape[:-1])

    def to_code(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._run(x, inverse=True)

    def to_data(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._run(z, inverse=False)


def _perceptron(network: DenseNN, columns: Tensor) -> Tensor:
    """The network of columns x rows: the same products as of rows x columns, and outputs x rows as result."""
    *hidden, last = network.layers
    for layer in hidden:
        columns = torch.addmm(layer.bias[:, None], layer.weight, columns).relu_()
    return torch.addmm(last.bias[:, None], last.weight, columns)


class _AffineCoupling(Coupling):
    """The second half is scaled and shifted."""

    def __init__(self, order: Tensor, hidden: Sequence[int]) -> None:
        super().__init__(order, hidden, lambda changed: [changed, changed])

    def change(self, changed: Tensor, raw: Sequence[Tensor], inverse: bool) -> tuple[Tensor, Tensor]:
        shift, log_scale = raw[0], clamped(raw[1])
        if inverse:
            return (changed - shift) * (-log_scale).exp(), -log_scale
        return torch.addcmul(shift, changed, log_scale.exp()), log_scale


def clamped(log_scale: Tensor) -> Tensor:
    """Within [-5, 3], with the gradient that it has without: a scale that has gone too far can come back."""
    if not (torch.is_grad_enabled() and log_scale.requires_grad):
        return log_scale.clamp(*LOG_SCALES)
    fixed = log_scale.detach()
    return log_scale + (fixed.clamp(*LOG_SCALES) - fixed)


def _image_scales(shape: Sequence[int], scales: int, width: int, blocks: int) -> Layer:
    """Three checkerboard couplings, squeezing, three channel couplings, half of them through the next scale."""

    def normed(couplings: Sequence[Layer], channels: int) -> list[Layer]:
        return [layer for coupling in couplings for layer in (coupling, BatchNorm(channels))]

    channels, height, long = shape
    boards = [CheckerboardCoupling(shape, i % 2, width, blocks) for i in range(3 if scales > 1 else 4)]
    if scales == 1:
        return Scale([*normed(boards[:-1], channels), boards[-1]])
    halves = [ChannelCoupling(4 * channels, i % 2, width, blocks) for i in range(3)]
    smaller = _image_scales((2 * channels, height // 2, long // 2), scales - 1, width, blocks)
    return Scale(normed(boards, channels), normed(halves, 4 * channels), smaller)


def real_nvp(
    features: int | Sequence[int] | None = None,
    *,
    layers: int = 8,
    hidden: Sequence[int] = (64, 64),
    channels: int = 32,
    blocks: int = 2,
    scales: int | None = None,
    levels: int | None = None,
    margin: float | None = 0.05,
) -> Recipe:
    r"""A flow of affine coupling layers over rows of numbers, or over images: density and samples are equally fast.

    .. math:: x_{1:d} = z_{1:d}, \quad x_{d+1:D} = z_{d+1:D} \odot e^{s(z_{1:d})} + t(z_{1:d}), \quad
              \log \left| \det \frac{\partial x}{\partial z} \right| = \sum_j s_j(z_{1:d})

    s and t of each layer are the two outputs of one perceptron, s held within [-5, 3]; layers change halves of the
    columns in turn, the first pair in their given order and later pairs in random orders. Columns are standardised
    inside, and the density is in the user's units. The program has no latent sites: ``SVI()`` is maximum likelihood,
    ``fit.evidence()`` exact. It starts at independent normals with the mean and standard deviation of each column.

    Rows of channels x height x width go through several scales: three couplings of a checkerboard, 2 x 2 pixels
    squeezed into channels, three couplings of halves of the channels, half of the channels done; the last scale has
    four of a checkerboard. s and t are then convolutions with residual blocks, and batch norm without gain and shift
    follows each coupling: the loss of training has the statistics of the batch, evidence and samples running averages.

    With ``levels`` rows are pixels, 0, 1 / (levels - 1), ..., 1: a density of numbers evenly in the interval of each
    pixel, site ``dequantised``, through the logit; see `nice` and `bits_per_dimension`. The evidence is then estimated.

    The network is ``fit.module("flow")``, with ``encode(x)``, ``decode(z)``, ``log_det(x)`` = log \|det dz/dx\| and
    ``log_prob(x)``.

    Args:
        features: columns of the data, at least 2, or the shape of an image; None: as the data are.
        layers: coupling layers, of columns; with fewer than 2 half of the columns stay normal.
        hidden: widths of each layer's perceptron, with rectifiers, of columns.
        channels: width of the convolutions, of images.
        blocks: residual blocks of each coupling, of images.
        scales: of images; None: as many as their size can be halved, at most 3 (28, 14 and 7 pixels).
        levels: how many values pixels have (256 for bytes divided by 255); None: rows are real numbers.
        margin: a of the logit log(y / (1 - y)), y = a + (1 - 2 a) x, of pixels; None: no logit.

    Returns:
        A recipe; it raises ValueError for data of another shape, not finite, between levels, with a constant column or
        channel, or with a value that many rows share exactly.

    Raises:
        ValueError: for an argument out of its range.

    References:
        Density estimation using Real NVP (Dinh, Sohl-Dickstein and Bengio, 2017).

    Example:
        >>> import torch, ppl_gen as pg
        >>> from ppl_gen.inference import SVI
        >>> x = torch.arange(40.0).reshape(20, 2)
        >>> fit = pg.fit(real_nvp(layers=2, hidden=(8,)), x, SVI(steps=5), seed=0)
        >>> fit.evidence().exact, fit.sample(3)["x"].shape
        (True, torch.Size([3, 2]))
        >>> flow = fit.module("flow")
        >>> torch.allclose(flow.decode(flow.encode(x)), x, atol=1e-4)
        True
        >>> images = (torch.arange(20 * 16).reshape(20, 1, 4, 4) % 7 < 3).float()
        >>> fit = pg.fit(real_nvp(channels=4, blocks=1, levels=2), images, SVI(steps=5), seed=0)
        >>> fit.evidence().exact, fit.sample(3)["x"].unique()
        (False, tensor([0., 1.]))
    """
    shape = image_shape(features)
    widths = checked_sizes(None if shape else features, layers, hidden)
    check_convolutions(channels, blocks, scales)
    pixels = Pixels(levels, margin)
    if shape:
        number_of_scales(shape, scales)

    def made(size: int | tuple[int, ...]) -> list[Layer]:
        if isinstance(size, tuple):
            return [_image_scales(size, number_of_scales(size, scales), channels, blocks)]
        checked_sizes(size, layers, widths)
        return [_AffineCoupling(order, widths) for order in coupling_orders(size, layers)]

    arguments = {"features": features, "layers": layers, "hidden": widths, "levels": levels}
    return flow_recipe("real_nvp", shape or features, made, arguments, images=True, pixels=pixels)
