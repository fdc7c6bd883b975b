r"""Guides that send normal noise through a flow: they bend where a normal guide cannot."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoContinuous, init_to_feasible
from pyro.nn import PyroParam
from torch import Tensor, nn

from ppl_gen.arguments import require_choice
from ppl_gen.errors import require_positive, require_whole
from ppl_gen.nn.flow_maps import MAPS
from ppl_gen.nn.one_way import OneWay

__all__ = ["AutoFlow", "Kind", "flow_guide"]

Kind = Literal["planar", "radial", "sylvester", "iaf"]


def flow_guide(kind: Kind = "planar", *, layers: int = 8, units: int = 8, init_scale: float = 0.1) -> Any:
    r"""A guide over all continuous latents of a program: noise through a flow, then to its place and scale.

    .. math:: u_0 \sim \mathrm{Normal}(0, I), \quad u_K = f_K \circ \dots \circ f_1(u_0), \quad u = m + s \odot u_K,
              \quad \log q(u) = \log q(u_0) - \sum_k \log \left| \det \frac{\partial u_k}{\partial u_{k-1}} \right|
              - \sum_i \log s_i

    u are the latents without their constraints, global and local ones, flattened into one vector. These flows know the
    density of their own draws alone, which are weighed in the call that draws them; ``fit.evidence()``,
    ``fit.marginal_likelihood()`` and ``fit.diagnose()`` do so. With local latents the vector has numbers for each row,
    so that minibatches are refused: a guide by a network of the row takes `ppl_gen.models.vae` with ``posterior=``.

    Args:
        kind: "planar" or "radial" (one bend for each layer), "sylvester" (as many as ``units``), "iaf" (every number
            scaled and shifted by a masked network of those before it).
        layers: maps one after another.
        units: of "sylvester": bends in a layer, at most the size of the vector; of "iaf": the hidden width is this many
            times the size of the vector.
        init_scale: s at the start, in units of the unconstrained latents.

    Returns:
        What `pg.Program` takes as ``guide``.

    Raises:
        ValueError: for an argument out of its range.

    References:
        Variational inference with normalizing flows (Rezende and Mohamed, 2015).
        Sylvester normalizing flows for variational inference (van den Berg et al., 2018).
        Improving variational inference with inverse autoregressive flow (Kingma et al., 2016).

    Example:
        >>> import pyro, ppl_gen as pg
        >>> from ppl_gen.inference import SVI
        >>> def banana(x):
        ...     z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(z[0] ** 2 + z[1], 0.5), obs=x)
        >>> program = pg.Program(banana, flow_guide("planar", layers=4))
        >>> fit = pg.fit(program, torch.tensor([0.8, 1.1]), SVI(steps=20, lr=0.01), seed=0)
        >>> fit.posterior(draws=5)["z"].shape
        torch.Size([5, 2])
    """
    require_choice("kind", kind, get_args(Kind))
    require_whole("layers", layers)
    require_whole("units", units)
    require_positive("init_scale", init_scale)
    return partial(AutoFlow, kind=kind, layers=int(layers), units=int(units), init_scale=float(init_scale))


class AutoFlow(AutoContinuous):
    """The guide of `flow_guide`, made by the fit for its program."""

    def __init__(
        self,
        model: Callable[..., Any],
        kind: Kind = "planar",
        layers: int = 8,
        units: int = 8,
        init_scale: float = 0.1,
        init_loc_fn: Callable[..., Any] = init_to_feasible,
    ) -> None:
        self.kind, self.count, self.units, self.init_scale = kind, layers, units, init_scale
        super().__init__(model, init_loc_fn=init_loc_fn)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        self.loc = nn.Parameter(self._init_loc())
        self.scale = PyroParam(torch.full_like(self.loc.detach(), self.init_scale), dist.constraints.softplus_positive)
        size = len(self.loc)
        if self.kind == "iaf" and size < 2:
            raise ValueError(
                "guide: 'iaf' scales each number by those before it, and this program has one latent number; take "
                "'planar' or 'radial'"
            )
        self.flow = nn.ModuleList(MAPS[self.kind](size, self.units, number) for number in range(self.count))
        self.flow.to(self.loc)

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        """q(u), for the draws of one call."""
        noise = dist.Normal(torch.zeros_like(self.loc), 1.0).to_event(1)
        return dist.TransformedDistribution(noise, [OneWay([*self.flow, self._placed])])

    def _placed(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return self.loc + self.scale * u, self.scale.log().sum()
