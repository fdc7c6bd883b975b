r"""The binary restricted Boltzmann machine: an energy, a Gibbs sampler, and log Z where it can be enumerated.

.. math:: p(v, h) = e^{-E(v, h)} / Z, \quad E(v, h) = -a^\top v - b^\top h - v^\top W h, \quad v_i, h_j \in \{0, 1\}
"""

from __future__ import annotations

from typing import Any

import pyro
import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.nn.functional import softplus

from ppl_gen.data.inputs import check_width, entries, row_width
from ppl_gen.errors import require_number, require_whole
from ppl_gen.models.energy.bipartite import ENUMERABLE, Bipartite, flip
from ppl_gen.nn.chain_rows import ChainRows
from ppl_gen.nn.likelihoods import as_handed_out, log_odds, zeros_and_ones
from ppl_gen.program.extensions import Energy, Tempering
from ppl_gen.program.program import Program, Recipe

__all__ = ["BoltzmannMachine", "binary_rows", "machine_program", "rbm"]


class BoltzmannMachine(nn.Module):
    """Weights (visible x hidden) and two biases, with everything that follows from them in closed form.

    Args:
        visible_bias: a, the starting biases of the visible units; chains and annealing begin at coins of these odds.
        hidden: how many hidden units.
        scale: standard deviation of the starting weights.
        copies: how often the visible and the hidden units are there, all copies with the same weights and biases;
            rows, too, then hold all copies.
    """

    base: Tensor
    support = constraints.independent(constraints.boolean, 1)

    def __init__(self, visible_bias: Tensor, hidden: int, scale: float, copies: tuple[int, int] = (1, 1)) -> None:
        super().__init__()
        self.weight = nn.Parameter(scale * torch.randn(len(visible_bias), hidden))
        self.visible_bias = nn.Parameter(visible_bias.to(self.weight.dtype))
        self.hidden_bias = nn.Parameter(torch.zeros(hidden))
        self.register_buffer("base", self.visible_bias.detach().repeat(copies[0]))
        self.copies, self.row = copies, self.base.shape

    def whole(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weights and biases of all copies."""
        below, above = self.copies
        if self.copies == (1, 1):
            return self.weight, self.visible_bias, self.hidden_bias
        return self.weight.repeat(below, above), self.visible_bias.repeat(below), self.hidden_bias.repeat(above)

    def pair(self) -> Bipartite:
        """Visible units outside, hidden ones summed out, at the present parameters."""
        weight, visible_bias, hidden_bias = self.whole()
        return Bipartite(weight, visible_bias, hidden_bias, self.base, torch.zeros_like(hidden_bias))

    def free_energy(self, x: Tensor) -> Tensor:
        r"""F(v) = -a'v - sum_j log(1 + exp(b_j + (v'W)_j)), the hidden units summed out: ... x visible -> ..."""
        weight, visible_bias, hidden_bias = self.whole()
        return -(x @ visible_bias) - softplus(x @ weight + hidden_bias).sum(-1)

    def begin(self, shape: torch.Size) -> Tensor:
        """Independent draws from the visible biases: ``shape`` x visible."""
        return flip(self.whole()[1].sigmoid().expand(*shape, *self.row))

    @torch.no_grad()
    def gibbs(self, x: Tensor, steps: int) -> Tensor:
        """``steps`` sweeps, hidden units given visible ones and back; leaves p(v) invariant."""
        weight, visible_bias, hidden_bias = self.whole()
        for _ in range(steps):
            hidden = flip((x @ weight + hidden_bias).sigmoid())
            x = flip((hidden @ weight.T + visible_bias).sigmoid())
        return x

    def tempering(self) -> Tempering:
        """From coins of the starting biases to p(v)."""
        return self.pair().tempering()

    def log_partition(self) -> Tensor:
        r"""log Z, by summing over every state of the smaller side, the other side summed out by hand; float64."""
        return self.pair().log_partition()

    def log_density(self, x: Tensor) -> Tensor:
        """log p(v) = -F(v) - log Z per row, exact; rows x visible -> rows."""
        return -self.free_energy(zeros_and_ones(x, "rbm").to(self.weight)).double() - self.log_partition()


def rbm(visible: int | None = None, hidden: int = 16, *, scale: float = 0.01, sweeps: int = 1000) -> Recipe:
    r"""A restricted Boltzmann machine over rows of zeros and ones (N x visible).

    .. math:: p(x) = e^{-F(x)} / Z, \quad F(x) = -a^\top x - \sum_j \log(1 + e^{b_j + (x^\top W)_j})

    It has an energy and no density, so it is trained by ``SVI(objective=ContrastiveDivergence(...))``. Where the
    smaller side has at most 16 units, log Z is enumerated and ``fit.evidence`` is exact; elsewhere
    ``fit.evidence(method=pg.AIS())`` estimates it. The network is ``machine``; its visible biases start at the log
    odds of the data, where the machine is a product of independent coins.

    ``fit.sample`` runs one chain of ``sweeps`` for each row: its rows are as good as that chain has mixed.

    Args:
        visible: columns of the data; None: as many as they have.
        hidden: hidden units.
        scale: standard deviation of the starting weights.
        sweeps: Gibbs sweeps behind each drawn row.

    Returns:
        A recipe; it raises ValueError for data that are not N x visible zeros and ones.

    Raises:
        ValueError: for an argument out of its range.

    References:
        Training products of experts by minimizing contrastive divergence (Hinton, 2002).
        A practical guide to training restricted Boltzmann machines (Hinton, 2010).

    Example:
        >>> import torch, ppl_gen as pg
        >>> from ppl_gen.inference import SVI, ContrastiveDivergence
        >>> x = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).repeat(20, 1)
        >>> fit = pg.fit(rbm(hidden=2), x, SVI(ContrastiveDivergence(), steps=600, lr=0.03), seed=0)
        >>> fit.evidence().exact, fit.evidence().mean > 3 * torch.tensor(0.5).log()
        (True, tensor(True))
    """
    check_width("visible", visible)
    for name, value in (("hidden", hidden), ("sweeps", sweeps)):
        require_whole(name, value)
    require_number("scale", scale)

    def build(data: Any) -> Program:
        rows = binary_rows(data, row_width(visible, data, "rbm"), "rbm")
        machine = BoltzmannMachine(log_odds(rows), hidden, scale)
        return machine_program(machine, sweeps, exact=min(rows.shape[1], hidden) <= ENUMERABLE, name="rbm")

    return Recipe(build, name="rbm", arguments={"visible": visible, "hidden": hidden})


def machine_program(machine: Any, sweeps: int, *, exact: bool, name: str) -> Program:
    """Rows of a machine with one layer of hidden units, which are summed out; ``exact``: log Z can be enumerated."""

    def model(x: Tensor) -> None:
        pyro.module("machine", machine)
        with pyro.plate("data", len(x)):
            pyro.sample("x", ChainRows(machine, sweeps), obs=x.to(machine.weight))

    partition = machine.log_partition if exact else None
    return Program(
        model,
        name=name,
        energy=Energy(machine.free_energy, machine.gibbs, partition, tempering=machine.tempering),
        evidence=machine.log_density if exact else None,
    )


def binary_rows(data: Any, visible: int, program: str) -> Tensor:
    """The entry x, rows x ``visible`` zeros and ones, float64; raises ValueError for anything else.

    Of rows that are drawn for every batch, the chances of their ones.
    """
    (rows,) = entries(data, program, "x")
    assert rows is not None
    if rows.dim() != 2 or rows.shape[1] != visible:
        raise ValueError(
            f"data: {program}(visible={visible}) takes rows of {visible} columns, got shape {tuple(rows.shape)}"
        )
    zeros_and_ones(as_handed_out(data, rows), program)
    return rows.double()
