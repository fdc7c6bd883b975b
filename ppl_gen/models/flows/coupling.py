r"""RealNVP: affine coupling layers, equally fast in both directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from pyro.nn import DenseNN
from torch import Tensor, nn

from ppl_gen.models.flows.base import Layer, checked_sizes, flow_recipe
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


def real_nvp(features: int | None = None, *, layers: int = 8, hidden: Sequence[int] = (64, 64)) -> Recipe:
    r"""A flow of affine coupling layers over rows of numbers (N x features): density and samples are equally fast.

    .. math:: x_{1:d} = z_{1:d}, \quad x_{d+1:D} = z_{d+1:D} \odot e^{s(z_{1:d})} + t(z_{1:d}), \quad
              \log \left| \det \frac{\partial x}{\partial z} \right| = \sum_j s_j(z_{1:d})

    s and t of each layer are the two outputs of one perceptron, s held within [-5, 3]; layers change halves of the
    columns in turn, the first pair in their given order and later pairs in random orders. Columns are standardised
    inside, and the density is in the user's units. The program has no latent sites: ``SVI()`` is maximum likelihood,
    ``fit.evidence()`` exact. It starts at independent normals with the mean and standard deviation of each column.

    The network is ``fit.module("flow")``, with ``encode(x)``, ``decode(z)``, ``log_det(x)`` = log \|det dz/dx\| and
    ``log_prob(x)``.

    Args:
        features: columns of the data, at least 2; None: as many as they have.
        layers: coupling layers; with fewer than 2 half of the columns stay normal.
        hidden: widths of each layer's perceptron, with rectifiers.

    Returns:
        A recipe; it raises ValueError for data of another shape, not finite, or with a constant column.

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
    """
    widths = checked_sizes(features, layers, hidden)

    def made(columns: int) -> list[Layer]:
        checked_sizes(columns, layers, widths)
        return [_AffineCoupling(order, widths) for order in coupling_orders(columns, layers)]

    return flow_recipe("real_nvp", features, made, {"features": features, "layers": layers, "hidden": widths})
