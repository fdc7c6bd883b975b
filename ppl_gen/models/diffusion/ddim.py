r"""Rows of a diffusion model in fewer steps than it was learned with, with less noise or none."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ppl_gen.errors import require_number, require_whole
from ppl_gen.fits.result import Fit
from ppl_gen.models.diffusion.chain import Diffusion
from ppl_gen.models.diffusion.fitted import chain_of

__all__ = ["ddim_sample"]


def ddim_sample(fit: Fit, n: int, *, steps: int | None = None, eta: float = 0.0, seed: int | None = None) -> Tensor:
    r"""New rows of a fit of `denoising_diffusion`, by steps from t to s < t that keep the marginals of the noise.

    .. math:: x_s = \sqrt{\bar\alpha_s} \, \hat x_0 + \sqrt{1 - \bar\alpha_s - \sigma^2} \, \epsilon(x_t, t)
              + \sigma z, \quad
              \sigma^2 = \eta^2 \, \frac{1 - \bar\alpha_s}{1 - \bar\alpha_t}
              \Bigl( 1 - \frac{\bar\alpha_t}{\bar\alpha_s} \Bigr)

    With ``eta`` = 0 the row is a function of x_T: the same seed and another number of many steps give nearly the same
    row. Few steps draw rows too near to the mean: of a normal distribution each multiplies x by the cosine of the angle
    between :math:`(\sqrt{\bar\alpha_t}, \sqrt{1 - \bar\alpha_t})` and the same at s, so that at best a factor of
    :math:`\cos(\pi / 2K)^K` of the standard deviation is left by K steps: 0.77 of it for 5, 0.94 for 20.
    These are not draws of the program (``fit.sample`` makes those): the density of such rows is not what
    ``fit.evidence`` measures.

    Args:
        fit: of `denoising_diffusion`.
        n: how many rows.
        steps: how many of the T steps are taken, evenly spread and the last one among them; None: all.
        eta: 0 for no noise, 1 for that of q(x_s | x_t, x_0).
        seed: of the draws; the fit's own when None.

    Returns:
        n x shape of a row.

    Raises:
        ValueError: for more steps than the chain has, or an ``eta`` outside of [0, 1].
        IncompatibleError: for a fit of another program.

    References:
        Denoising diffusion implicit models (Song, Meng and Ermon, 2021).

    Example:
        >>> import ppl_gen as pg
        >>> from ppl_gen.inference import SVI
        >>> from ppl_gen.models import denoising_diffusion
        >>> x = torch.arange(40.0).reshape(20, 2)
        >>> fit = pg.fit(denoising_diffusion(steps=20, hidden=16), x, SVI(steps=5), seed=0)
        >>> ddim_sample(fit, 3, steps=5).shape
        torch.Size([3, 2])
    """
    chain: Diffusion = chain_of(fit, Diffusion, "ddim_sample", "denoising_diffusion")
    require_whole("n", n)
    require_number("eta", eta, expected="a number from 0 to 1")
    if eta > 1:
        raise ValueError(f"eta: expected a number from 0 to 1, got {eta}")
    if steps is not None:
        require_whole("steps", steps, most=chain.steps)
    with fit.bound(seed):
        kept = chain.noising.current().kept
        state = torch.randn(n, *chain.middle.shape, device=fit.data.device)
        times = torch.linspace(chain.steps, 0, (steps or chain.steps) + 1).round().int().tolist()
        for t, s in pairwise(times):
            left, more = float(kept[t]), float(kept[s])
            noise = chain.noise_in(state, t)
            start = (state - (1 - left) ** 0.5 * noise) / left**0.5
            fresh = eta**2 * (1 - more) / (1 - left) * (1 - left / more)
            state = more**0.5 * start + max(1 - more - fresh, 0.0) ** 0.5 * noise
            if fresh:
                state = state + fresh**0.5 * torch.randn_like(state)
        return chain.rows(state)
