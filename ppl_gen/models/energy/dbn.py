r"""The deep belief network: a restricted Boltzmann machine on top, layers of coins below it.

.. math:: p(x, z_1, \dots, z_{L-1}) = p(x \mid z_1) \prod_{l=1}^{L-2} p(z_l \mid z_{l+1}) \; e^{-F(z_{L-1})} / Z
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor, nn

from ppl_gen.data.inputs import check_width, row_width
from ppl_gen.errors import require_number, require_whole
from ppl_gen.models.energy.bipartite import ENUMERABLE
from ppl_gen.models.energy.helmholtz import SigmoidLayers, checked_layers
from ppl_gen.models.energy.rbm import BoltzmannMachine, binary_rows
from ppl_gen.models.energy.stack import check_widths, machines_of
from ppl_gen.nn.chain_rows import ChainRows
from ppl_gen.nn.likelihoods import log_odds
from ppl_gen.program.extensions import Energy
from ppl_gen.program.program import Program, Recipe

if TYPE_CHECKING:
    from ppl_gen.fits.result import Fit

__all__ = ["dbn"]


class BeliefNetwork(nn.Module):
    """The machine on top and the maps down from the layer that it shares with them.

    Args:
        sizes: visible units and those of all hidden layers.
        odds: log odds of the visible units.
        scale: standard deviation of the starting weights.
    """

    def __init__(self, sizes: Sequence[int], odds: Tensor, scale: float) -> None:
        super().__init__()
        self.top = BoltzmannMachine(torch.zeros(sizes[-2]), sizes[-1], scale)
        self.down = SigmoidLayers(sizes[-2::-1])
        with torch.no_grad():
            for layer in self.down.layers:
                assert isinstance(layer, nn.Linear)
                layer.weight.normal_(std=scale)
                layer.bias.zero_()
            assert isinstance(layer, nn.Linear)  # the last one, to the rows
            layer.bias.copy_(odds)


def dbn(
    visible: int | None = None,
    hidden: Sequence[int] | None = None,
    *,
    layers: Sequence[Fit] | None = None,
    scale: float = 0.01,
    sweeps: int = 1000,
) -> Recipe:
    r"""A deep belief network over rows of zeros and ones (N x visible), with a recognition network as its guide.

    .. math:: z_{L-1} \sim e^{-F(z)} / Z, \quad z_l \mid z_{l+1} \sim \mathrm{Bernoulli}(\sigma(V_l z_{l+1} + c_l)),
              \quad x \mid z_1 \sim \mathrm{Bernoulli}(\sigma(V_0 z_1 + c_0))

    The layer L is summed out in the free energy F of the machine on top, whose states are the site ``z{L-1}``. First
    the layers one by one, ``rbm_stack(x, hidden)``, whose weights go up in the guide and down in the model; then both
    apart, by the up-down algorithm, ``SVI(objective=WakeSleep(steps=k))``. ``fit.evidence`` weighs draws of the guide,
    log Z by enumeration (at most 16 units on one side of the top machine) or ``method=pg.AIS()``. Networks: ``network``
    (its ``top`` is the machine), ``recogniser``.

    Args:
        visible: columns of the data; None: as many as they have.
        hidden: units of the layers, from the lowest to the top, at least two; None: those of ``layers``, or (64, 32).
        layers: fits of `rbm`, one for each hidden layer, as `rbm_stack` gives them; None: random weights.
        scale: standard deviation of random weights.
        sweeps: Gibbs sweeps of the top machine behind each drawn row.

    Returns:
        A recipe; it raises ValueError for data that are not N x visible zeros and ones.

    Raises:
        ValueError: for an argument out of its range, or layers of other sizes or of a `dbm`.
        TypeError: for layers that are no fits of `rbm`.

    References:
        A fast learning algorithm for deep belief nets (Hinton, Osindero and Teh, 2006).
        On the quantitative analysis of deep belief networks (Salakhutdinov and Murray, 2008).

    Example:
        >>> import torch, ppl_gen as pg
        >>> from ppl_gen.inference import SVI, ContrastiveDivergence, WakeSleep
        >>> from ppl_gen.models import rbm_stack
        >>> x = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).repeat(20, 1)
        >>> stack = rbm_stack(x, (4, 2), SVI(ContrastiveDivergence(), steps=50))
        >>> fit = pg.fit(dbn(layers=stack, sweeps=10), x, SVI(WakeSleep(), steps=20), seed=0)
        >>> fit.sample(3)["x"].shape, fit.evidence().kind
        (torch.Size([3, 3]), 'importance weighted, 100 particles; log Z by enumeration')
    """
    check_width("visible", visible)
    machines = None if layers is None else machines_of(layers)
    if hidden is None:
        hidden = (64, 32) if machines is None else [machine.weight.shape[1] for machine in machines]
    sizes = checked_layers(hidden, 2)
    require_number("scale", scale)
    require_whole("sweeps", sweeps)

    def build(data: Any) -> Program:
        rows = binary_rows(data, row_width(visible, data, "dbn"), "dbn")
        widths = [rows.shape[1], *sizes]
        network, recogniser = BeliefNetwork(widths, log_odds(rows), scale), SigmoidLayers(widths[:-1])
        if machines is not None:
            _filled(network, recogniser, machines, widths)
        return _program(network, recogniser, sweeps, enumerable=min(widths[-2:]) <= ENUMERABLE)

    return Recipe(build, name="dbn", arguments={"visible": visible, "hidden": sizes})


def _program(network: BeliefNetwork, recogniser: SigmoidLayers, sweeps: int, *, enumerable: bool) -> Program:
    top, depth = network.top, len(network.down.layers)

    def dbn(x: Tensor) -> None:
        pyro.module("network", network)
        with pyro.plate("data", len(x)):
            units = pyro.sample(f"z{depth}", ChainRows(top, sweeps))
            for layer in range(depth - 1):
                units = pyro.sample(f"z{depth - 1 - layer}", network.down.coins(layer, units))
            pyro.sample("x", network.down.coins(depth - 1, units), obs=x.to(top.weight))

    def guide(x: Tensor) -> None:
        pyro.module("recogniser", recogniser)
        units = x.to(top.weight)
        with pyro.plate("data", len(x)):
            for layer in range(depth):
                units = pyro.sample(f"z{layer + 1}", recogniser.coins(layer, units))

    partition = top.log_partition if enumerable else None
    energy = Energy(top.free_energy, top.gibbs, partition, site=f"z{depth}", tempering=top.tempering)
    return Program(dbn, guide, energy=energy)


def _filled(
    network: BeliefNetwork, recogniser: SigmoidLayers, machines: Sequence[BoltzmannMachine], widths: Sequence[int]
) -> None:
    """Weights of machines below the top go down in the network and up in the recogniser; the last is the top."""
    check_widths(machines, widths)
    network.top.load_state_dict(machines[-1].state_dict())
    downs = list(network.down.layers)[::-1]
    for machine, down, up in zip(machines[:-1], downs, recogniser.layers, strict=True):
        assert isinstance(down, nn.Linear) and isinstance(up, nn.Linear)
        with torch.no_grad():
            down.weight.copy_(machine.weight)
            down.bias.copy_(machine.visible_bias)
            up.weight.copy_(machine.weight.T)
            up.bias.copy_(machine.hidden_bias)
