r"""A guide from a distribution of one vector over the unconstrained latent space of a program.

.. math:: u \sim q(u), \quad z = T(u), \quad \log q(z) = \log q(u) - \log \left| \det \partial T / \partial u \right|
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.infer.autoguide import AutoContinuous, AutoGuide
from torch.distributions import biject_to

from ppl_gen.data.batching import Batch
from ppl_gen.errors import IncompatibleError
from ppl_gen.fitting.run import Run
from ppl_gen.inference.guides.moving import MOVED_REMEDY, moving_supports, said_to_move
from ppl_gen.inference.unconstrained import Unconstrained
from ppl_gen.workspace.isolation import without_side_effects

__all__ = ["guide_from_vector", "refuse_moving_supports"]


class _VectorGuide(AutoContinuous):
    """Pyro's bookkeeping of an autoguide around any distribution of the vector."""

    def __init__(self, model: Callable[..., Any], batch: Batch, distribution: Callable[[], TorchDistribution]) -> None:
        super().__init__(model)
        self._distribution = distribution
        with without_side_effects():
            self._setup_prototype(*batch.args, **batch.kwargs)

    def get_posterior(self, *args: Any, **kwargs: Any) -> TorchDistribution:
        """The distribution of the vector."""
        return self._distribution()


def guide_from_vector(run: Run, distribution: Callable[[], TorchDistribution]) -> Callable[..., Any]:
    r"""A Pyro guide over the continuous latent sites that draws them together, as one vector without constraints.

    .. math:: u \sim q(u), \quad z = T(u), \quad \log q(z) = \log q(u) - \log | \det \partial T / \partial u |

    The vector is that of `Unconstrained`: the sites in the order of the program, each flattened. Finite sites are left
    to be summed out. With the guide in its `Outcome`, a fit has `evidence`, `diagnose`, `to_arviz` and all else.

    Args:
        run: what the algorithm was called with.
        distribution: called without arguments whenever the guide runs, gives q(u), of event shape (size,). Numbers that
            are to be saved with the fit are made in it by `pyro.param`.

    Returns:
        The guide; call it once for its parameters to exist.

    Raises:
        ValueError: if the distribution is not one of such a vector.
        IncompatibleError: if no latent site is continuous, or the support of one depends on another latent site.

    Example:
        >>> from dataclasses import dataclass
        >>> import pyro, pyro.distributions as dist, ppl_gen as pg
        >>> from ppl_gen.extending import GuidePosterior, Outcome
        >>> from ppl_gen.inference import Algorithm
        >>> @dataclass(frozen=True)
        ... class Guess(Algorithm):
        ...     needs = (("density",), ("differentiable latents",))
        ...     def run(self, run):
        ...         def q():
        ...             loc = pyro.param("loc", torch.zeros(1))
        ...             return dist.Normal(loc, 0.5).to_event(1)
        ...         guide = guide_from_vector(run, q)
        ...         return Outcome(GuidePosterior(guide), state=run.workspace.snapshot())
        >>> def model(x):
        ...     rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Poisson(rate), obs=x)
        >>> fit = pg.fit(model, torch.tensor([0.0, 2.0, 1.0]), Guess(), seed=0)
        >>> float(fit.posterior()["rate"].log().std()) < 0.6, "rate" in fit.info.guide_sites
        (True, True)
    """
    batch = run.data.batch()
    density = Unconstrained(run.joint, batch, run.info)
    model = poutine.block(run.joint, hide=run.info.finite_latents)
    guide = _VectorGuide(model, batch, distribution)
    first = distribution()
    if tuple(first.shape()) != (density.size,) or first.event_dim != 1:
        raise ValueError(
            f"distribution: expected draws of event shape ({density.size},), for {', '.join(density.sites)}, got batch "
            f"{list(first.batch_shape)} and event {list(first.event_shape)}"
        )
    refuse_moving_supports(run, guide, density)
    guide(*batch.args, **batch.kwargs)
    return guide


def refuse_moving_supports(run: Run, guide: AutoGuide, density: Unconstrained) -> None:
    """Pyro keeps the supports of its first look, and a bound that another site moves would be read wrongly.

    Raises:
        IncompatibleError: naming the site.
    """
    for step in (0.3, -0.7):
        u = step * torch.linspace(0.5, 1.0, density.size, dtype=run.dtype, device=run.data.device)
        with torch.no_grad():
            made = {name: biject_to(_support(guide, name))(part) for name, part in density.split(u).items()}
            exact = dict(zip(density.sites, density.values(u), strict=True))
        moved = [name for name in exact if not torch.allclose(exact[name], made[name], rtol=1e-4, atol=1e-6)]
        if moved:
            found = moving_supports(run.joint, run.data.batch())
            raise IncompatibleError(
                f"{said_to_move({name: found.get(name, ()) for name in moved})} in {run.program.name!r}, which a guide "
                f"from a vector cannot follow. {MOVED_REMEDY}"
            )


def _support(guide: AutoGuide, name: str) -> Any:
    """The support of a site at the guide's first look."""
    return guide.prototype_trace.nodes[name]["fn"].support
