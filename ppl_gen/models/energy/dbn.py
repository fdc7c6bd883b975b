r"""The deep belief network: a restricted Boltzmann machine on top, layers of coins below it.

.. math:: p(x, z_1, \dots, z_{L-1}) = p(x \mid z_1) \prod_{l=1}^{L-2} p(z_l \mid z_{l+1}) \; e^{-F(z_{L-1})} / Z
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor, nn

from ppl_gen.data.inputs import check_width, entries, row_width
from ppl_gen.errors import require_number, require_seed, require_whole
from ppl_gen.models.energy.bipartite import ENUMERABLE
from ppl_gen.models.energy.chain_rows import ChainRows
from ppl_gen.models.energy.helmholtz import SigmoidLayers, checked_layers
from ppl_gen.models.energy.rbm import BoltzmannMachine, binary_rows, rbm
from ppl_gen.nn.likelihoods import log_odds
from ppl_gen.program.extensions import Energy
from ppl_gen.program.program import Program, Recipe

if TYPE_CHECKING:
    from ppl_gen.fits.result import Fit
    from ppl_gen.fitting.algorithm import Algorithm

__all__ = ["dbn", "rbm_stack"]


def rbm_stack(
    x: Any, hidden: Sequence[int] = (64, 32), algorithm: Algorithm | None = None, *, seed: int = 0
) -> tuple[Fit, ...]:
    """Boltzmann machines trained greedily: the first on the rows, each of the others on hidden units of the one below.

    Args:
        x: rows of zeros and ones, N x visible.
        hidden: hidden units of the machines, from the lowest to the top.
        algorithm: trains each of them; None: contrastive divergence, 2000 steps on batches of 100 at a rate of 0.01.
        seed: of everything random.

    Returns:
        Their fits, for `dbn`.

    Raises:
        ValueError: for rows that are no zeros and ones, or an argument out of its range.

    References:
        A fast learning algorithm for deep belief nets (Hinton, Osindero and Teh, 2006).

    Example:
        >>> import torch
        >>> from ppl_gen.inference import SVI, ContrastiveDivergence
        >>> x = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).repeat(20, 1)
        >>> [fit.module("machine").weight.shape for fit in rbm_stack(x, (4, 2), SVI(ContrastiveDivergence(), steps=5))]
        [torch.Size([3, 4]), torch.Size([4, 2])]
    """
    from ppl_gen.fits.driver import fit
    from ppl_gen.inference import SVI, ContrastiveDivergence

    sizes = checked_layers(hidden)
    seed = require_seed(seed)
    (given,) = entries(x, "rbm_stack", "x")
    assert given is not None  # the first entry
    dtype = given.dtype if given.dtype in (torch.float32, torch.float64) else torch.get_default_dtype()
    rows = binary_rows(x, row_width(None, x, "rbm_stack"), "rbm_stack").to(dtype)
    chosen = algorithm or SVI(ContrastiveDivergence(), steps=2000, batch_size=min(100, len(rows)), lr=0.01)
    generator, fits = torch.Generator().manual_seed(seed), []
    for units in sizes:
        fits.append(fit(rbm(hidden=units), rows, chosen, seed=seed, progress=False))
        machine = fits[-1].module("machine")
        assert isinstance(machine, BoltzmannMachine)
        with torch.no_grad():
            chance = (rows @ machine.weight.to(rows) + machine.hidden_bias.to(rows)).sigmoid().cpu()
        rows = (torch.rand(chance.shape, generator=generator, dtype=chance.dtype) < chance).to(chance)
    return tuple(fits)


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
        ValueError: for an argument out of its range, or layers of other sizes.
        TypeError: for layers that are no fits of `rbm`.

    References:
        A fast learning algorithm for deep belief nets (Hinton, Osindero and Teh, 2006).
        On the quantitative analysis of deep belief networks (Salakhutdinov and Murray, 2008).

    Example:
        >>> import torch, ppl_gen as pg
        >>> from ppl_gen.inference import SVI, ContrastiveDivergence, WakeSleep
        >>> x = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).repeat(20, 1)
        >>> stack = rbm_stack(x, (4, 2), SVI(ContrastiveDivergence(), steps=50))
        >>> fit = pg.fit(dbn(layers=stack, sweeps=10), x, SVI(WakeSleep(), steps=20), seed=0)
        >>> fit.sample(3)["x"].shape, fit.evidence().kind
        (torch.Size([3, 3]), 'importance weighted, 100 particles; log Z by enumeration')
    """
    check_width("visible", visible)
    machines = None if layers is None else _machines(layers)
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


def _machines(layers: Sequence[Fit]) -> list[BoltzmannMachine]:
    from ppl_gen.fits.result import Fit

    given: Any = layers  # whatever was passed
    if not isinstance(given, Sequence) or isinstance(given, str) or not all(isinstance(f, Fit) for f in given):
        raise TypeError(f"layers: expected fits of rbm, as rbm_stack gives them, got {layers!r}")
    found = [fit.module("machine") if "machine" in fit.module_names else None for fit in given]
    for fit, machine in zip(given, found, strict=True):
        if not isinstance(machine, BoltzmannMachine):
            raise TypeError(f"layers: expected fits of rbm, got a fit of {fit.program.name!r}")
    return [machine for machine in found if isinstance(machine, BoltzmannMachine)]


def _filled(
    network: BeliefNetwork, recogniser: SigmoidLayers, machines: Sequence[BoltzmannMachine], widths: Sequence[int]
) -> None:
    """Weights of machines below the top go down in the network and up in the recogniser; the last is the top."""
    shapes = [tuple(machine.weight.shape) for machine in machines]
    if shapes != list(zip(widths[:-1], widths[1:], strict=True)):
        raise ValueError(f"layers: expected machines between layers of {widths} units, got weights of shapes {shapes}")
    network.top.load_state_dict(machines[-1].state_dict())
    downs = list(network.down.layers)[::-1]
    for machine, down, up in zip(machines[:-1], downs, recogniser.layers, strict=True):
        assert isinstance(down, nn.Linear) and isinstance(up, nn.Linear)
        with torch.no_grad():
            down.weight.copy_(machine.weight)
            down.bias.copy_(machine.visible_bias)
            up.weight.copy_(machine.weight.T)
            up.bias.copy_(machine.hidden_bias)
