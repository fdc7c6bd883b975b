r"""A recurrent generator of images: the sum of canvases that one encoder and one decoder draw in turn.

.. math:: h_z = \tanh(W z + b), \quad \Delta C_t = f(h_z, g(\Delta C_{t-1})), \quad
          x = \sigma\Bigl(\sum_t \Delta C_t\Bigr)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_gen.errors import require_whole
from ppl_gen.models.adversarial.dcgan import Shades, images_of
from ppl_gen.nn.images import ConvolutionalCritic, Writer, image_shape
from ppl_gen.program.program import Program, Recipe

__all__ = ["gran"]


def gran(
    shape: Sequence[int] | None = None, *, latent: int = 60, steps: int = 3, hidden: int = 100, filters: int = 32
) -> Recipe:
    r"""Images drawn in several strokes, each by one decoder from the noise and what it drew last: samples, no density.

    .. math:: h_z = \tanh(W z + b), \quad h_t = g(\Delta C_{t-1}), \; h_1 = 0, \quad \Delta C_t = f(h_z, h_t), \quad
              x = \sigma\Bigl(\sum_{t=1}^{T} \Delta C_t\Bigr)

    The decoder f and the encoder g are the same at every step: transposed convolutions, and convolutions that mirror
    them. :math:`\sigma` spans the range of each channel in the training data. There is no batch norm: its running
    averages would mix those of all steps, and be right at none. `Adversarial` objectives learn it.

    Sites: ``z`` (latent) and ``x`` for each row. The network is ``fit.module("generator")``, from noise to images;
    ``fit.module("generator").canvases(z)`` are the strokes, steps x rows x image, before they are added and squeezed.

    Args:
        shape: (channels, height, width) of an image, the longer side at least 8 pixels and the shorter at least 4;
            None: that of the rows of the data.
        latent: numbers in each row of ``z``.
        steps: T, how many canvases are added.
        hidden: numbers that h_z and h_t have each.
        filters: channels of the finest maps but the image, of decoder and encoder.

    Returns:
        A recipe; it raises ValueError for rows of another shape, or that are all equal.

    Raises:
        ValueError: for an argument out of its range.

    References:
        Generating images with recurrent adversarial networks (Im, Kim, Jiang and Memisevic, 2016).

    Example:
        >>> import torch, ppl_gen as pg
        >>> from ppl_gen.inference import SVI, Adversarial
        >>> images = torch.rand(20, 1, 8, 8)
        >>> fit = pg.fit(gran(latent=2, hidden=4, filters=2), images, SVI(Adversarial(), steps=2), seed=0)
        >>> fit.module("generator").canvases(torch.randn(5, 2)).shape
        torch.Size([3, 5, 1, 8, 8])
    """
    given = None if shape is None else image_shape("shape", shape)
    for name, value in (("latent", latent), ("steps", steps), ("hidden", hidden), ("filters", filters)):
        require_whole(name, value)

    def build(data: Any) -> Program:
        x = images_of(data, "gran", given)
        generator = _Recurrent(x, int(latent), int(steps), int(hidden), int(filters))
        return _program(generator, int(latent))

    arguments = {"shape": given, "latent": latent, "steps": steps, "hidden": hidden, "filters": filters}
    return Recipe(build, name="gran", arguments=arguments)


class _Recurrent(nn.Module):
    def __init__(self, images: Tensor, latent: int, steps: int, hidden: int, filters: int) -> None:
        super().__init__()
        shape = images.shape[1:]
        self.steps, self.hidden = steps, hidden
        self.noise = nn.Linear(latent, hidden)
        self.decoder = Writer(shape, filters, 2 * hidden, normed=False)
        self.encoder = ConvolutionalCritic(shape, filters=filters, norm="none", outputs=hidden)
        self.shades = Shades(images)

    def canvases(self, z: Tensor) -> Tensor:
        """The strokes: ... x latent -> steps x ... x image."""
        read = self.noise(z.reshape(-1, z.shape[-1])).tanh()
        seen, drawn = torch.zeros_like(read), []
        for t in range(self.steps):
            drawn.append(self.decoder(torch.cat([read, seen], 1)))
            if t < self.steps - 1:
                seen = self.encoder(drawn[-1]).tanh()
        return torch.stack(drawn).unflatten(1, z.shape[:-1])

    def forward(self, z: Tensor) -> Tensor:
        images: Tensor = self.shades(self.canvases(z).sum(0))
        return images


def _program(generator: nn.Module, latent: int) -> Program:
    def gran(x: Tensor) -> None:
        pyro.module("generator", generator)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(latent), 1.0).to_event(1))
            pyro.sample("x", dist.Delta(generator(z), event_dim=3), obs=x)

    return Program(gran)
