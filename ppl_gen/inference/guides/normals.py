r"""A guide of known numbers: a normal over the unconstrained latent vector, or a mixture of some.

.. math:: q(u) = \sum_k \pi_k\, N(u;\, m_k,\, L_k L_k^\top), \quad z = T(u)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor
from torch.distributions import biject_to

from ppl_gen.data.batching import Batch
from ppl_gen.fitting.run import Run
from ppl_gen.inference.guides.vector_guide import refuse_moving_supports
from ppl_gen.inference.unconstrained import Unconstrained
from ppl_gen.workspace.isolation import without_side_effects

__all__ = ["NormalGuide", "kept_buffers", "normal_guide", "restored_normals"]

_BUFFERS = ("shares", "loc", "scale_tril")


class NormalGuide(AutoContinuous):
    r"""q(u) = sum_k shares[k] N(u; loc[k], scale_tril[k] scale_tril[k]') over the unconstrained latent vector.

    Shapes (K,), (K, size) and (K, size, size). The numbers are buffers, so that no optimiser moves them and a fit keeps
    and saves them with its state. With one part it can be drawn from by reparameterisation.
    """

    def __init__(
        self, model: Callable[..., Any], batch: Batch, shares: Tensor, loc: Tensor, scale_tril: Tensor
    ) -> None:
        super().__init__(model)
        for name, value in zip(_BUFFERS, (shares, loc, scale_tril), strict=True):
            self.register_buffer(name, value)
        with without_side_effects():
            self._setup_prototype(*batch.args, **batch.kwargs)

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        """The distribution of the unconstrained latent vector."""
        if len(self.loc) == 1:
            return dist.MultivariateNormal(self.loc[0], scale_tril=self.scale_tril[0])
        parts = dist.MultivariateNormal(self.loc, scale_tril=self.scale_tril)
        return dist.MixtureSameFamily(dist.Categorical(self.shares), parts)

    def _loc_scale(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        shares = self.shares[:, None]
        loc = (shares * self.loc).sum(0)
        variance = self.scale_tril.square().sum(-1) + (self.loc - loc).square()
        return loc, (shares * variance).sum(0).sqrt()

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The sites at the mean of the part with the largest share."""
        loc, _ = self.moments()
        return {site["name"]: biject_to(site["fn"].support)(part) for site, part in self._unpack_latent(loc)}

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the part with the largest share: that of one mode, where there are several."""
        most = int(self.shares.argmax())
        return self.loc[most], self.scale_tril[most] @ self.scale_tril[most].T


def normal_guide(run: Run, density: Unconstrained, shares: Tensor, loc: Tensor, scale_tril: Tensor) -> NormalGuide:
    """The guide over the latent sites of ``density``, finite sites left to be summed out.

    Raises:
        IncompatibleError: where the support of a site depends on another, which such a guide cannot follow.
    """
    model = poutine.block(run.joint, hide=run.info.finite_latents)
    guide = NormalGuide(model, run.data.batch(), shares, loc, scale_tril)
    refuse_moving_supports(run, guide, density)
    return guide


def kept_buffers(guide: NormalGuide) -> dict[str, Tensor]:
    """Its numbers, by the names that a fit's state has for them."""
    return {f"guide$$${name}": getattr(guide, name).detach().clone() for name in _BUFFERS}


def restored_normals(run: Run, batch: Batch, buffers: Mapping[str, Tensor]) -> NormalGuide:
    """The guide of a saved fit.

    Raises:
        ValueError: where its numbers are missing, or are not those of the program's latent vector.
    """
    missing = [name for name in _BUFFERS if f"guide$$${name}" not in buffers]
    if missing:
        raise ValueError(f"program: the saved guide lacks {', '.join(missing)}")
    shares, loc, scale_tril = (buffers[f"guide$$${name}"] for name in _BUFFERS)
    density = Unconstrained(run.joint, batch, run.info)
    shapes = [tuple(value.shape) for value in (shares, loc, scale_tril)]
    k, size = len(shares), density.size
    if shapes != [(k,), (k, size), (k, size, size)]:
        raise ValueError(f"program: the saved guide has shapes {shapes}, and {run.program.name!r} has {size} numbers")
    model = poutine.block(run.joint, hide=run.info.finite_latents)
    return NormalGuide(model, batch, shares, loc, scale_tril)
