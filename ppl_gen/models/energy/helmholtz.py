r"""The Helmholtz machine: layers of zeros and ones drawn from the top down, and a network that guesses them bottom up.

.. math:: p(x, z) = p(z_L) \prod_{l=1}^{L-1} p(z_l \mid z_{l+1}) \; p(x \mid z_1), \quad
          q(z \mid x) = q(z_1 \mid x) \prod_{l=1}^{L-1} q(z_{l+1} \mid z_l)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_gen.data.inputs import check_width, row_width
from ppl_gen.models.energy.rbm import binary_rows
from ppl_gen.nn.likelihoods import log_odds
from ppl_gen.nn.networks import checked_widths
from ppl_gen.program.program import Program, Recipe

__all__ = ["SigmoidLayers", "checked_layers", "helmholtz"]


class SigmoidLayers(nn.Module):
    """Affine maps, each from one layer of zeros and ones to the log odds of the next.

    Args:
        sizes: units of the layers, in the order in which they are drawn.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        pairs = zip(sizes[:-1], sizes[1:], strict=True)
        self.layers = nn.ModuleList([nn.Linear(before, after) for before, after in pairs])

    def coins(self, layer: int, units: Tensor) -> Any:
        """The next layer given this one: a Bernoulli distribution over its units as one event."""
        return coins(self.layers[layer](units))


def coins(logits: Tensor) -> Any:
    """Zeros and ones of these log odds, the last dimension as one event."""
    return dist.Bernoulli(logits=logits).to_event(1)


class Generator(nn.Module):
    """The top layer's log odds, and the maps down from it; the last one begins at the log odds of the data.

    Args:
        sizes: units of the hidden layers, from the lowest to the top.
        odds: log odds of the visible units, on their own.
    """

    def __init__(self, sizes: Sequence[int], odds: Tensor) -> None:
        super().__init__()
        self.top = nn.Parameter(torch.zeros(sizes[-1]))
        self.down = SigmoidLayers([*sizes[::-1], len(odds)])
        last = self.down.layers[-1]
        assert isinstance(last, nn.Linear)
        with torch.no_grad():
            last.bias.copy_(odds)


def helmholtz(visible: int | None = None, hidden: Sequence[int] = (64, 16)) -> Recipe:
    r"""A sigmoid belief network over rows of zeros and ones (N x visible), with a recognition network as its guide.

    .. math:: z_L \sim \mathrm{Bernoulli}(\sigma(c)), \quad z_l \mid z_{l+1} \sim \mathrm{Bernoulli}(\sigma(V_l z_{l+1}
              + c_l)), \quad x \mid z_1 \sim \mathrm{Bernoulli}(\sigma(V_0 z_1 + c_0))

    Model and guide are ordinary Pyro programs over the sites ``z1`` (next to the rows) ... ``zL`` and ``x``.
    ``SVI(objective=WakeSleep())`` learns it as it was published, ``WakeSleep(particles=K)`` better; ``ELBO()`` takes
    the score function. ``fit.evidence`` weighs draws of the guide. Networks: ``generator``, ``recogniser``.

    Args:
        visible: columns of the data; None: as many as they have.
        hidden: units of the layers, from the lowest to the top.

    Returns:
        A recipe; it raises ValueError for data that are not N x visible zeros and ones.

    Raises:
        ValueError: for an argument out of its range.

    References:
        The Helmholtz machine (Dayan, Hinton, Neal and Zemel, 1995).
        Connectionist learning of belief networks (Neal, 1992).

    Example:
        >>> import torch, ppl_gen as pg
        >>> from ppl_gen.inference import SVI, WakeSleep
        >>> x = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).repeat(20, 1)
        >>> fit = pg.fit(helmholtz(hidden=(4, 2)), x, SVI(WakeSleep(), steps=20), seed=0)
        >>> fit.sample(3)["x"].shape, fit.posterior(draws=2)["z2"].shape
        (torch.Size([3, 3]), torch.Size([2, 40, 2]))
    """
    check_width("visible", visible)
    sizes = checked_layers(hidden)

    def build(data: Any) -> Program:
        rows = binary_rows(data, row_width(visible, data, "helmholtz"), "helmholtz")
        generator, recogniser = Generator(sizes, log_odds(rows)), SigmoidLayers([rows.shape[1], *sizes])

        def helmholtz(x: Tensor) -> None:
            pyro.module("generator", generator)
            with pyro.plate("data", len(x)):
                units = pyro.sample(f"z{len(sizes)}", coins(generator.top))
                for layer in range(len(sizes) - 1):
                    units = pyro.sample(f"z{len(sizes) - 1 - layer}", generator.down.coins(layer, units))
                pyro.sample("x", generator.down.coins(len(sizes) - 1, units), obs=x.to(generator.top))

        def guide(x: Tensor) -> None:
            pyro.module("recogniser", recogniser)
            units = x.to(generator.top)
            with pyro.plate("data", len(x)):
                for layer in range(len(sizes)):
                    units = pyro.sample(f"z{layer + 1}", recogniser.coins(layer, units))

        return Program(helmholtz, guide)

    return Recipe(build, name="helmholtz", arguments={"visible": visible, "hidden": sizes})


def checked_layers(hidden: Sequence[int], least: int = 1) -> tuple[int, ...]:
    """Units of hidden layers as a tuple; raises ValueError for what is none, or for fewer layers than ``least``."""
    sizes = checked_widths(hidden, "sigmoid")
    if len(sizes) < least:
        raise ValueError(f"hidden: expected units of at least {least} layer(s), got {hidden!r}")
    return sizes
