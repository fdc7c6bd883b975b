"""Pictures of what a latent-variable program makes of its codes: reconstructions, samples, traversals, manifolds.

Every function takes a fit of any program whose rows have codes: a continuous latent site inside the data plate, and a
guide that follows the rows (or a ``local_posterior``). Rows are drawn as images where they have their shape, or a square
number of columns (25 or more), else as lines, or bars if they have few columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from ppl_gen.diagnostics.units import active_units, code_means, code_site
from ppl_gen.errors import MissingExtraError, require_whole
from ppl_gen.report.decoding import decoded, levels, pictured, reconstructed, walked
from ppl_gen.report.plots import GREY, INK, PALE, _plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ppl_gen.result import Fit

__all__ = ["plot_codes", "plot_manifold", "plot_reconstructions", "plot_samples", "plot_traversal"]

Method = Literal["tsne", "pca", "first"]

MOST = 2000  # rows that are looked at to find active units and the spread of codes
_BARS = 12  # columns at most that are drawn as bars
_STEPS = 9  # of a traversal


def plot_reconstructions(fit: Fit, data: Any = None, rows: int = 8, *, axes: Axes | None = None) -> Figure:
    r"""Rows above what is expected of them given their own codes, E[x | z] at z = E_q[z | x].

    .. math:: x_i \;\mapsto\; \mathbb{E}[x \mid \mathbb{E}_{q(z \mid x_i)}[z]]

    Other latents of a row are at their means too, finite ones (a missing label) at their likeliest value.

    Args:
        fit: of a program with codes.
        data: rows (and inputs such as labels); those of training when None.
        rows: how many, from the first.
        axes: where to draw; a new figure when None.

    Raises:
        IncompatibleError: for a program without codes.
        ValueError: for ``rows`` below 1.

    References:
        Auto-encoding variational Bayes (Kingma and Welling, 2014).

    Example:
        >>> import torch, ppl_gen as pg
        >>> from ppl_gen.inference import SVI
        >>> from ppl_gen.models import vae
        >>> x = torch.bernoulli(torch.full((40, 36), 0.3))
        >>> fit = pg.fit(vae(36, latent=2, hidden=(8,)), x, SVI(steps=20), seed=0)
        >>> figure = plot_reconstructions(fit, x, rows=5)
        >>> figure.axes[0].get_title(loc="left")
        'vae: rows and their reconstructions'
    """
    seen, again = _pairs(fit, data, rows)
    cells = torch.stack([seen, again])
    axes = axes or _new(cells)
    draw_cells(axes, cells, side=["rows", "from codes"], like=seen)
    return _titled(axes, f"{fit.program.name}: rows and their reconstructions")


def plot_samples(
    fit: Fit, n: int = 64, *, given: Mapping[str, Any] | None = None, seed: int | None = None, axes: Axes | None = None
) -> Figure:
    r"""New rows in a grid: latents are drawn from the program, and the mean of each row given them is shown.

    .. math:: z_j \sim p(z), \quad j \;\mapsto\; \mathbb{E}[x \mid z_j]

    Args:
        fit: of any program that samples; where a row has no mean in closed form, the draw itself is shown.
        n: how many.
        given: sites or inputs, as for `Fit.sample`: ``{"y": 3}`` draws one class.
        seed: of the draws; the fit's own when None.
        axes: where to draw; a new figure when None.

    Raises:
        IncompatibleError: for a program that cannot sample: codes under a flat prior (`autoencoder`), say.
        ValueError: for ``n`` below 1, or ``given`` names that are neither sites nor inputs.

    Example:
        >>> import torch, ppl_gen as pg
        >>> from ppl_gen.inference import SVI
        >>> from ppl_gen.models import vae
        >>> x = torch.bernoulli(torch.full((40, 36), 0.3))
        >>> fit = pg.fit(vae(36, latent=2, hidden=(8,)), x, SVI(steps=20), seed=0)
        >>> plot_samples(fit, 9).axes[0].images[0].get_array().shape  # 3 x 3 pictures of 6 x 6, and lines between
        (22, 22)
    """
    require_whole("n", n)
    drawn = fit.sample(n, given, seed=seed)
    latents = {site.name: drawn[site.name] for site in fit.info.select()}
    made = decoded(fit, latents, given or {}, n, alike=False)
    across = math.ceil(math.sqrt(n))
    empty = torch.full_like(made[:1], math.nan).expand(-n % across, *made.shape[1:])
    cells = torch.cat([made, empty]).reshape(-1, across, *made.shape[1:])
    axes = axes or _new(cells)
    draw_cells(axes, cells, like=_observed(fit))
    return _titled(axes, f"{fit.program.name}: {n} samples")


def plot_traversal(
    fit: Fit,
    row: Any = 0,
    units: Sequence[int] | None = None,
    *,
    site: str | None = None,
    axes: Axes | None = None,
) -> Figure:
    r"""One row's code moved along one unit at a time, from -3 to 3 standard deviations of the prior.

    .. math:: \mathbb{E}[x \mid z_1, \dots, z_u = t, \dots], \quad t = -3 \dots 3

    Under a flat prior (`autoencoder`) the codes' own mean and standard deviation take the place of the prior's.

    Args:
        fit: of a program with codes.
        row: the number of a training row, or data of one row.
        units: which units, by their number in the flattened code; the most active ones (at most 8) when None.
        site: the latent site; the first continuous one of each row unless named.
        axes: where to draw; a new figure when None.

    Raises:
        IncompatibleError: for a program without codes.
        ValueError: for a row or a unit that is not there.

    References:
        beta-VAE: learning basic visual concepts with a constrained variational framework (Higgins et al., 2017).

    Example:
        >>> import torch, ppl_gen as pg
        >>> from ppl_gen.inference import SVI
        >>> from ppl_gen.models import vae
        >>> x = torch.bernoulli(torch.full((40, 36), 0.3))
        >>> fit = pg.fit(vae(36, latent=3, hidden=(8,)), x, SVI(steps=20), seed=0)
        >>> [text.get_text() for text in plot_traversal(fit, 4, units=[2, 0]).axes[0].get_yticklabels()]
        ['unit 2', 'unit 0']
    """
    name = code_site(fit, site)
    one = _one_row(fit, row)
    means = code_means(fit, _few(fit), site=name)
    chosen = _units(fit, name, units)
    with fit.bound():
        batch = one.batch()
    scores = torch.linspace(-3.0, 3.0, _STEPS)
    values = levels(fit, name, scores.reshape(-1, *[1] * (means.dim() - 1)).expand(_STEPS, *means.shape[1:]), means)
    code = code_means(fit, one, site=name)
    lines = []
    for unit in chosen:
        codes = code.expand(_STEPS, *code.shape[1:]).clone().flatten(1) if code.dim() > 1 else code.expand(_STEPS, 1)
        codes = codes.clone()
        codes[:, unit] = values.reshape(_STEPS, -1)[:, unit].to(codes)
        lines.append(walked(fit, batch, name, codes.reshape(_STEPS, *code.shape[1:]).to(fit.data.device)))
    cells = torch.stack(lines)
    axes = axes or _new(cells)
    ends = [f"{float(s):g}" if i in (0, _STEPS // 2, _STEPS - 1) else "" for i, s in enumerate(scores)]
    draw_cells(axes, cells, side=[f"unit {u}" for u in chosen], below=ends, like=_observed(fit))
    return _titled(axes, f"{fit.program.name}: one code, unit by unit")


def plot_manifold(
    fit: Fit,
    n: int = 15,
    *,
    given: Mapping[str, Any] | None = None,
    site: str | None = None,
    axes: Axes | None = None,
) -> Figure:
    r"""What a code of two numbers means: rows expected at an n x n grid of quantiles of its prior.

    .. math:: (i, j) \;\mapsto\; \mathbb{E}[x \mid z = (\Phi^{-1}(q_j), \Phi^{-1}(q_i))], \quad q = 0.02 \dots 0.98

    Args:
        fit: of a program whose code has two numbers.
        n: pictures along each side.
        given: sites or inputs: ``{"y": 3}`` for one class. Inputs are else those of the first training row, and other
            latents at their means or likeliest values.
        site: the latent site; the first continuous one of each row unless named.
        axes: where to draw; a new figure when None.

    Raises:
        IncompatibleError: for a program without codes.
        ValueError: if the code has not two numbers, or ``n`` is below 1.

    References:
        Auto-encoding variational Bayes, figure 4 (Kingma and Welling, 2014).

    Example:
        >>> import torch, ppl_gen as pg
        >>> from ppl_gen.inference import SVI
        >>> from ppl_gen.models import vae
        >>> x = torch.bernoulli(torch.full((40, 36), 0.3))
        >>> fit = pg.fit(vae(36, latent=3, hidden=(8,)), x, SVI(steps=20), seed=0)
        >>> plot_manifold(fit)
        Traceback (most recent call last):
        ...
        ValueError: fit: a manifold needs codes of two numbers, and 'z' of 'vae' has 3; plot_traversal takes any number
    """
    require_whole("n", n)
    name = code_site(fit, site)
    shape = fit.info.sites[name].event_shape
    if shape != (2,):
        raise ValueError(
            f"fit: a manifold needs codes of two numbers, and {name!r} of {fit.program.name!r} has "
            f"{torch.Size(shape).numel()}; plot_traversal takes any number"
        )
    scores = torch.special.ndtri(torch.linspace(0.02, 0.98, n) if n > 1 else torch.tensor([0.5]))
    grid = torch.stack(torch.meshgrid(scores.flip(0), scores, indexing="ij"), -1).flip(-1).reshape(-1, 2)
    grid = grid.flip(-1)[:, [1, 0]]  # first number to the right, second upwards
    improper = fit.info.sites[name].improper
    codes = levels(fit, name, grid, code_means(fit, _few(fit), site=name) if improper else grid)
    made = decoded(fit, {name: codes.to(device=fit.data.device)}, given or {}, n * n, alike=True)
    cells = made.reshape(n, n, *made.shape[1:])
    axes = axes or _new(cells)
    draw_cells(axes, cells, like=_observed(fit), gap=0)
    axes.set_xlabel(f"{name}[0]", fontsize=8)
    axes.set_ylabel(f"{name}[1]", fontsize=8)
    return _titled(axes, f"{fit.program.name}: the manifold of its codes")
