r"""A deep convolutional generator of images: transposed convolutions of noise, with batch norm.

.. math:: z_i \sim \mathrm{Normal}(0, I), \quad x_i = a + (b - a) \, \tfrac12 (1 + \tanh G(z_i))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_gen.data.inputs import entries, row_shape
from ppl_gen.errors import require_whole
from ppl_gen.nn.images import LARGE_ENOUGH, Writer, image_shape, is_image
from ppl_gen.program.program import Program, Recipe

__all__ = ["Shades", "dcgan", "images_of"]


def dcgan(shape: Sequence[int] | None = None, *, latent: int = 100, filters: int = 64) -> Recipe:
    r"""Images made from normal noise by transposed convolutions with batch norm, x = G(z): samples and no density.

    .. math:: z_i \sim \mathrm{Normal}(0, I_{latent}), \quad x_i \sim \mathrm{Delta}(G(z_i))

    The noise is projected to maps of at most 7 x 7 pixels, which transposed convolutions double up to the image, each
    with half as many channels; batch norm and a rectifier follow all of them but the last, whose tanh spans the range
    of each channel in the training data. `Adversarial` objectives learn it, by default against the convolutional
    discriminator of the same paper (`ConvolutionalCritic`).

    Batch norm: in training, rows are normalised by their batch, so batches of some dozens are needed; running averages
    are part of the fit, are saved with it, and are what ``fit.sample`` and ``fit.module("generator")`` use, so that
    there no row depends on another. They belong to the last parameters, so ``Adversarial(averaging=...)`` keeps those.

    Sites: ``z`` (latent) and ``x`` for each row. The network is ``fit.module("generator")``, from noise to images.

    Args:
        shape: (channels, height, width) of an image, the longer side at least 8 pixels and the shorter at least 4;
            None: that of the rows of the data.
        latent: numbers in each row of ``z``.
        filters: channels of the finest maps but the image; twice as many at each coarser one.

    Returns:
        A recipe; it raises ValueError for rows of another shape, or that are all equal.

    Raises:
        ValueError: for an argument out of its range.

    References:
        Unsupervised representation learning with deep convolutional generative adversarial networks (Radford, Metz and
        Chintala, 2016): there the noise is uniform and filters are 128.

    Example:
        >>> import torch, ppl_gen as pg
        >>> from ppl_gen.inference import SVI, Adversarial
        >>> images = torch.rand(40, 1, 8, 8)
        >>> fit = pg.fit(dcgan(latent=4, filters=4), images, SVI(Adversarial(), steps=2), seed=0)
        >>> fit.sample(3)["x"].shape
        torch.Size([3, 1, 8, 8])
    """
    given = None if shape is None else image_shape("shape", shape)
    require_whole("latent", latent)
    require_whole("filters", filters)

    def build(data: Any) -> Program:
        x = images_of(data, "dcgan", given)
        generator = nn.Sequential(Writer(x.shape[1:], int(filters), int(latent)), Shades(x))
        return _program(generator, int(latent))

    return Recipe(build, name="dcgan", arguments={"shape": given, "latent": latent, "filters": filters})


def images_of(data: Any, program: str, given: Sequence[int] | None) -> Tensor:
    """The entry x, rows x channels x height x width.

    Raises:
        ValueError: for rows that are no images, of another shape than ``given``, or all equal.
    """
    (x,) = entries(data, program, "x")
    assert x is not None  # the first entry
    if not is_image(row_shape(data, program)):
        got = tuple(x.shape)
        raise ValueError(f"data: {program} takes images, rows x {LARGE_ENOUGH}, got data of shape {got}")
    if given is not None and tuple(x.shape[1:]) != tuple(given):
        raise ValueError(
            f"data: {program} was made for rows of shape {tuple(given)}, got data of shape {tuple(x.shape)}"
        )
    if bool((x == x[:1]).all()):
        raise ValueError(f"data: all {len(x)} row(s) are equal, and {program} needs rows that differ")
    return x


class Shades(nn.Module):
    """Real numbers to shades, ... x image -> ... x image: by tanh into the range of each channel of some images."""

    low: Tensor
    span: Tensor

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        wide = images.to(torch.get_default_dtype())
        low, high = wide.amin((0, 2, 3)), wide.amax((0, 2, 3))
        self.register_buffer("low", low[:, None, None].clone())
        self.register_buffer("span", (high - low)[:, None, None].clone())

    def forward(self, raw: Tensor) -> Tensor:
        return self.low + self.span * (0.5 * (1.0 + raw.tanh()))


def _program(generator: nn.Module, latent: int) -> Program:
    def dcgan(x: Tensor) -> None:
        pyro.module("generator", generator)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(latent), 1.0).to_event(1))
            pyro.sample("x", dist.Delta(generator(z), event_dim=3), obs=x)

    return Program(dcgan)
