"""Draws of a program before it has learned anything."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Unit
from torch import Tensor

from ppl_gen.draws.forward import refuse_weighed_draws, unobserved_run
from ppl_gen.draws.predictive import positive, prior_rows, refuse_improper
from ppl_gen.errors import require_seed
from ppl_gen.fits.preparing import prepared
from ppl_gen.handlers.read_sites import is_flat
from ppl_gen.handlers.sites import is_sample
from ppl_gen.handlers.whole_plates import whole_plates
from ppl_gen.program.explained import explained
from ppl_gen.program.only_summed import by_branches, drawn_too, tried
from ppl_gen.program.program import as_recipe
from ppl_gen.workspace.closures import same_again

__all__ = ["prior_predictive"]


_HALVES = ("observed", "unobserved")  # of a site with `obs_mask`: of what is drawn, it takes one or the other


def prior_predictive(program: Any, data: Any, *, draws: int = 1000, seed: int = 0) -> dict[str, Tensor]:
    """Draws of every site from the prior, the observations of ``data`` removed: draws x shape.

    Args:
        program: a model function, a `Program` or a `Recipe`.
        data: what the model is called with: inputs, and the number of rows.
        draws: how many.
        seed: of all randomness here.

    Raises:
        ValueError, TypeError: as `pg.check` does, for a mistake in program or data.

    Example:
        >>> import pyro, torch, ppl_gen as pg
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> pg.prior_predictive(model, torch.zeros(3), draws=5, seed=0)["x"].shape
        torch.Size([5, 3])
    """
    positive("draws", draws)
    with (
        torch.no_grad(),
        same_again(program),
        prepared(as_recipe(program), data, seed=require_seed(seed), training=False) as (built, dataset, _),
        whole_plates(),
    ):
        batch = dataset.batch()
        built, _ = by_branches(built, batch, tried(built.model, batch))
        with drawn_too(built, batch), explained(built, batch, "model"):
            trace = poutine.trace(built.model).get_trace(*batch.args, **batch.kwargs)
        refuse_improper(built.name, {n for n, node in trace.nodes.items() if is_sample(node) and is_flat(node["fn"])})
        if any(isinstance(node["fn"], Unit) for node in trace.nodes.values() if node["type"] == "sample"):
            refuse_weighed_draws(built.name, unobserved_run(built.model), batch, {}, "prior_predictive")
        found = prior_rows(built.model, batch, draws)
        split = [name.removesuffix("_observed") for name in found if name.endswith("_observed")]
        halves = {f"{n}_{half}" for n in split if {n, f"{n}_unobserved"} <= found.keys() for half in _HALVES}
        return {name: value for name, value in found.items() if name not in halves}
