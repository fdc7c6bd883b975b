"""The second stage of AutoLaplaceApproximation: after the steps, a normal with the curvature at the optimum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.transforms import LowerCholeskyAffine
from pyro.infer.autoguide import AutoContinuous, AutoLaplaceApproximation
from torch import Tensor

from ppl_gen.data.batching import Batch
from ppl_gen.inference.objectives.elbo import ELBO
from ppl_gen.inference.objectives.game import Setting
from ppl_gen.workspace.isolation import without_side_effects

__all__ = ["Laplace", "kept_buffers", "restored_laplace", "second_stage"]

_BUFFERS = ("loc", "scale_tril")


class Laplace(AutoContinuous):
    r"""q(u) = N(u*, H^-1) over the unconstrained latent vector, H the Hessian of -log p(x, u) at its minimum u*.

    ``first`` is the guide that the steps trained, a point, with which a later fit goes on. The numbers are buffers, so
    that a fit keeps and saves them with its state.
    """

    def __init__(self, first: AutoLaplaceApproximation, batch: Batch, loc: Tensor, scale_tril: Tensor) -> None:
        super().__init__(first.model)
        self._first = (first,)  # not a submodule: its parameter does not belong to this guide
        self.register_buffer("loc", loc)
        self.register_buffer("scale_tril", scale_tril)
        with without_side_effects():
            self._setup_prototype(*batch.args, **batch.kwargs)

    @property
    def first(self) -> AutoLaplaceApproximation:
        """The guide of the first stage."""
        return self._first[0]

    def get_posterior(self, *args: Any, **kwargs: Any) -> dist.MultivariateNormal:
        """The normal over the unconstrained latent vector."""
        return dist.MultivariateNormal(self.loc, scale_tril=self.scale_tril)

    def get_base_dist(self) -> Any:
        """Standard normal noise of the same size."""
        return dist.Normal(torch.zeros_like(self.loc), 1.0).to_event(1)

    def get_transform(self, *args: Any, **kwargs: Any) -> LowerCholeskyAffine:
        """The map that takes the noise to the normal."""
        return LowerCholeskyAffine(self.loc, self.scale_tril)

    def _loc_scale(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.loc, self.scale_tril.square().sum(-1).sqrt()


def second_stage(setting: Setting, batch: Batch) -> Laplace:
    """The normal at the optimum that ``setting.guide`` has reached on all rows, finite latents summed out.

    The Hessian is that of the very loss the steps minimised, -log p(x, u) in nats, taken by differentiating twice.

    Raises:
        ValueError: where the Hessian is not positive definite: no maximum was reached, or none exists.
    """
    first = setting.guide
    assert isinstance(first, AutoLaplaceApproximation)
    loss = ELBO().build(setting).loss("program", batch, {})[0].value * (batch.total or 1)
    (slope,) = torch.autograd.grad(loss, first.loc, create_graph=True)
    rows = [torch.autograd.grad(part, first.loc, retain_graph=True, allow_unused=True)[0] for part in slope]
    with torch.no_grad():
        hessian = torch.stack([torch.zeros_like(slope) if row is None else row for row in rows]).double()
        factor, failed = torch.linalg.cholesky_ex((hessian + hessian.T) / 2)
        if int(failed) or not bool(factor.isfinite().all()):
            raise ValueError(
                "the second stage of AutoLaplaceApproximation failed: the curvature of log p(x, z) at the last step is "
                "not that of a maximum, so there is no normal to take from it. Run more steps, or use "
                "AutoMultivariateNormal; what was learned is kept as a point"
            )
        scale_tril = torch.linalg.cholesky(torch.cholesky_inverse(factor)).to(first.loc.dtype)
        return Laplace(first, batch, first.loc.detach().clone(), scale_tril)


def restored_laplace(first: AutoLaplaceApproximation, batch: Batch, buffers: Mapping[str, Tensor]) -> Laplace | None:
    """The guide of a saved fit, or None where its second stage had failed."""
    values = [buffers.get(f"guide$$${name}") for name in _BUFFERS]
    return Laplace(first, batch, *(v for v in values if v is not None)) if all(v is not None for v in values) else None


def kept_buffers(guide: Laplace) -> dict[str, Tensor]:
    """Its numbers, by the names that a fit's state has for them."""
    return {f"guide$$${name}": getattr(guide, name).detach().clone() for name in _BUFFERS}
