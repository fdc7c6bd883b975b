r"""Networks that guess codes back: q(z | x) as a normal of the row, or a normal and a flow behind it."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
from torch import Tensor, nn

from ppl_gen.arguments import require_choice
from ppl_gen.errors import require_whole
from ppl_gen.nn.flow_maps import MAPS, FlowMap
from ppl_gen.nn.networks import Perceptron, standardised
from ppl_gen.nn.one_way import OneWay, Step

__all__ = ["Encoder", "FlowEncoder", "NormalEncoder", "flow_maps"]

#: The widest and the narrowest a guide may get, as logarithms of standard deviations: a run that diverges says so by
#: its loss and not by a distribution that cannot be made.
LOG_SCALE = (-15.0, 8.0)
UNITS = 8  # bends of a Sylvester map, hidden units of an autoregressive one for each number


class Encoder(nn.Module):
    """A network of standardised rows (and labels, where it was made for them), whose numbers make q(z | x).

    Calling it gives a `pyro.distributions` distribution over z.

    Args:
        network: from standardised rows to numbers.
        centre: subtracted from the rows, in their shape.
        spread: the rows are divided by it.
    """

    centre: Tensor
    spread: Tensor

    def __init__(self, network: nn.Module, centre: Tensor, spread: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("centre", centre.clone())
        self.register_buffer("spread", spread.clone())

    def numbers(self, x: Tensor, *label: Tensor) -> Tensor:
        """What the network makes of rows."""
        seen = standardised(x, self.centre, self.spread)
        if isinstance(self.network, Perceptron):
            seen = seen.flatten(-self.centre.dim())
        made: Tensor = self.network(seen, *label)
        return made

    def forward(self, x: Tensor, *label: Tensor) -> Any:
        """q(z | x)."""
        raise NotImplementedError


class NormalEncoder(Encoder):
    """q(z | x) from a network of twice as many outputs as z has numbers: means, and logarithms of scales.

    ``encoder(x).mean`` are the codes.
    """

    def forward(self, x: Tensor, *label: Tensor) -> Any:
        loc, log_scale = self.numbers(x, *label).chunk(2, -1)
        return dist.Normal(loc, log_scale.clamp(*LOG_SCALE).exp()).to_event(1)


def flow_maps(kind: str, layers: int, latent: int) -> list[FlowMap]:
    """The maps of a posterior over ``latent`` numbers; none for "normal".

    Raises:
        ValueError: for an unknown kind, no layers, or an autoregressive map of one number.
    """
    require_choice("posterior", kind, ("normal", *MAPS))
    require_whole("posterior_layers", layers)
    if kind == "normal":
        return []
    if kind == "iaf" and latent < 2:
        raise ValueError("posterior: 'iaf' scales each number by those before it, and latent is 1; take 'planar'")
    return [MAPS[kind](latent, UNITS, number) for number in range(layers)]


class FlowEncoder(Encoder):
    r"""q(z | x): z_0 from a normal of the row, then maps of the row.

    .. math:: z_0 \sim \mathrm{Normal}(m(x), \mathrm{diag}\, s(x)^2), \quad z_k = f_k(z_{k-1}; \theta_k + h_k(x)), \quad
              \log q(z_K \mid x) = \log q(z_0 \mid x) - \sum_k \log \left| \det
              \frac{\partial z_k}{\partial z_{k-1}} \right|

    Its density is known of the last draw alone, and it has no mean in closed form.

    Args:
        network: from standardised rows to means, logarithms of scales, and the numbers of each map.
        centre: see `Encoder`.
        spread: see `Encoder`.
        maps: see `flow_maps`.
        latent: numbers of z.
    """

    def __init__(self, network: nn.Module, centre: Tensor, spread: Tensor, maps: list[FlowMap], latent: int) -> None:
        super().__init__(network, centre, spread)
        self.maps, self.latent = nn.ModuleList(maps), latent
        self.sizes = [latent, latent, *(part.numbers for part in maps)]

    def forward(self, x: Tensor, *label: Tensor) -> Any:
        loc, log_scale, *changes = self.numbers(x, *label).split(self.sizes, -1)
        start = dist.Normal(loc, log_scale.clamp(*LOG_SCALE).exp()).to_event(1)
        steps = [_step(part, change) for part, change in zip(self.maps, changes, strict=True)]
        return dist.TransformedDistribution(start, [OneWay(steps)])


def _step(part: nn.Module, change: Tensor) -> Step:
    def step(z: Tensor) -> tuple[Tensor, Tensor]:
        made: tuple[Tensor, Tensor] = part(z, change)
        return made

    return step
