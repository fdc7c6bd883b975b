r"""The binary restricted Boltzmann machine: an energy, a Gibbs sampler, and log Z where it can be enumerated.

.. math:: p(v, h) = e^{-E(v, h)} / Z, \quad E(v, h) = -a^\top v - b^\top h - v^\top W h, \quad v_i, h_j \in \{0, 1\}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.nn.functional import softplus

from ppl_gen.data.inputs import check_width, entries, row_width
from ppl_gen.errors import IncompatibleError, is_number, require_whole
from ppl_gen.program.extensions import Energy
from ppl_gen.program.program import Program, Recipe

__all__ = ["BoltzmannMachine", "GibbsRows", "rbm"]

ENUMERABLE = 16  # units of the smaller side: 65536 states, the most that log Z sums over
_BLOCK = 4096  # states at a time, so that the sum needs little memory


class BoltzmannMachine(nn.Module):
    """Weights (visible x hidden) and two biases, with everything that follows from them in closed form.

    Args:
        visible_bias: a, the starting biases of the visible units.
        hidden: how many hidden units.
        scale: standard deviation of the starting weights.
    """

    def __init__(self, visible_bias: Tensor, hidden: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(scale * torch.randn(len(visible_bias), hidden))
        self.visible_bias = nn.Parameter(visible_bias.to(self.weight.dtype))
        self.hidden_bias = nn.Parameter(torch.zeros(hidden))

    def free_energy(self, x: Tensor) -> Tensor:
        r"""F(v) = -a'v - sum_j log(1 + exp(b_j + (v'W)_j)), the hidden units summed out: ... x visible -> ..."""
        return -(x @ self.visible_bias) - softplus(x @ self.weight + self.hidden_bias).sum(-1)

    @torch.no_grad()
    def gibbs(self, x: Tensor, steps: int) -> Tensor:
        """``steps`` sweeps, hidden units given visible ones and back; leaves p(v) invariant."""
        for _ in range(steps):
            hidden = _flip((x @ self.weight + self.hidden_bias).sigmoid())
            x = _flip((hidden @ self.weight.T + self.visible_bias).sigmoid())
        return x

    def log_partition(self) -> Tensor:
        r"""log Z, by summing over every state of the smaller side, the other side summed out by hand; float64."""
        weight, inside, outside = self.weight.double(), self.hidden_bias.double(), self.visible_bias.double()
        if weight.shape[0] < weight.shape[1]:
            weight, inside, outside = weight.T, outside, inside
        places = torch.arange(len(inside), device=weight.device)
        blocks = []
        for codes in torch.arange(2 ** len(inside), device=weight.device).split(_BLOCK):
            states = ((codes[:, None] >> places) & 1).to(weight)
            blocks.append(torch.logsumexp(states @ inside + softplus(states @ weight.T + outside).sum(-1), 0))
        return torch.logsumexp(torch.stack(blocks), 0)

    def log_density(self, x: Tensor) -> Tensor:
        """log p(v) = -F(v) - log Z per row, exact; rows x visible -> rows."""
        return -self.free_energy(_binary(x).to(self.weight)).double() - self.log_partition()


def _flip(probability: Tensor) -> Tensor:
    return (torch.rand_like(probability) < probability).to(probability.dtype)


class GibbsRows(dist.TorchDistribution):
    """Rows of a Boltzmann machine: drawn by a Markov chain, without a normalised log density.

    Args:
        machine: the machine at its present parameters.
        sweeps: length of each chain; it starts at independent draws from the visible biases.

    Raises:
        IncompatibleError: by ``log_prob``, whose normaliser is a sum over all states.
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.independent(constraints.boolean, 1)
    has_rsample = False

    def __init__(self, machine: BoltzmannMachine, sweeps: int, batch_shape: Sequence[int] = ()) -> None:
        self.machine, self.sweeps = machine, sweeps
        super().__init__(torch.Size(batch_shape), machine.visible_bias.shape, validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> GibbsRows:
        return GibbsRows(self.machine, self.sweeps, batch_shape)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        bias = self.machine.visible_bias
        start = _flip(bias.sigmoid().expand(*sample_shape, *self.batch_shape, len(bias)))
        return self.machine.gibbs(start, self.sweeps)

    def log_prob(self, value: Tensor) -> Tensor:
        raise IncompatibleError(
            "a Boltzmann machine has no log density that can be trained on: log Z sums over all states. Train it by "
            "SVI(objective=ContrastiveDivergence()); fit.evidence gives log p(x) where log Z can be enumerated"
        )


def rbm(visible: int | None = None, hidden: int = 16, *, scale: float = 0.01, sweeps: int = 1000) -> Recipe:
    r"""A restricted Boltzmann machine over rows of zeros and ones (N x visible).

    .. math:: p(x) = e^{-F(x)} / Z, \quad F(x) = -a^\top x - \sum_j \log(1 + e^{b_j + (x^\top W)_j})

    It has an energy and no density, so it is trained by ``SVI(objective=ContrastiveDivergence(...))``. Where the
    smaller side has at most 16 units, log Z is enumerated and ``fit.evidence`` is exact. The network is ``machine``;
    its visible biases start at the log odds of the data, where the machine is a product of independent coins.

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
    if not is_number(scale) or not 0 <= scale < float("inf"):
        raise ValueError(f"scale: expected a finite number of at least 0, got {scale!r}")

    def build(data: Any) -> Program:
        rows = _rows(data, row_width(visible, data, "rbm"))
        # One row of fair coins more than there are: a column that never varies keeps finite log odds.
        odds = ((rows.sum(0) + 0.5) / (len(rows) + 1)).logit()
        machine = BoltzmannMachine(odds, hidden, scale)
        exact = min(rows.shape[1], hidden) <= ENUMERABLE

        def rbm(x: Tensor) -> None:
            pyro.module("machine", machine)
            with pyro.plate("data", len(x)):
                pyro.sample("x", GibbsRows(machine, sweeps), obs=x.to(machine.weight))

        return Program(
            rbm,
            energy=Energy(machine.free_energy, machine.gibbs, machine.log_partition if exact else None),
            evidence=machine.log_density if exact else None,
        )

    return Recipe(build, name="rbm", arguments={"visible": visible, "hidden": hidden})


def _rows(data: Any, visible: int) -> Tensor:
    (rows,) = entries(data, "rbm", "x")
    assert rows is not None
    if rows.dim() != 2 or rows.shape[1] != visible:
        raise ValueError(f"data: rbm(visible={visible}) takes rows of {visible} columns, got shape {tuple(rows.shape)}")
    return _binary(rows).double()


def _binary(rows: Tensor) -> Tensor:
    other = (rows != 0) & (rows != 1)
    if bool(other.any()):
        first = tuple(int(i) for i in other.nonzero()[0])
        raise ValueError(
            f"data: an rbm takes zeros and ones, got {float(rows[first]):g} at index {first}; threshold the data, or "
            "draw them as coins (torch.bernoulli)"
        )
    return rows
