"""Which numbers of a latent code say anything about the rows, and the codes themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from torch import Tensor

from ppl_gen.draws.predictive import amortised, global_draws
from ppl_gen.errors import IncompatibleError, require_positive
from ppl_gen.workspace.isolation import without_side_effects

if TYPE_CHECKING:
    from ppl_gen.fits.result import Fit

__all__ = ["ActiveUnits", "active_units", "code_means", "code_site"]

CHUNK = 1000  # rows at a time


@dataclass(frozen=True)
class ActiveUnits:
    """The variance over rows of each unit's mean, and which of them are active.

    Args:
        site: the latent site.
        variance: Var_x(E_q[u | x]) of every unit u, in the shape of the site's event.
        active: where it exceeds ``threshold``.
        threshold: 0.01 in the literature.
    """

    site: str
    variance: Tensor
    active: Tensor
    threshold: float

    def __repr__(self) -> str:
        return f"ActiveUnits({int(self.active.sum())} of {self.active.numel()} at site {self.site!r})"


def active_units(fit: Fit, data: Any = None, *, site: str | None = None, threshold: float = 0.01) -> ActiveUnits:
    r"""Units of a latent code whose mean moves with the rows.

    .. math:: A_u = \mathrm{Var}_x\bigl(\mathbb{E}_{q(u \mid x)}[u]\bigr) > 0.01

    Args:
        fit: of a program with an amortised guide, or a ``local_posterior``.
        data: rows to look at; the training data when None.
        site: the latent site; the first continuous one of each row unless named.
        threshold: above it a unit counts as active.

    Raises:
        IncompatibleError: if no guide maps rows to such a site.
        ValueError: if ``site`` is none of them, for a single row, or a ``threshold`` that is not positive.

    Source: Burda, Grosse and Salakhutdinov, Importance weighted autoencoders (2016).

    Example:
        >>> import torch, ppl_gen as pg
        >>> from ppl_gen.inference import SVI
        >>> from ppl_gen.models import vae
        >>> x = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).repeat(20, 1)
        >>> fit = pg.fit(vae(3, latent=2, hidden=(8,)), x, SVI(steps=500, lr=0.01), seed=0)
        >>> active_units(fit)
        ActiveUnits(1 of 2 at site 'z')
    """
    name = code_site(fit, site)
    require_positive("threshold", threshold)
    means = code_means(fit, data, site=name)
    if len(means) < 2:
        raise ValueError(f"data: a variance over rows takes at least 2 of them, got {len(means)}")
    variance = means.double().var(0)
    return ActiveUnits(name, variance, variance > threshold, threshold)


def code_site(fit: Fit, site: str | None = None) -> str:
    """The site that holds the code of a row; raises IncompatibleError where there is none, ValueError for another."""
    found = [s.name for s in fit.info.select(local=True) if not s.discrete]
    if found:
        guided = fit.info.guide_sites or {}
        with fit.bound():
            if amortised(fit):
                found = [name for name in found if name in guided]
            elif fit.program.local_posterior is None:
                found = []
    if not found:
        raise IncompatibleError(
            f"{fit.program.name!r} has no codes: that takes a continuous latent site of every row, and a guide that "
            "follows the rows (an encoder), or a local_posterior that the program offers"
        )
    if site is not None and not (isinstance(site, str) and site in found):
        raise ValueError(f"site: expected one of {', '.join(found)}, got {site!r}")
    return site or found[0]


def code_means(fit: Fit, data: Any = None, *, site: str | None = None) -> Tensor:
    """E_q[z | x] of every row, rows x shape of the site: the codes, for t-SNE, k-means or a classifier.

    Where the guide draws other sites first (the label of `m2`), it is the mean given one draw of these.

    Raises:
        IncompatibleError, ValueError: as `active_units` does.

    Example:
        >>> import torch, ppl_gen as pg
        >>> from ppl_gen.inference import SVI
        >>> from ppl_gen.models import vae
        >>> x = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).repeat(20, 1)
        >>> code_means(pg.fit(vae(3, latent=2, hidden=(8,)), x, SVI(steps=5), seed=0)).shape
        torch.Size([40, 2])
    """
    name, dataset = code_site(fit, site), fit.dataset(data)
    parts = []
    with fit.bound():
        exact = None if amortised(fit) else fit.program.local_posterior
        shared = global_draws(fit, 1)[0] if exact is not None and fit.info.select(local=False) else {}
        for batch in dataset.chunks(CHUNK):
            if exact is not None:
                fn = exact(shared, *batch.args, **batch.kwargs)[name]
            else:
                with without_side_effects():
                    fn = poutine.trace(fit.guide).get_trace(*batch.args, **batch.kwargs).nodes[name]["fn"]
            parts.append(_mean(name, fn).expand(fn.shape()).cpu())
    return torch.cat(parts)


def _mean(name: str, fn: Any) -> Tensor:
    try:
        mean: Tensor = fn.mean
    except NotImplementedError as error:
        raise IncompatibleError(
            f"the guide's {type(fn).__name__} at {name!r} has no mean in closed form; draw codes by fit.posterior(data)"
        ) from error
    return mean
