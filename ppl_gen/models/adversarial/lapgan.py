r"""A pyramid of generators: a coarse image from noise, then at every finer scale what the enlarged image lacks.

.. math:: I_K = G_K(z_K), \quad I_k = \mathrm{up}(I_{k+1}) + G_k(z_k, \mathrm{up}(I_{k+1})), \quad x = I_0
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate

from ppl_gen.errors import require_whole
from ppl_gen.models.adversarial.dcgan import images_of
from ppl_gen.nn.images import image_shape
from ppl_gen.nn.networks import Perceptron, checked_widths
from ppl_gen.program.program import Program, Recipe

__all__ = ["enlarged", "from_pyramid", "halved", "lapgan", "laplacian_pyramid"]


def lapgan(
    shape: Sequence[int] | None = None,
    *,
    levels: int | None = None,
    latent: int = 100,
    filters: int = 64,
    hidden: Sequence[int] = (256, 256),
) -> Recipe:
    r"""Images made from coarse to fine, a generator for each scale of a Laplacian pyramid: samples and no density.

    .. math:: I_K = G_K(z_K), \quad I_k = \mathrm{up}(I_{k+1}) + h_k, \quad h_k = G_k(z_k, \mathrm{up}(I_{k+1})), \quad
              x = I_0

    Down is the mean of 2 x 2 pixels, up repeats them. In the data h_k = I_k - up(down(I_k)), so that the pyramid of an
    image is its coarsest I_K with h_{K-1} ... h_0, and gives it back exactly (`laplacian_pyramid`, `from_pyramid`).

    ``SVI(ConditionalAdversarial())`` learns it as published: a conditional adversarial network at every scale, whose
    generator is given the enlarged *observed* image. ``SVI(Adversarial())`` trains the whole of it end to end
    against one critic of all scales.

    Sites: for each row the noise ``z`` of the coarsest image and ``z_k`` of scale k (1 x height x width); observed
    ``coarse``, then ``level_k`` down to ``x``, which are the I_k, not the h_k. Networks: ``fit.module("coarse")``, and
    ``fit.module("detail_k")``, called with the enlarged image and the noise. No network squeezes its output, so pixels
    may lie a little outside of the range of the data.

    Args:
        shape: (channels, height, width) of an image; None: that of the rows of the data.
        levels: K, how often the image is halved; its height and width must be divisible by 2^K. None: as often as they
            can be halved down to 7 pixels at most.
        latent: numbers in each row of ``z``.
        filters: channels of the two hidden layers of each G_k, convolutions of 5 x 5.
        hidden: widths of the layers of G_K, a perceptron with rectifiers.

    Returns:
        A recipe; it raises ValueError for rows of another shape, or whose sides cannot be halved so often.

    Raises:
        ValueError: for an argument out of its range.

    References:
        Deep generative image models using a Laplacian pyramid of adversarial networks (Denton, Chintala, Szlam and
        Fergus, 2015); the Laplacian pyramid as a compact image code (Burt and Adelson, 1983).

    Example:
        >>> import torch, ppl_gen as pg
        >>> recipe = lapgan(levels=1, latent=4, filters=4, hidden=(8,))
        >>> info = pg.check(recipe, torch.rand(20, 1, 8, 8))
        >>> [site.name for site in info.select(kind="observed")]
        ['coarse', 'x']
    """
    given = None if shape is None else image_shape("shape", shape)
    if levels is not None:
        require_whole("levels", levels)
    require_whole("latent", latent)
    require_whole("filters", filters)
    widths = checked_widths(hidden, "relu")
    if given is not None:
        _depth(given, levels)

    def build(data: Any) -> Program:
        x = images_of(data, "lapgan", given)
        x = x if x.is_floating_point() else x.to(torch.get_default_dtype())
        depth = _depth(x.shape[1:], levels)
        bands = laplacian_pyramid(x, depth)
        coarse = _Coarse(bands[-1], int(latent), widths)
        details = [_Detail(band, int(filters)) for band in bands[:-1]]
        return _program(coarse, details, int(latent))

    arguments = {"shape": given, "levels": levels, "latent": latent, "filters": filters, "hidden": widths}
    return Recipe(build, name="lapgan", arguments=arguments)


def _depth(shape: Sequence[int], levels: int | None) -> int:
    _, height, width = shape
    most = next(k for k in range(64) if height % 2 ** (k + 1) or width % 2 ** (k + 1))
    wanted = int(levels) if levels is not None else next((k for k in range(most) if max(shape[1:]) / 2**k <= 7), most)
    if not 1 <= wanted <= most:
        raise ValueError(
            f"levels: images of {height} x {width} pixels can be halved {most} time(s), got {levels or 'none'}; "
            "crop or pad them, or take dcgan"
        )
    return wanted


def halved(images: Tensor) -> Tensor:
    """The mean of every 2 x 2 pixels: ... x channels x height x width -> half of height and width."""
    small = avg_pool2d(images.reshape(-1, *images.shape[-3:]), 2)
    return small.reshape(*images.shape[:-3], *small.shape[1:])


def enlarged(images: Tensor) -> Tensor:
    """Every pixel repeated as 2 x 2 of them: ... x channels x height x width -> twice height and width."""
    large = interpolate(images.reshape(-1, *images.shape[-3:]), scale_factor=2, mode="nearest")
    return large.reshape(*images.shape[:-3], *large.shape[1:])


def laplacian_pyramid(images: Tensor, levels: int) -> list[Tensor]:
    r"""What each scale of images adds to the coarser one, :math:`h_k = I_k - up(down(I_k))`, and last the coarsest.

    Args:
        images: rows x channels x height x width, sides divisible by ``2 ** levels``.
        levels: how often they are halved.

    Returns:
        ``levels + 1`` tensors, the finest first; `from_pyramid` gives the images back.

    Raises:
        ValueError: for another shape, or sides that cannot be halved so often.

    Source: Burt and Adelson (1983).

    Example:
        >>> bands = laplacian_pyramid(torch.rand(3, 1, 8, 8), 2)
        >>> [tuple(band.shape[2:]) for band in bands]
        [(8, 8), (4, 4), (2, 2)]
    """
    given: Any = images  # whatever was passed
    require_whole("levels", levels)
    if not isinstance(given, Tensor) or not given.is_floating_point() or given.dim() != 4 or not given.numel():
        got = f"{given.dtype} of shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(f"images: expected a tensor of real numbers, rows x channels x height x width, got {got}")
    if given.shape[2] % 2**levels or given.shape[3] % 2**levels:
        size = f"{given.shape[2]} x {given.shape[3]}"
        raise ValueError(f"levels: expected sides that are divisible by 2^{levels}, got images of {size} pixels")
    bands = []
    for _ in range(levels):
        small = halved(images)
        bands.append(images - enlarged(small))
        images = small
    return [*bands, images]


def from_pyramid(bands: Sequence[Tensor]) -> Tensor:
    """The images of a `laplacian_pyramid`, rows x channels x height x width.

    Raises:
        ValueError: for tensors that are not each half as high and wide as the one before.

    Example:
        >>> images = torch.rand(3, 1, 8, 8)
        >>> torch.allclose(from_pyramid(laplacian_pyramid(images, 2)), images)
        True
    """
    given: Any = bands  # whatever was passed
    fine = isinstance(given, Sequence) and len(given) and all(isinstance(b, Tensor) and b.dim() == 4 for b in given)
    sizes = [tuple(band.shape) for band in given] if fine else []
    if not fine or any(
        large != (*small[:2], 2 * small[2], 2 * small[3]) for large, small in zip(sizes[:-1], sizes[1:], strict=True)
    ):
        raise ValueError(
            f"bands: expected the tensors of a pyramid, the finest first, got {sizes or type(given).__name__}"
        )
    images: Tensor = given[-1]
    for band in reversed(given[:-1]):
        images = enlarged(images) + band
    return images


class _Coarse(nn.Module):
    """Noise to the coarsest image, in the units of those it was made for."""

    loc: Tensor
    scale: Tensor

    def __init__(self, images: Tensor, latent: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.network = Perceptron(latent, hidden, prod(images.shape[1:]), activation="relu")
        _keeping_scale(self.network)
        self.register_buffer("loc", images.mean(0))
        self.register_buffer("scale", images.std(0, correction=0))

    def forward(self, z: Tensor) -> Tensor:
        return self.loc + self.scale * self.network(z).unflatten(-1, self.loc.shape)


def _keeping_scale(network: nn.Module) -> None:
    """Outputs start with mean 0 and variance 1 for normal noise: rectifiers halve the mean square, weights double it.

    At torch's initial weights they have a tenth of that spread about biases, and a critic that finds one image
    everywhere drives the program after it in a circle, all rows together: it never spreads.
    """
    for i, layer in enumerate(m for m in network.modules() if isinstance(m, nn.Linear)):
        nn.init.normal_(layer.weight, 0.0, ((2.0 if i else 1.0) / layer.in_features) ** 0.5)
        nn.init.zeros_(layer.bias)


class _Detail(nn.Module):
    """What an enlarged image lacks, from it and a noise image: ... x channels x height x width."""

    centre: Tensor
    scale: Tensor

    def __init__(self, band: Tensor, filters: int) -> None:
        super().__init__()
        channels = band.shape[1]
        self.layers = nn.Sequential(
            nn.Conv2d(channels + 1, filters, 5, padding=2),
            nn.ReLU(),
            nn.Conv2d(filters, filters, 5, padding=2),
            nn.ReLU(),
            nn.Conv2d(filters, channels, 5, padding=2),
        )
        scale = band.std(correction=0)
        self.register_buffer("scale", torch.where(scale > 0, scale, torch.ones_like(scale)))

    def forward(self, low: Tensor, noise: Tensor) -> Tensor:
        seen = torch.cat([low / self.scale, noise], -3)
        raw: Tensor = self.layers(seen.reshape(-1, *seen.shape[-3:]))
        return self.scale * raw.reshape(*seen.shape[:-3], *raw.shape[1:])


def _program(coarse: nn.Module, details: Sequence[nn.Module], latent: int) -> Program:
    def lapgan(x: Tensor) -> None:
        pyro.module("coarse", coarse)
        for k, detail in enumerate(details):
            pyro.module(f"detail_{k}", detail)
        images = [x if x.is_floating_point() else x.to(torch.get_default_dtype())]
        for _ in details:
            images.append(halved(images[-1]))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(latent), 1.0).to_event(1))
            image = pyro.sample("coarse", dist.Delta(coarse(z), event_dim=3), obs=images[-1])
            for k in reversed(range(len(details))):
                low = enlarged(image)
                blank = torch.zeros(1, *low.shape[-2:])
                noise = pyro.sample(f"z_{k}", dist.Normal(blank, 1.0).to_event(3))
                made = dist.Delta(low + details[k](low, noise), event_dim=3)
                image = pyro.sample("x" if k == 0 else f"level_{k}", made, obs=images[k])

    return Program(lapgan)
