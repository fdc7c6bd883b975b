r"""Neural autoregressive flows: each column goes through a monotone network that the columns before it choose."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pyro.nn import AutoRegressiveNN
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus

from ppl_gen.errors import require_whole
from ppl_gen.models.flows.base import Layer
from ppl_gen.models.flows.recipe import checked_sizes, flow_recipe
from ppl_gen.program.program import Recipe

__all__ = ["naf", "sigmoidal"]

_LEAST = 1e-3  # slope of a unit: the inverse stays well conditioned
_HALVINGS = 60  # of the interval that holds the inverse; a Newton step then ends it


def sigmoidal(x: Tensor, raw: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    r"""The monotone network of one layer, number by number, and the logarithm of its derivative.

    .. math:: g(x) = \operatorname{logit} \sum_k w_k \, \sigma(a_k x + b_k), \quad a_k > 0, \; \sum_k w_k = 1

    Both sides of the logit are summed as logarithms: far from zero, where the sum is 0 or 1 in floating-point numbers,
    g is still exact. (Pyro's `NeuralAutoregressive` has neither that nor an inverse.)

    Args:
        x: ... x columns.
        raw: slopes, weights and shifts before softplus, softmax and nothing, ... x units x columns each.

    References:
        Neural autoregressive flows (Huang, Krueger, Lacoste and Courville, 2018), equation 8.
    """
    slopes, weights, shifts = softplus(raw[0]) + _LEAST, raw[1].log_softmax(-2), raw[2]
    inner = slopes * x.unsqueeze(-2) + shifts
    below, above = logsigmoid(inner), logsigmoid(-inner)
    low, high = (weights + below).logsumexp(-2), (weights + above).logsumexp(-2)
    log_slope = (weights + slopes.log() + below + above).logsumexp(-2) - low - high
    return low - high, log_slope


def _unsigmoidal(y: Tensor, raw: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The inverse by bisection, ended by one step of Newton's, which has the derivatives too; and the log slope there.

    g is a mean of a_k x + b_k in the sense of Kolmogorov, so it lies between the least and the greatest of them: that
    is where the bisection begins.
    """
    with torch.no_grad():
        slopes = softplus(raw[0]) + _LEAST
        ends = (y.unsqueeze(-2) - raw[2]) / slopes
        low, high = ends.amin(-2), ends.amax(-2)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            small = sigmoidal(middle, raw)[0] < y
            low, high = torch.where(small, middle, low), torch.where(small, high, middle)
        found, left = (low + high) / 2, high - low
    made, log_slope = sigmoidal(found, raw)
    step = (made - y) * (-log_slope.detach()).exp()
    # Where the network is nearly flat, rounding moves a step of Newton's far out of what the bisection has left.
    x = found - (step - step.detach() + torch.minimum(torch.maximum(step.detach(), -left), left))
    return x, sigmoidal(x, raw)[1]


class _Neural(Layer):
    """Reads rows: the density of a row is one pass, a draw one for each column."""

    def __init__(self, order: Tensor, hidden: Sequence[int], units: int) -> None:
        super().__init__()
        self.network = AutoRegressiveNN(
            len(order), list(hidden), param_dims=[units] * 3, permutation=order, nonlinearity=nn.ReLU()
        )
        last = self.network.layers[-1]
        nn.init.zeros_(last.weight)
        # Units at different places, or all of them would learn the same; near the identity together.
        columns = len(order)
        shifts = torch.linspace(-1.0, 1.0, units) if units > 1 else torch.zeros(1)
        start = torch.stack([torch.full((units,), math.log(math.expm1(1 - _LEAST))), torch.zeros(units), shifts])
        with torch.no_grad():
            last.bias.copy_(start.reshape(-1, 1).expand(-1, columns).reshape(-1))

    def to_code(self, x: Tensor) -> tuple[Tensor, Tensor]:
        made, log_slope = sigmoidal(x, self.network(x))
        return made, log_slope.sum(-1)

    def to_data(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x, log_slope = torch.zeros_like(z), torch.zeros_like(z)
        columns = torch.eye(z.shape[-1], dtype=torch.bool, device=z.device)
        for column in columns[self.network.permutation]:  # each needs those before it in the order
            found, slope = _unsigmoidal(z, self.network(x))
            x, log_slope = torch.where(column, found, x), torch.where(column, slope, log_slope)
        return x, -log_slope.sum(-1)


def naf(
    features: int | None = None,
    *,
    layers: int = 3,
    hidden: Sequence[int] = (64, 64),
    units: int = 8,
) -> Recipe:
    r"""A neural autoregressive flow over rows of numbers (N x features): `maf` with a monotone network for each column.

    .. math:: z_i = \operatorname{logit} \sum_k w_k \, \sigma(a_k x_i + b_k), \quad
              (a, w, b)_i = f(x_{<i}), \; a_k > 0, \; \sum_k w_k = 1

    One masked network gives slopes, weights and shifts of every column. Where `maf` scales and shifts, this bends: one
    layer follows several hills of a column. The density is one pass of each layer; drawing a row takes ``features``
    passes and inverts each number by bisection, to the last digits, with exact gradients. Layers take the columns in
    the order of the data and in the reverse, in turn. Units, program and network are those of `real_nvp`; it starts
    near independent normals.

    Args:
        features: columns of the data, at least 2; None: as many as they have.
        layers: autoregressive layers.
        hidden: widths of each layer's masked perceptron, each at least ``features``.
        units: sigmoids of each monotone network.

    Returns:
        A recipe; it raises ValueError for data of another shape, not finite, with a constant column, or with
        a value that many rows share exactly.

    Raises:
        ValueError: for an argument out of its range.

    References:
        Neural autoregressive flows (Huang, Krueger, Lacoste and Courville, 2018).

    Example:
        >>> import torch, ppl_gen as pg
        >>> from ppl_gen.inference import SVI
        >>> x = torch.arange(60.0).reshape(20, 3) ** 0.5
        >>> fit = pg.fit(naf(layers=1, hidden=(8,)), x, SVI(steps=5), seed=0)
        >>> flow = fit.module("flow")
        >>> torch.allclose(flow.decode(flow.encode(x)), x, atol=1e-4), fit.evidence().exact
        (True, True)
    """
    widths = checked_sizes(features, layers, hidden, smallest=features if isinstance(features, int) else 1)
    require_whole("units", units)

    def made(columns: int) -> list[Layer]:
        checked_sizes(columns, layers, widths, smallest=columns)
        order = torch.arange(columns)
        return [_Neural(order.flip(0) if i % 2 else order, widths, units) for i in range(layers)]

    arguments = {"features": features, "layers": layers, "hidden": widths, "units": units}
    return flow_recipe("naf", features, made, arguments)
