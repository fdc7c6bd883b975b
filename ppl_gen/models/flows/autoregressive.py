r"""Masked and inverse autoregressive flows: the same layers, fast in opposite directions."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from pyro.distributions.transforms import AffineAutoregressive
from pyro.distributions.transforms.utils import clamp_preserve_gradients
from pyro.nn import AutoRegressiveNN
from torch import Tensor, nn

from ppl_gen.data.inputs import check_width
from ppl_gen.models.flows.base import Layer, through
from ppl_gen.models.flows.recipe import checked_sizes, flow_recipe
from ppl_gen.program.program import Recipe

__all__ = ["iaf", "maf"]

SLOW = 8  # columns from which an inverse flow trained by maximum likelihood is worth a warning


class _Autoregressive(AffineAutoregressive):
    """Pyro's, whose inverse begins with zeros of the default dtype, which may not be that of the weights."""

    def _inverse(self, y: Tensor) -> Tensor:
        x, log_scale = torch.zeros_like(y), torch.zeros_like(y)
        columns = torch.eye(y.shape[-1], dtype=torch.bool, device=y.device)
        for column in columns[self.arn.permutation]:  # each needs those before it in the order
            mean, log_scale = self.arn(x)
            log_scale = clamp_preserve_gradients(log_scale, self.log_scale_min_clip, self.log_scale_max_clip)
            x = torch.where(column, (y - mean) * (-log_scale).exp(), x)
        self._cached_log_scale = log_scale
        return x


class _Masked(Layer):
    """An autoregressive network in one order of the columns; it reads rows (towards codes) or codes (towards rows)."""

    def __init__(self, order: Tensor, hidden: Sequence[int], reads_rows: bool) -> None:
        super().__init__()
        self.reads_rows = reads_rows
        self.network = AutoRegressiveNN(len(order), list(hidden), permutation=order, nonlinearity=nn.ReLU())
        for value in self.network.layers[-1].parameters():
            nn.init.zeros_(value)  # the flow starts at the identity

    def to_code(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.reads_rows and torch.is_grad_enabled() and x.shape[-1] >= SLOW:
            warnings.warn(
                f"iaf: gradients of the density take {x.shape[-1]} passes of each network, one for each column; for "
                "maximum likelihood take maf, whose density is one pass",
                stacklevel=2,
            )
        return through(_Autoregressive(self.network), x, inverse=not self.reads_rows)

    def to_data(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return through(_Autoregressive(self.network), z, inverse=self.reads_rows)


def _recipe(name: str, features: int | None, layers: int, hidden: Sequence[int], reads_rows: bool) -> Recipe:
    check_width("features", features)
    widths = checked_sizes(features, layers, hidden, smallest=features or 1)

    def made(columns: int) -> list[Layer]:
        checked_sizes(columns, layers, widths, smallest=columns)
        order = torch.arange(columns)
        return [_Masked(order.flip(0) if i % 2 else order, widths, reads_rows) for i in range(layers)]

    return flow_recipe(name, features, made, {"features": features, "layers": layers, "hidden": widths})


def maf(features: int | None = None, *, layers: int = 5, hidden: Sequence[int] = (64, 64)) -> Recipe:
    r"""A masked autoregressive flow over rows (N x features): fast density, slow samples.

    .. math:: z_i = e^{s_i(x_{<i})} x_i + t_i(x_{<i}), \quad
              \log \left| \det \frac{\partial z}{\partial x} \right| = \sum_i s_i(x_{<i})

    s and t read the row, so the density is one pass of each layer's masked network: the flow to take for maximum
    likelihood. Drawing a row fills its columns one by one, ``features`` passes for each layer. Layers take the columns
    in the order of the data and in the reverse, in turn. The transform is Pyro's ``AffineAutoregressive``, which holds
    s within [-5, 3], run backwards. Units, program and network are those of `real_nvp`.

    Args:
        features: columns of the data, at least 2; None: as many as they have.
        layers: autoregressive layers.
        hidden: widths of each layer's masked perceptron, each at least ``features``.

    Returns:
        A recipe; it raises ValueError for data of another shape, not finite, with a constant column, or with
        a value that many rows share exactly.

    Raises:
        ValueError: for an argument out of its range.

    References:
        Masked autoregressive flow for density estimation (Papamakarios, Pavlakou and Murray, 2017).

    Example:
        >>> import torch, ppl_gen as pg
        >>> from ppl_gen.inference import SVI
        >>> x = torch.arange(60.0).reshape(20, 3) ** 0.5
        >>> fit = pg.fit(maf(layers=1, hidden=(8,)), x, SVI(steps=5), seed=0)
        >>> jacobian = torch.autograd.functional.jacobian(fit.module("flow").encode, x[7])
        >>> (jacobian.triu(1) == 0).all(), fit.evidence().exact
        (tensor(True), True)
    """
    return _recipe("maf", features, layers, hidden, reads_rows=True)


def iaf(features: int | None = None, *, layers: int = 5, hidden: Sequence[int] = (64, 64)) -> Recipe:
    r"""An inverse autoregressive flow over rows (N x features): fast samples, slow density.

    .. math:: x_i = e^{s_i(z_{<i})} z_i + t_i(z_{<i}), \quad
              \log \left| \det \frac{\partial x}{\partial z} \right| = \sum_i s_i(z_{<i})

    s and t read the code, so drawing a row (and the density of a row just drawn) is one pass of each layer's masked
    network. The density of given rows, and with it every step of maximum likelihood, takes ``features`` passes for each
    layer: training warns of that from 8 columns on, and `maf` is the flow for it. What learns from samples
    (`Adversarial`) is what this direction is for. The transform is Pyro's ``AffineAutoregressive``.

    Args:
        features: columns of the data, at least 2; None: as many as they have.
        layers: autoregressive layers.
        hidden: widths of each layer's masked perceptron, each at least ``features``.

    Returns:
        A recipe; it raises ValueError for data of another shape, not finite, with a constant column, or with
        a value that many rows share exactly.

    Raises:
        ValueError: for an argument out of its range.

    References:
        Improving variational inference with inverse autoregressive flow (Kingma et al., 2016).

    Example:
        >>> import torch, ppl_gen as pg
        >>> from ppl_gen.inference import SVI
        >>> x = torch.arange(60.0).reshape(20, 3) ** 0.5
        >>> fit = pg.fit(iaf(layers=1, hidden=(8,)), x, SVI(steps=5), seed=0)
        >>> jacobian = torch.autograd.functional.jacobian(fit.module("flow").decode, torch.randn(3))
        >>> (jacobian.triu(1) == 0).all(), fit.evidence().exact
        (tensor(True), True)
    """
    return _recipe("iaf", features, layers, hidden, reads_rows=False)
