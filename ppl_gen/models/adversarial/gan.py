r"""An implicit generative model: a network of noise, without a likelihood.

.. math:: z_i \sim \mathrm{Normal}(0, I), \quad x_i = G(z_i)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_gen.data.inputs import check_width, entries, row_shape
from ppl_gen.errors import require_whole
from ppl_gen.nn.networks import checked_widths
from ppl_gen.program.program import Program, Recipe

__all__ = ["gan"]


def gan(features: int | None = None, *, latent: int = 16, hidden: Sequence[int] = (128, 128)) -> Recipe:
    r"""Rows made by a perceptron from normal noise, x = G(z): a program that has samples and no density.

    .. math:: z_i \sim \mathrm{Normal}(0, I_{latent}), \quad x_i \sim \mathrm{Delta}(G(z_i))

    `Adversarial` objectives learn it; what needs a density raises `IncompatibleError`. The network works in
    standardised units: its output is multiplied by each column's standard deviation in the training data and shifted
    by its mean, so that the rows come out in the user's units.

    Sites: ``z`` (latent) and ``x`` for each row. The network is ``fit.module("generator")``, from noise to rows.

    Args:
        features: numbers in each row of ``x`` (the product of its shape); None: as many as the data have.
        latent: numbers in each row of ``z``.
        hidden: widths of the layers between, with rectifiers; empty: G is affine.

    Returns:
        A recipe; it raises ValueError for data whose rows do not hold ``features`` numbers.

    Raises:
        ValueError: for a size that is no whole number of at least 1.

    References:
        Generative Adversarial Networks (Goodfellow et al., 2014).

    Example:
        >>> import torch, ppl_gen as pg
        >>> print(pg.check(gan(latent=4, hidden=(8,)), torch.randn(5, 2)))  # doctest: +ELLIPSIS
        gan: data plate 'data' over 5 rows
        site                         kind       distribution  batch  event   plates  guide
        z                            latent     Normal        [5]    [4]     data    -
        x                            observed   Delta         [5]    [2]     data    -
        generator$$$layers.0.weight  parameter                       [8, 4]
        ...
        offers: codes, data plate, differentiable latents, differentiable samples, latent sites, samples
    """
    check_width("features", features)
    require_whole("latent", latent)
    widths = checked_widths(hidden, "relu")

    def build(data: Any) -> Program:
        (x,) = entries(data, "gan", "x")
        assert x is not None  # the first entry
        if features is not None and (x.dim() == 0 or x[:1].numel() != features):
            raise ValueError(
                f"features: gan was made for {features} number(s) per row, got data of shape {tuple(x.shape)}"
            )
        if features is None and x.dim() > 1:
            row_shape(data, "gan")  # refuses what may be one row
        if bool((x == x[:1]).all()):
            raise ValueError(f"data: all {len(x)} row(s) are equal, and gan needs rows that differ")
        return _program(_Generator(latent, widths, x), latent, x.dim() - 1)

    return Recipe(build, name="gan", arguments={"features": features, "latent": latent, "hidden": widths})


class _Generator(nn.Module):
    """A perceptron from noise to rows in the units of the data it was made for."""

    loc: Tensor
    scale: Tensor

    def __init__(self, latent: int, hidden: Sequence[int], rows: Tensor) -> None:
        super().__init__()
        self.event = tuple(rows.shape[1:])
        flat = rows.flatten(1) if rows.dim() > 1 else rows.unsqueeze(-1)
        wide = flat.to(torch.get_default_dtype())
        sizes = [latent, *hidden]
        layers: list[nn.Module] = []
        for before, after in zip(sizes[:-1], sizes[1:], strict=True):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], flat.shape[1]))
        self.register_buffer("loc", wide.mean(0))
        self.register_buffer("scale", wide.std(0, correction=0))

    def forward(self, z: Tensor) -> Tensor:
        x = self.loc + self.scale * self.layers(z)
        return x.reshape(*z.shape[:-1], *self.event)


def _program(generator: nn.Module, latent: int, event_dim: int) -> Program:
    def gan(x: Tensor) -> None:
        pyro.module("generator", generator)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(latent), 1.0).to_event(1))
            pyro.sample("x", dist.Delta(generator(z), event_dim=event_dim), obs=x)

    return Program(gan)
