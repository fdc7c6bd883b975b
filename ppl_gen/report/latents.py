"""Pictures of what a latent-variable program makes of its codes: reconstructions, samples, traversals, manifolds.

Every function takes a fit of any program whose rows have codes: a continuous latent site inside the data plate, and a
guide that follows the rows (or a ``local_posterior``). Rows are drawn as images where they have their shape, or a
square number of columns (25 or more), else as lines, or bars if they have few columns.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from ppl_gen.arguments import require_axes, require_choice, require_mapping
from ppl_gen.data.arrays import as_array
from ppl_gen.diagnostics.units import active_units, code_means, code_site
from ppl_gen.errors import require_whole
from ppl_gen.fits.result import require_fit
from ppl_gen.report.image_grid import draw_cells, draw_points, flattened, new_axes, titled
from ppl_gen.report.reconstruct import decoded, few, levels, observed, pictured, reconstructed, traversed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ppl_gen.data.batching import Dataset
    from ppl_gen.fits.result import Fit

__all__ = ["plot_codes", "plot_manifold", "plot_reconstructions", "plot_samples", "plot_traversal"]

Method = Literal["tsne", "pca", "first"]

_METHODS = ("tsne", "pca", "first")
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
    _checked(fit, axes)
    require_whole("rows", rows)
    code_site(fit)
    seen, again = reconstructed(fit, fit.dataset(data), rows)
    axes = axes or new_axes(2, len(seen))
    draw_cells(axes, torch.stack([seen, again]), seen, side=["rows", "from codes"])
    return titled(axes, f"{fit.program.name}: rows and their reconstructions")


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
        >>> plot_samples(fit, 9).axes[0].images[0].get_array().shape  # 3 x 3 pictures, 6 x 6 enlarged to 24 x 24
        (76, 76)
    """
    _checked(fit, axes)
    require_whole("n", n)
    drawn = fit.sample(n, given, seed=seed)
    known = {name: drawn[name] for name in [*(site.name for site in fit.info.select()), pictured(fit)]}
    made = decoded(fit, known, given or {}, n, alike=False)
    across = math.ceil(math.sqrt(n))
    empty = torch.full_like(made[:1], math.nan).expand(-n % across, *made.shape[1:])
    cells = torch.cat([made, empty]).reshape(-1, across, *made.shape[1:])
    axes = axes or new_axes(*cells.shape[:2])
    draw_cells(axes, cells, observed(fit, fit.data, 256))
    return titled(axes, f"{fit.program.name}: {n} samples")


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
    _checked(fit, axes)
    name = code_site(fit, site)
    one = _one_row(fit, row)
    means = code_means(fit, few(fit), site=name)
    chosen = _units(fit, name, units)
    scores = torch.linspace(-3.0, 3.0, _STEPS)
    spread = scores.reshape(-1, *[1] * (means.dim() - 1)).expand(_STEPS, *means.shape[1:])
    values = levels(fit, name, spread, means).expand(spread.shape).reshape(_STEPS, -1)
    cells = traversed(fit, one, name, chosen, values)
    axes = axes or new_axes(*cells.shape[:2])
    ends = [f"{float(score):g}" if i % (_STEPS // 2) == 0 else "" for i, score in enumerate(scores)]
    draw_cells(axes, cells, observed(fit, fit.data, 256), side=[f"unit {unit}" for unit in chosen], below=ends)
    return titled(axes, f"{fit.program.name}: one code, unit by unit")


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
    _checked(fit, axes, given)
    require_whole("n", n)
    name = code_site(fit, site)
    shape = fit.info.sites[name].event_shape
    if shape != (2,):
        raise ValueError(
            f"fit: a manifold needs codes of two numbers, and {name!r} of {fit.program.name!r} has "
            f"{torch.Size(shape).numel()}; plot_traversal takes any number"
        )
    scores = torch.special.ndtri(torch.linspace(0.02, 0.98, n) if n > 1 else torch.tensor([0.5]))
    up, right = torch.meshgrid(scores.flip(0), scores, indexing="ij")
    means = code_means(fit, few(fit), site=name)
    codes = levels(fit, name, torch.stack([right, up], -1).reshape(-1, 2), means)
    made = decoded(fit, {name: codes.to(means).to(fit.data.device or "cpu")}, given or {}, n * n, alike=True)
    cells = made.reshape(n, n, *made.shape[1:])
    axes = axes or new_axes(n, n)
    draw_cells(axes, cells, observed(fit, fit.data, 256), gap=0)
    axes.set_xlabel(f"{name}[0]", fontsize=8)
    axes.set_ylabel(f"{name}[1]", fontsize=8)
    return titled(axes, f"{fit.program.name}: the manifold of its codes")


def plot_codes(
    fit: Fit,
    data: Any = None,
    labels: Any = None,
    method: Method = "tsne",
    *,
    site: str | None = None,
    axes: Axes | None = None,
) -> Figure:
    r"""The codes of rows in the plane, E_q[z | x_i], coloured by labels.

    .. math:: i \;\mapsto\; \mathrm{flat}\bigl(\mathbb{E}_{q(z \mid x_i)}[z]\bigr)

    t-SNE keeps neighbours together and says nothing of distances between groups; "pca" keeps the two directions in
    which the codes vary most; "first" shows the first two numbers as they are (a histogram where there is one).

    Args:
        fit: of a program with codes.
        data: rows; those of training when None.
        labels: one for each row: up to 20 different ones get a colour and a name each, more of them shades.
        method: "tsne" (scikit-learn), "pca" or "first".
        site: the latent site; the first continuous one of each row unless named.
        axes: where to draw; a new figure when None.

    Raises:
        IncompatibleError: for a program without codes.
        MissingExtraError: for "tsne" without scikit-learn.
        ValueError: for another method, labels of another number, or t-SNE of fewer than 5 rows.

    References:
        Visualizing data using t-SNE (van der Maaten and Hinton, 2008).

    Example:
        >>> import torch, ppl_gen as pg
        >>> from ppl_gen.inference import SVI
        >>> from ppl_gen.models import vae
        >>> x = torch.bernoulli(torch.full((40, 36), 0.3))
        >>> fit = pg.fit(vae(36, latent=3, hidden=(8,)), x, SVI(steps=20), seed=0)
        >>> plot_codes(fit, x, labels=x[:, 0].int(), method="pca").axes[0].get_title(loc="left")
        'vae: codes of 40 rows, pca'
    """
    _checked(fit, axes)
    require_choice("method", method, _METHODS)
    codes = code_means(fit, data, site=site)
    names = None if labels is None else np.asarray(torch.as_tensor(as_array(labels, "labels")).cpu())
    if names is not None and names.shape != codes.shape[:1]:
        raise ValueError(f"labels: expected one for each of the {len(codes)} rows, got shape {names.shape}")
    flat = codes.reshape(len(codes), -1).double().numpy()
    if axes is None:
        from matplotlib.figure import Figure

        axes = Figure(figsize=(5.0, 4.2), layout="constrained").add_subplot()
    draw_points(axes, flattened(flat, method, fit.seed), names)
    if method == "tsne":
        axes.set(xticks=[], yticks=[])
    return titled(axes, f"{fit.program.name}: codes of {len(flat)} rows, {method}")


def _checked(fit: Any, axes: Any, given: Any = None) -> None:
    require_fit(fit)
    require_axes(axes)
    if given is not None:
        require_mapping("given", given, 'a mapping of sites or inputs, such as {"y": 3}')


def _one_row(fit: Fit, row: Any) -> Dataset:
    if isinstance(row, int | np.integer) and not isinstance(row, bool):
        total = fit.data.rows or 0
        if not 0 <= row < total:
            raise ValueError(f"row: expected a number from 0 to {total - 1}, or data of one row, got {row}")
        return fit.data.subset(torch.tensor([int(row)]))
    one = fit.dataset(row)
    if one.rows != 1:
        raise ValueError(f"row: expected the number of a training row, or data of one row, got {one.rows} rows")
    return one


def _units(fit: Fit, site: str, units: Sequence[int] | None) -> list[int]:
    found = active_units(fit, few(fit), site=site)
    variance = found.variance.flatten()
    if units is None:
        count = min(8, max(int(found.active.sum()), 1))
        return [int(unit) for unit in variance.argsort(descending=True)[:count]]
    given: Any = units  # whatever was passed
    if not isinstance(given, Sequence) or not all(
        isinstance(u, numbers.Integral) and not isinstance(u, bool) for u in given
    ):
        raise ValueError(f"units: expected whole numbers, at least one, got {units!r}")
    wrong = [unit for unit in units if not 0 <= unit < len(variance)]
    if wrong or not units:
        raise ValueError(f"units: expected numbers from 0 to {len(variance) - 1}, at least one, got {list(units)}")
    return [int(unit) for unit in units]
