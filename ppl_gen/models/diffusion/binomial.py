"""Binomial diffusion: rows of zeros and ones, whose bits are flipped until they are fair coins, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ppl_gen.data.inputs import checked_shape, entries, row_shape
from ppl_gen.models.diffusion.bits import BitDenoiser, BitDiffusion, erasing_schedule
from ppl_gen.models.diffusion.networks import check_network, time_network
from ppl_gen.nn.likelihoods import as_handed_out, log_odds, zeros_and_ones
from ppl_gen.program.program import Program, Recipe

__all__ = ["binomial_diffusion"]


def binomial_diffusion(
    features: int | Sequence[int] | None = None, *, steps: int = 50, hidden: int | None = None, layers: int = 3
) -> Recipe:
    r"""A diffusion model of rows of zeros and ones (N x features), or of images of them (N x c x height x width).

    .. math:: \log p(b_0) \ge \mathbb{E}_q \Bigl[ \log p(b_0 \mid b_1)
              - \sum_{t=2}^{T} \mathrm{KL}(q(b_{t-1} \mid b_t, b_0) \,\|\, p(b_{t-1} \mid b_t)) \Bigr]
              - \mathrm{KL}(q(b_T \mid b_0) \,\|\, p(b_T))

    A bit is replaced by a fair coin with chance 1 / (T - t + 1) at step t, so that each step erases as much as any
    other and nothing is left at the end. The sites are ``x_T`` ... ``x_1`` and ``x``, and all is learned and asked as
    of `denoising_diffusion`: ``ELBO()`` at sampled time steps, ``fit.sample``, ``fit.evidence``, and ``fit.predict``
    with a ``mask`` for rows that are seen in part. The guide is fixed. The network is ``denoiser``; untrained, it makes
    independent bits with the frequencies of the data.

    Args:
        features: columns of the data, or the shape (channels, height, width) of an image; None: the shape of the data.
        steps: T, at least 2.
        hidden: width of the network: of the layers of a perceptron (64 where None), or, for images, channels of the
            first level of a U-Net (16).
        layers: hidden layers of the perceptron, or levels of the U-Net, each of half the resolution.

    Returns:
        A recipe; it raises ValueError for data of another shape, or that are not zeros and ones.

    Raises:
        ValueError: for an argument out of its range.

    References:
        Deep unsupervised learning using nonequilibrium thermodynamics (Sohl-Dickstein et al., 2015).

    Example:
        >>> import torch, ppl_gen as pg
        >>> from ppl_gen.inference import SVI
        >>> x = torch.eye(4).repeat(10, 1)
        >>> fit = pg.fit(binomial_diffusion(steps=10, hidden=16), x, SVI(steps=5), seed=0)
        >>> fit.sample(3)["x"].shape, fit.notes["gradients"]
        (torch.Size([3, 4]), 'one of 10 time steps sampled per row')
    """
    given = None if features is None else checked_shape(features)
    check_network(hidden, layers, given)
    noising = erasing_schedule(steps)

    def build(data: Any) -> Program:
        shape = row_shape(data, "binomial_diffusion") if given is None else given
        check_network(hidden, layers, shape)
        rows = _bits(data, shape)
        reverse = BitDenoiser(log_odds(rows).sigmoid(), noising, time_network(shape, hidden, layers))
        return BitDiffusion(noising, reverse, shape).program("binomial_diffusion")

    return Recipe(build, name="binomial_diffusion", arguments={"features": features, "steps": steps})


def _bits(data: Any, shape: tuple[int, ...]) -> Tensor:
    (rows,) = entries(data, "binomial_diffusion", "x")
    assert rows is not None
    if tuple(rows.shape[1:]) != shape or rows.dim() < 2:
        wanted = f"{shape[0]} columns" if len(shape) == 1 else f"shape {shape}"
        raise ValueError(f"data: binomial_diffusion takes rows of {wanted}, got {tuple(rows.shape)}")
    zeros_and_ones(as_handed_out(data, rows), "binomial_diffusion")
    return rows
