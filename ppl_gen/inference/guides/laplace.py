"""The second stage of AutoLaplaceApproximation: after the steps, a normal with the curvature at the optimum."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pyro.infer.autoguide import AutoLaplaceApproximation
from torch import Tensor

from ppl_gen.data.batching import Batch
from ppl_gen.inference.guides.normals import NormalGuide
from ppl_gen.inference.objectives.elbo import ELBO
from ppl_gen.inference.objectives.game import Setting

__all__ = ["LaplaceGuide", "restored_laplace", "second_stage"]


class LaplaceGuide(NormalGuide):
    r"""q(u) = N(u*, H^-1) over the unconstrained latent vector, H the Hessian of -log p(x, u) at its minimum u*.

    ``first`` is the guide that the steps trained, a point, with which a later fit goes on.
    """

    def __init__(self, first: AutoLaplaceApproximation, batch: Batch, loc: Tensor, scale_tril: Tensor) -> None:
        super().__init__(first.model, batch, loc.new_ones(1), loc[None], scale_tril[None])
        self._first = (first,)  # not a submodule: its parameter does not belong to this guide

    @property
    def first(self) -> AutoLaplaceApproximation:
        """The guide of the first stage."""
        return self._first[0]


def second_stage(setting: Setting, batch: Batch) -> LaplaceGuide:
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
        return LaplaceGuide(first, batch, first.loc.detach().clone(), scale_tril)


def restored_laplace(
    first: AutoLaplaceApproximation, batch: Batch, buffers: Mapping[str, Tensor]
) -> LaplaceGuide | None:
    """The guide of a saved fit, or None where its second stage had failed."""
    loc, scale_tril = (buffers.get(f"guide$$${name}") for name in ("loc", "scale_tril"))
    if loc is None or scale_tril is None:
        return None
    return LaplaceGuide(first, batch, loc[0], scale_tril[0])
