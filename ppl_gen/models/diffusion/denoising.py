"""Denoising diffusion of vectors and images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ppl_gen.arguments import require_choice
from ppl_gen.data.inputs import checked_shape, entries, row_shape
from ppl_gen.models.diffusion.chain import Diffusion
from ppl_gen.models.diffusion.learned_noising import LearnedNoising
from ppl_gen.models.diffusion.networks import Denoiser, check_network, time_network
from ppl_gen.models.diffusion.noising import noise_schedule
from ppl_gen.program.program import Program, Recipe

__all__ = ["denoising_diffusion"]


def denoising_diffusion(
    features: int | Sequence[int] | None = None,
    *,
    steps: int = 50,
    hidden: int | None = None,
    layers: int = 3,
    schedule: Literal["linear", "cosine", "learned"] = "linear",
) -> Recipe:
    r"""A diffusion model of rows of numbers (N x features) or of images (N x channels x height x width).

    .. math:: \log p(x) \ge \mathbb{E}_q \Bigl[ \log p(x \mid x_1)
              - \sum_{t=2}^{T} \mathrm{KL}(q(x_{t-1} \mid x_t, x_0) \,\|\, p(x_{t-1} \mid x_t)) \Bigr]
              - \mathrm{KL}(q(x_T \mid x_0) \,\|\, p(x_T))

    Model and guide are ordinary Pyro programs over the sites ``x_T`` ... ``x_1`` (in standardised units: every column,
    or channel, shifted by its mean and divided by its standard deviation) and ``x`` (in the user's, its density too).
    ``ELBO()`` takes one sampled time step for each row at each update, with the divergences in closed form;
    ``ELBO(time_step="all")`` and ``IWAE`` run both chains; `SimpleDiffusion` takes the plain error of the predicted
    noise, which is no bound. The guide is fixed, but for a learned schedule. ``fit.sample`` runs the chain back,
    `ddim_sample` in fewer steps, `guided_sample` towards a density of one's own; ``fit.evidence`` weighs whole chains,
    a bound that tightens with ``particles``. The network is ``denoiser``.

    ``fit.predict({"x": x, "mask": seen})`` completes rows of which only the entries ``seen`` count. It is approximate:
    see `inpaint`, which it calls.

    Args:
        features: columns of the data, or the shape (channels, height, width) of an image; None: the shape of the data.
        steps: T, at least 2.
        hidden: width of the network: of the layers of a perceptron (64 where None), or, for images, channels of the
            first level of a U-Net (16).
        layers: hidden layers of the perceptron, or levels of the U-Net, each of half the resolution.
        schedule: how the noise grows, "linear" or "cosine", see `noise_schedule`; "learned": begun at the linear one,
            and moved with all else by the bound (``fit.module("noising")``).

    Returns:
        A recipe; it raises ValueError for data of another shape, or with a constant column or channel.

    Raises:
        ValueError: for an argument out of its range.

    References:
        Deep unsupervised learning using nonequilibrium thermodynamics (Sohl-Dickstein et al., 2015).
        Denoising diffusion probabilistic models (Ho, Jain and Abbeel, 2020).
        Variational diffusion models (Kingma, Salimans, Poole and Ho, 2021) for the learned schedule.

    Example:
        >>> import torch, ppl_gen as pg
        >>> from ppl_gen.inference import SVI
        >>> x = torch.arange(40.0).reshape(20, 2)
        >>> fit = pg.fit(denoising_diffusion(steps=10, hidden=16), x, SVI(steps=5), seed=0)
        >>> fit.sample(3)["x"].shape, fit.notes["gradients"]
        (torch.Size([3, 2]), 'one of 10 time steps sampled per row')
    """
    given = None if features is None else checked_shape(features)
    check_network(hidden, layers, given)
    require_choice("schedule", schedule, ("linear", "cosine", "learned"))
    fixed = noise_schedule("linear" if schedule == "learned" else schedule, steps)

    def build(data: Any) -> Program:
        shape = row_shape(data, "denoising_diffusion") if given is None else given
        check_network(hidden, layers, shape)
        middle, spread = _units(data, shape)
        noising = LearnedNoising(fixed) if schedule == "learned" else fixed
        reverse = Denoiser(shape, noising, time_network(shape, hidden, layers))
        return Diffusion(noising, reverse, middle, spread).program("denoising_diffusion")

    arguments = {"features": features, "steps": steps, "schedule": schedule}
    return Recipe(build, name="denoising_diffusion", arguments=arguments)


def _units(data: Any, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every column or channel, in the shape of a row."""
    (rows,) = entries(data, "denoising_diffusion", "x")
    assert rows is not None
    if tuple(rows.shape[1:]) != shape or rows.dim() < 2:
        size = shape[0] if len(shape) == 1 else shape
        wanted = f"{size} columns" if len(shape) == 1 else f"shape {shape}"
        raise ValueError(f"data: denoising_diffusion(features={size}) takes rows of {wanted}, got {tuple(rows.shape)}")
    columns = rows.transpose(0, 1).flatten(1)  # or channels, each with all of its numbers
    constant = (columns == columns[:, :1]).all(1)
    if bool(constant.any()):
        names = ", ".join(map(str, constant.nonzero().squeeze(-1).tolist()))
        kind = "column" if len(shape) == 1 else "channel"
        raise ValueError(f"data: {kind}(s) {names} are constant: no density exists in that direction; leave them out")
    columns = columns if len(shape) > 1 and columns.is_floating_point() else columns.double()
    middle = columns.mean(1, dtype=torch.float64)
    spread = (columns - middle[:, None].to(columns)).square().mean(1, dtype=torch.float64).sqrt()
    across = [1] * (len(shape) - 1)
    middle, spread = (value.reshape(-1, *across).expand(shape).contiguous() for value in (middle, spread))
    return middle, spread
