"""Completing rows of which some entries are seen, with every choice that there is about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ppl_gen.draws.imputed import seen_rows
from ppl_gen.errors import require_whole
from ppl_gen.fits.result import Fit
from ppl_gen.models.diffusion.bits import BitDiffusion
from ppl_gen.models.diffusion.chain import Diffusion
from ppl_gen.models.diffusion.fitted import chain_of
from ppl_gen.models.diffusion.imputing import RESAMPLES, Chain, completed, filtered

__all__ = ["inpaint"]


def inpaint(
    fit: Fit,
    data: Any,
    mask: Any,
    *,
    draws: int = 1,
    resamples: int = RESAMPLES,
    jump: int = 1,
    particles: int = 1,
    seed: int | None = None,
) -> Tensor:
    r"""Rows with the entries under ``mask`` as they are, and the others drawn given these.

    After each step back the seen entries are put where noise takes them, a draw of :math:`q(x_{t-1} | x_0)`. Done once
    (``resamples=1``) that is no draw of p(missing | seen): what is drawn at a step agrees with entries that are
    replaced right after it, so that completions depend too little on what is seen. Of two normal numbers with
    correlation 0.9, one of them seen at one standard deviation, the other comes out at 0.6 in the mean and not at 0.9
    (200 steps; with ten resamples at 0.88). Two ways out:

    - ``resamples``: every stretch of ``jump`` steps is gone through so often, and noised again in between. The error
      falls as they grow; it vanishes for many short steps, and costs as many runs of the network.
    - ``particles``: a particle filter along one noisy path of what is seen, without resampling of steps. Right as their
      number grows, if the chain back is the reverse of the chain into noise; for images the weights rest on one
      particle long before.

    ``fit.predict({"x": x, "mask": seen})`` is this function at its defaults.

    Args:
        fit: of `denoising_diffusion` or `binomial_diffusion`.
        data: rows, or a mapping with the entry x; what ``mask`` hides of them does not matter.
        mask: booleans in the shape of the rows, True where they are seen.
        draws: how many for each row.
        resamples: how often each stretch is gone through.
        jump: steps of a stretch.
        particles: chains of a row that compete, where more than one.
        seed: of the draws; the fit's own when None.

    Returns:
        draws x rows x shape of a row.

    Raises:
        ValueError: for a mask of another kind or shape, or ``particles`` beside ``resamples`` or ``jump``.
        IncompatibleError: for a fit of another program.

    References:
        Deep unsupervised learning using nonequilibrium thermodynamics (Sohl-Dickstein et al., 2015).
        RePaint: inpainting using denoising diffusion probabilistic models (Lugmayr et al., 2022).
        Diffusion probabilistic modeling of protein backbones in 3D (Trippe et al., 2023) for the particles.

    Example:
        >>> import ppl_gen as pg
        >>> from ppl_gen.inference import SVI
        >>> from ppl_gen.models import denoising_diffusion
        >>> x = torch.arange(40.0).reshape(20, 2)
        >>> fit = pg.fit(denoising_diffusion(steps=10, hidden=16), x, SVI(steps=5), seed=0)
        >>> made = inpaint(fit, x, x > 20, draws=3)
        >>> made.shape, bool((made == x)[:, x > 20].all())
        (torch.Size([3, 20, 2]), True)
    """
    chain: Chain = chain_of(fit, (Diffusion, BitDiffusion), "inpaint", "denoising_diffusion or binomial_diffusion")
    for name, value in (("draws", draws), ("resamples", resamples), ("jump", jump), ("particles", particles)):
        require_whole(name, value)
    if particles > 1 and (resamples, jump) not in ((RESAMPLES, 1), (1, 1)):
        raise ValueError("particles: a particle filter goes through each step once; leave resamples and jump out")
    given = dict(data) if isinstance(data, Mapping) else {"x": data}
    seen, entries = seen_rows({**given, "mask": mask})
    rows = fit.dataset(entries)
    with fit.bound(seed):
        batch = rows.batch()
        x = batch.args[0] if batch.args else batch.kwargs["x"]
        seen = seen.to(x.device)
        start, made = chain.standard(x), []
        for _ in range(draws):
            if particles > 1:
                found = filtered(chain, start, seen, particles)
            else:
                found = completed(chain, start, seen, resamples, jump)
            drawn = chain.rows(found)
            made.append(torch.where(seen, x.to(drawn), drawn))
        return torch.stack(made)
