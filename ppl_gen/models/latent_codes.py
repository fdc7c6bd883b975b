"""What people do with codes: look at them, reconstruct rows from them, and score how strange a row is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ppl_gen.data.batching import Batch
from ppl_gen.draws.predictive import latent_draws, run
from ppl_gen.errors import IncompatibleError, require_whole
from ppl_gen.fits.result import Fit, require_fit

__all__ = ["anomaly_scores", "codes", "reconstructions"]


def codes(fit: Fit, data: Any = None, *, site: str = "z", draws: int = 1, seed: int | None = None) -> Tensor:
    """The code of each row: the value of a local latent site, averaged over draws of its posterior.

    One draw says all where the posterior is a point (`autoencoder`); a variational one has a mean.

    Args:
        fit: of a program with a local latent site, by an algorithm that learned its posterior.
        data: rows; those of training when None.
        site: the latent site.
        draws: how many draws are averaged.
        seed: of the draws; the fit's own when None.

    Returns:
        Rows x shape of the site.

    Raises:
        ValueError: if there is no such site in the data plate.

    Example:
        >>> import torch, ppl_gen as pg
        >>> from ppl_gen.inference import SVI
        >>> from ppl_gen.models import autoencoder
        >>> x = torch.randn(30, 3)
        >>> fit = pg.fit(autoencoder(3, 2, hidden=(8,)), x, SVI(steps=50, lr=0.01), seed=0)
        >>> codes(fit, x[:5]).shape
        torch.Size([5, 2])
    """
    require_fit(fit)
    known = [found.name for found in fit.info.select(local=True)]
    if not isinstance(site, str) or site not in known:
        raise ValueError(
            f"site: {site!r} is not a local latent site of {fit.program.name!r}; there is {known or 'none'}"
        )
    return _averaged(fit, data, lambda batch, values: values[site], draws, seed)


def reconstructions(fit: Fit, data: Any = None, *, draws: int = 1, seed: int | None = None) -> Tensor:
    """The mean of p(x | z) at the code of each row, averaged over draws: rows x shape of x.

    Of `ppca` with a mask it fills in what is missing. Arguments and errors are those of `anomaly_scores`.

    Example:
        >>> import torch, ppl_gen as pg
        >>> from ppl_gen.inference import EM
        >>> from ppl_gen.models import ppca
        >>> x = torch.randn(50, 1) * torch.ones(3) + 0.01 * torch.randn(50, 3)
        >>> fit = pg.fit(ppca(3, 1), x, EM(), seed=0)
        >>> seen = torch.tensor([True, True, False])
        >>> filled = reconstructions(fit, {"x": x * seen, "mask": seen.expand(50, 3)}, draws=20)
        >>> bool((filled - x).abs().max() < 0.1)
        True
    """
    name = _observed(fit)

    def mean(batch: Batch, values: dict[str, Tensor]) -> Tensor:
        try:
            found: Tensor = run(fit, batch, values).nodes[name]["fn"].mean
        except NotImplementedError as error:
            raise IncompatibleError(
                f"{fit.program.name!r} has no mean of {name!r} in closed form, and so no reconstructions; "
                "fit.predict() draws replicates of the rows"
            ) from error
        return found

    return _averaged(fit, data, mean, draws, seed)


def anomaly_scores(fit: Fit, data: Any = None, *, draws: int = 1, seed: int | None = None) -> Tensor:
    r"""How badly each row can be told from its own code, -log p(x | z) in nats, averaged over draws: rows.

    Large for rows unlike those of training. It is no density: a code that is free may reconstruct strange rows too.
    Where a program has a density, ``-fit.evidence(data).values`` is the better score.

    Args:
        fit: of a program with one observed site, by an algorithm that learned a posterior of its local latents.
        data: rows; those of training when None.
        draws: how many draws of the latents are averaged.
        seed: of the draws; the fit's own when None.

    Raises:
        IncompatibleError: for programs of several observed sites.

    Example:
        >>> import torch, ppl_gen as pg
        >>> from ppl_gen.inference import SVI
        >>> from ppl_gen.models import autoencoder
        >>> x = torch.randn(100, 1) * torch.tensor([1.0, 1.0])
        >>> fit = pg.fit(autoencoder(2, 1, hidden=()), x, SVI(steps=300, lr=0.03), seed=0)
        >>> on, off = anomaly_scores(fit, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
        >>> bool(off > on + 0.5)
        True
    """
    name = _observed(fit)

    def score(batch: Batch, values: dict[str, Tensor]) -> Tensor:
        node = run(fit, batch, values).nodes[name]
        return -node["fn"].log_prob(node["value"])

    return _averaged(fit, data, score, draws, seed)


def _observed(fit: Fit) -> str:
    require_fit(fit)
    names = [site.name for site in fit.info.select(kind="observed")]
    if len(names) != 1:
        raise IncompatibleError(f"{fit.program.name!r} has {len(names)} observed sites, and not one: {names}")
    return names[0]


def _averaged(
    fit: Fit, data: Any, of: Callable[[Batch, dict[str, Tensor]], Tensor], draws: int, seed: int | None
) -> Tensor:
    """The mean over draws of what ``of`` makes of a batch and its latents, chunk by chunk."""
    require_whole("draws", draws)
    dataset = fit.dataset(data)

    def parts() -> Iterator[Tensor]:
        for batch in dataset.chunks(1000):
            found = [of(batch, dict(values)) for values in latent_draws(fit, batch, draws, training=False)]
            yield torch.stack(found).mean(0)

    with fit.bound(seed):
        return torch.cat(list(parts()))
