r"""The deep Boltzmann machine: layers of zeros and ones, each connected with the next, none inside itself.

.. math:: E(v, h_1, \dots, h_L) = -a^\top v - \sum_l b_l^\top h_l - v^\top W_0 h_1
          - \sum_{l=1}^{L-1} h_l^\top W_l h_{l+1}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.nn.functional import softplus

from ppl_gen.data.inputs import check_width, row_width
from ppl_gen.errors import require_number, require_whole
from ppl_gen.models.energy.bipartite import ENUMERABLE, Bipartite, all_states, flip
from ppl_gen.models.energy.helmholtz import checked_layers
from ppl_gen.models.energy.rbm import BoltzmannMachine, binary_rows
from ppl_gen.models.energy.stack import check_widths, machines_of
from ppl_gen.nn.chain_rows import ChainRows
from ppl_gen.nn.likelihoods import log_odds, zeros_and_ones
from ppl_gen.program.extensions import Energy, Tempering
from ppl_gen.program.program import Program, Recipe

if TYPE_CHECKING:
    from ppl_gen.fits.result import Fit

__all__ = ["DeepMachine", "dbm"]

SUMMED = 12  # units of odd layers: as many states as are summed over for every row


class DeepMachine(nn.Module):
    """Weights and biases of all layers, the mean field given rows, and chains over the layers of odd number.

    Args:
        odds: a, the starting biases of the visible units; chains and annealing begin at coins of these odds.
        hidden: units of the hidden layers, from the lowest to the top.
        scale: standard deviation of the starting weights.
        updates: sweeps of the mean field.
    """

    base: Tensor
    support = constraints.independent(constraints.boolean, 1)

    def __init__(self, odds: Tensor, hidden: Sequence[int], scale: float, updates: int) -> None:
        super().__init__()
        sizes = [len(odds), *hidden]
        pairs = zip(sizes[:-1], sizes[1:], strict=True)
        self.weights = nn.ParameterList([scale * torch.randn(low, high) for low, high in pairs])
        self.biases = nn.ParameterList([odds.to(self.weights[0].dtype), *(torch.zeros(size) for size in hidden)])
        self.register_buffer("base", self.biases[0].detach().clone())
        self.sizes, self.row, self.updates = sizes, odds.shape, updates

    @torch.no_grad()
    def fill(self, machines: Sequence[BoltzmannMachine]) -> None:
        """Begin at the machines of a stack: each layer's units then hear both neighbours, as each machine had it.

        Two machines know the biases of a layer between them; their mean is what half of each makes.
        """
        check_widths(machines, self.sizes)
        for layer, machine in enumerate(machines):
            self.weights[layer].copy_(machine.weight * (1.0 if 2 in machine.copies else 0.5))
        below, above = ([getattr(one, side) for one in machines] for side in ("visible_bias", "hidden_bias"))
        inner = [(low + high) / 2 for low, high in zip(above[:-1], below[1:], strict=True)]
        for bias, value in zip(self.biases, [below[0], *inner, above[-1]], strict=True):
            bias.copy_(value)

    def pair(self) -> Bipartite:
        """Layers of odd number outside, the visible one and the others of even number summed out."""
        odd, even = range(1, len(self.sizes), 2), range(0, len(self.sizes), 2)
        blocks = [torch.cat([self._block(i, j) for j in even], 1) for i in odd]
        outer, inner = (torch.cat([self.biases[layer] for layer in side]) for side in (odd, even))
        base = torch.cat([self.base, inner.new_zeros(len(inner) - len(self.base))])
        return Bipartite(torch.cat(blocks), outer, inner, torch.zeros_like(outer), base)

    def _block(self, i: int, j: int) -> Tensor:
        if abs(i - j) != 1:
            return self.base.new_zeros(self.sizes[i], self.sizes[j])
        return self.weights[i] if j > i else self.weights[j].T

    @torch.no_grad()
    def mean_field(self, x: Tensor) -> list[Tensor]:
        """Log odds of every hidden unit on its own, each layer given the means of its neighbours: ... x units."""
        top = len(self.sizes) - 1
        logits, below = [], x
        for layer in range(1, top + 1):  # bottom up, each layer but the top in place of the missing one above, too
            times = 1.0 if layer == top else 2.0
            logits.append(times * (below @ self.weights[layer - 1]) + self.biases[layer])
            below = logits[-1].sigmoid()
        for _ in range(self.updates):
            for layer in (*range(1, top + 1, 2), *range(2, top + 1, 2)):
                logits[layer - 1] = self._given_neighbours(layer, [x, *(one.sigmoid() for one in logits)])
        return logits

    def _given_neighbours(self, layer: int, units: Sequence[Tensor]) -> Tensor:
        found = units[layer - 1] @ self.weights[layer - 1] + self.biases[layer]
        return found if layer + 1 == len(self.sizes) else found + units[layer + 1] @ self.weights[layer].T

    def free_energy(self, x: Tensor) -> Tensor:
        """E_q E(v, h) - H(q) at the mean field, above the free energy by KL(q || p(h | v)): ... x visible -> ..."""
        logits = self.mean_field(x)
        units = [x, *(one.sigmoid() for one in logits)]
        total = -(x @ self.biases[0])
        for layer, logit in enumerate(logits, 1):
            mean = units[layer]
            total = total - ((units[layer - 1] @ self.weights[layer - 1] + self.biases[layer]) * mean).sum(-1)
            total = total - (softplus(logit) - logit * mean).sum(-1)
        return total

    def exact_free_energy(self, x: Tensor) -> Tensor:
        """F(v), a sum over all states of the layers of odd number for every row: rows x visible -> rows."""
        pair, visible = self.pair(), self.sizes[0]
        lift = torch.zeros(len(x), len(pair.outer), dtype=x.dtype, device=x.device)
        lift[:, : self.sizes[1]] = x @ self.weights[0]
        blocks = []
        for states in all_states(len(pair.outer), pair.weight):
            alone = states @ pair.outer + softplus(states @ pair.weight[:, visible:] + pair.inner[visible:]).sum(-1)
            blocks.append(torch.logsumexp(lift @ states.T + alone, -1))
        return -torch.logsumexp(torch.stack(blocks), 0) - x @ self.biases[0]

    def begin(self, shape: torch.Size) -> Tensor:
        """Independent draws from the visible biases: ``shape`` x visible."""
        return flip(self.biases[0].sigmoid().expand(*shape, *self.row))

    def odd_units(self, x: Tensor) -> Tensor:
        """A draw of the layers of odd number from the mean field: ... x units."""
        return torch.cat([flip(logits.sigmoid()) for logits in self.mean_field(x)[::2]], -1)

    @torch.no_grad()
    def gibbs(self, x: Tensor, steps: int) -> Tensor:
        """Rows after ``steps`` sweeps over all layers, the hidden ones begun at the mean field."""
        pair = self.pair()
        odd = self.odd_units(x)
        for step in range(steps):
            even = flip((odd @ pair.weight + pair.inner).sigmoid())
            if step + 1 < steps:
                odd = flip((even @ pair.weight.T + pair.outer).sigmoid())
        return even[..., : self.sizes[0]] if steps else x

    def tempering(self) -> Tempering:
        """From coins to the machine, over the units of the layers of odd number."""
        return self.pair().tempering(self.odd_units)

    def log_partition(self) -> Tensor:
        """log Z, by summing over every state of the odd layers or of the even ones, whichever are fewer; float64."""
        return self.pair().log_partition()

    def log_density(self, x: Tensor) -> Tensor:
        """log p(v) per row, exact; rows x visible -> rows."""
        return -self.exact_free_energy(zeros_and_ones(x, "dbm").to(self.base)).double() - self.log_partition()


def dbm(
    visible: int | None = None,
    hidden: Sequence[int] | None = None,
    *,
    layers: Sequence[Fit] | None = None,
    scale: float = 0.01,
    updates: int = 10,
    sweeps: int = 1000,
) -> Recipe:
    r"""A deep Boltzmann machine over rows of zeros and ones (N x visible).

    .. math:: \log p(x) \ge \mathbb{E}_{q(h | x)} [-E(x, h)] + H(q) - \log Z, \quad q(h | x) = \prod_j q_j(h_j)

    ``SVI(objective=ContrastiveDivergence(persistent=True))`` learns it: the data pay their variational free energy, at
    the mean field of the hidden units; the model pays that of persistent chains over the layers of odd number, all
    others summed out. ``fit.evidence(method=pg.AIS())`` gives the lower bound above with log Z by annealing. With at
    most 12 units in odd layers ``fit.evidence()`` is exact, by enumeration.

    Layers that were learned one by one are a better start than random weights: ``layers=rbm_stack(x, hidden,
    undirected=True)``. The network is ``machine``; ``fit.sample`` runs one chain of ``sweeps`` for each row.

    Args:
        visible: columns of the data; None: as many as they have.
        hidden: units of the layers, from the lowest to the top, at least two; None: those of ``layers``, or (64, 32).
        layers: fits of `rbm_stack` with ``undirected=True``, one for each hidden layer; None: random weights.
        scale: standard deviation of random weights.
        updates: sweeps of the mean field over the layers.
        sweeps: Gibbs sweeps behind each drawn row.

    Returns:
        A recipe; it raises ValueError for data that are not N x visible zeros and ones.

    Raises:
        ValueError: for an argument out of its range, or layers of other sizes or of a `dbn`.
        TypeError: for layers that are no fits of `rbm`.

    References:
        Deep Boltzmann machines (Salakhutdinov and Hinton, 2009).

    Example:
        >>> import torch, ppl_gen as pg
        >>> from ppl_gen.inference import SVI, ContrastiveDivergence
        >>> x = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).repeat(20, 1)
        >>> persistent = ContrastiveDivergence(persistent=True)
        >>> fit = pg.fit(dbm(hidden=(3, 2)), x, SVI(persistent, steps=20), seed=0)
        >>> bound = fit.evidence(method=pg.AIS(temperatures=100, chains=50))
        >>> bound.kind.split(";")[:2], fit.evidence().exact
        (['ais', ' variational lower bound'], True)
    """
    check_width("visible", visible)
    machines = None if layers is None else machines_of(layers, undirected=True)
    if hidden is None:
        hidden = (64, 32) if machines is None else [machine.weight.shape[1] for machine in machines]
    sizes = checked_layers(hidden, 2)
    require_number("scale", scale)
    for name, value in (("updates", updates), ("sweeps", sweeps)):
        require_whole(name, value)

    def build(data: Any) -> Program:
        rows = binary_rows(data, row_width(visible, data, "dbm"), "dbm")
        machine = DeepMachine(log_odds(rows), sizes, scale, updates)
        if machines is not None:
            machine.fill(machines)
        odd, even = sum(machine.sizes[1::2]), sum(machine.sizes[::2])

        def dbm(x: Tensor) -> None:
            pyro.module("machine", machine)
            with pyro.plate("data", len(x)):
                pyro.sample("x", ChainRows(machine, sweeps), obs=x.to(machine.base))

        partition = machine.log_partition if min(odd, even) <= ENUMERABLE else None
        return Program(
            dbm,
            energy=Energy(machine.free_energy, machine.gibbs, partition, tempering=machine.tempering, bound=True),
            evidence=machine.log_density if odd <= SUMMED else None,
        )

    return Recipe(build, name="dbm", arguments={"visible": visible, "hidden": sizes})
