"""Runs of a program that draw its observations too: all at once where the program allows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppl_gen.data.batching import Batch
from ppl_gen.draws.predictive import prior_rows, run
from ppl_gen.weights.weighed import many

if TYPE_CHECKING:
    from ppl_gen.fits.result import Fit

__all__ = ["prior_together", "replicated"]

Values = Mapping[str, Tensor]


def replicated(fit: Fit, batch: Batch, draws: Sequence[Values]) -> dict[str, Tensor]:
    """The observed sites drawn again given each draw of the latent ones: draws x shape; inside ``fit.bound()``."""
    observed = [site.name for site in fit.info.select(kind="observed")]

    def one(values: Values) -> dict[str, Tensor]:
        nodes = run(fit, batch, values, replicate=True).nodes
        return {fit.info.shown(n): nodes[fit.info.shown(n)]["value"].detach() for n in observed if n in nodes}

    return _each(one, draws, batch)


def prior_together(model: Callable[..., Any], batch: Batch, draws: int) -> dict[str, Tensor]:
    """What `prior_rows` gives, by other random numbers."""

    def one(_: Values) -> dict[str, Tensor]:
        return {name: value[0] for name, value in prior_rows(model, batch, 1).items()}

    return _each(one, [{}] * draws, batch)


def _each(one: Callable[[Values], dict[str, Tensor]], draws: Sequence[Values], batch: Batch) -> dict[str, Tensor]:
    """``one`` at every draw: by site, draws x shape of the site."""
    if len(draws) > 1:
        stacked = {name: torch.stack([torch.as_tensor(values[name]) for values in draws]) for name in draws[0]}
        # A tensor that nothing reads, so that there is one to count the draws by where there are no latents.
        found = many(lambda known: one(known[0]), (stacked, torch.zeros(len(draws))), batch)
        if found is not None:
            return {name: value.detach() for name, value in found.items()}
    singles = [one(values) for values in draws]
    return {name: torch.stack([single[name] for single in singles]) for name in singles[0]}
