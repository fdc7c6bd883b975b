r"""The Gaussian-Bernoulli restricted Boltzmann machine: numbers that are visible, hidden zeros and ones.

.. math:: E(v, h) = \sum_i \frac{(v_i - a_i)^2}{2 \sigma_i^2} - b^\top h - \sum_{ij} \frac{v_i}{\sigma_i^2} W_{ij} h_j
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.nn.functional import softplus

from ppl_gen.data.inputs import check_width, entries, row_width
from ppl_gen.errors import require_number, require_whole
from ppl_gen.models.energy.bipartite import ENUMERABLE, TERMS, all_states, flip, gained
from ppl_gen.models.energy.rbm import machine_program
from ppl_gen.program.extensions import Tempering
from ppl_gen.program.program import Program, Recipe

__all__ = ["GaussianMachine", "gaussian_rbm", "number_rows"]


class GaussianMachine(nn.Module):
    """Weights, biases and variances in standardised units, with everything that follows from them in closed form.

    Args:
        loc: what is subtracted from every row: means of the columns.
        spread: what rows are divided by: standard deviations of the columns.
        hidden: how many hidden units.
        scale: standard deviation of the starting weights.
    """

    loc: Tensor
    spread: Tensor

    def __init__(self, loc: Tensor, spread: Tensor, hidden: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(scale * torch.randn(len(loc), hidden))
        self.visible_bias = nn.Parameter(torch.zeros(len(loc)))
        self.hidden_bias = nn.Parameter(torch.zeros(hidden))
        self.log_scale = nn.Parameter(torch.zeros(len(loc)))
        self.register_buffer("loc", loc.to(self.weight.dtype))
        self.register_buffer("spread", spread.to(self.weight.dtype))
        self.row, self.support = loc.shape, constraints.independent(constraints.real, 1)

    def standardised(self, x: Tensor) -> Tensor:
        """Rows in the machine's units, ... x visible."""
        return (x.to(self.loc) - self.loc) / self.spread

    def free_energy(self, x: Tensor) -> Tensor:
        """The hidden units summed out, nats: ... x visible -> ..."""
        return -self.log_density_at(self.standardised(x), 1.0)

    def log_density_at(self, v: Tensor, b: Any) -> Tensor:
        """log f_b of standardised rows: at b = 0 a standard normal without its normaliser."""
        precision = torch.exp(-2 * self.log_scale)
        square = (1 - b) * v**2 + b * (v - self.visible_bias) ** 2 * precision
        return -0.5 * square.sum(-1) + softplus(b * (self.hidden_bias + (v * precision) @ self.weight)).sum(-1)

    def begin(self, shape: torch.Size) -> Tensor:
        """Independent draws from a normal with the means and standard deviations of the data."""
        return self.loc + self.spread * torch.randn((*shape, len(self.loc)), dtype=self.loc.dtype)

    def gibbs(self, x: Tensor, steps: int) -> Tensor:
        """``steps`` sweeps, hidden units given visible ones and back; leaves p(v) invariant."""
        return self.loc + self.spread * self.move(self.standardised(x), 1.0, steps)

    @torch.no_grad()
    def move(self, v: Tensor, b: Any, steps: int) -> Tensor:
        """Sweeps of standardised rows; leaves f_b invariant."""
        precision = torch.exp(-2 * self.log_scale)
        for _ in range(steps):
            hidden = flip((b * (self.hidden_bias + (v * precision) @ self.weight)).sigmoid())
            v = self._visible(hidden, b, precision)
        return v

    def _visible(self, hidden: Tensor, b: Any, precision: Tensor) -> Tensor:
        total = (1 - b) + b * precision
        mean = b * precision * (self.visible_bias + hidden @ self.weight.T) / total
        return mean + torch.randn_like(mean) / total.sqrt()

    @torch.no_grad()
    def between(self, v: Tensor, old: float, new: float) -> tuple[Tensor, Tensor]:
        """A step of annealing, by two matrix products: see `Tempering`."""
        precision = torch.exp(-2 * self.log_scale)
        there = self.hidden_bias + (v * precision) @ self.weight
        gain = gained(torch.zeros_like(self.hidden_bias), there, old, new)
        wide = v.double()
        square = (wide - self.visible_bias) ** 2 * precision - wide**2
        gain = gain - 0.5 * (new - old) * square.sum(-1)
        return self._visible(flip((new * there).sigmoid()), new, precision), gain

    def tempering(self) -> Tempering:
        """From a standard normal to p(v); states are standardised rows."""
        wide = self.spread.double()
        log_base = 0.5 * len(wide) * math.log(2 * math.pi) + len(self.hidden_bias) * math.log(2) + wide.log().sum()
        blank = self.loc

        def begin(count: int) -> Tensor:
            return torch.randn(count, len(blank), dtype=blank.dtype, device=blank.device)

        def elsewhere(count: int) -> Tensor:
            """Rows of hidden units whose chance is another in each chain: from all of them off to all of them on."""
            chance = torch.linspace(0, 1, count, dtype=blank.dtype, device=blank.device).unsqueeze(-1)
            hidden = flip(chance.expand(count, len(self.hidden_bias)))
            return self._visible(hidden, 1.0, torch.exp(-2 * self.log_scale))

        exact = self.log_partition if 2 ** len(self.hidden_bias) * len(blank) <= TERMS else None
        return Tempering(
            begin,
            log_base,
            self.log_density_at,
            self.move,
            self.between,
            self.standardised,
            elsewhere=elsewhere,
            exact=exact,
        )

    def log_partition(self) -> Tensor:
        r"""log Z in the user's units, a sum over the hidden states, each a normal of the rows; float64."""
        weight, a, b = self.weight.double(), self.visible_bias.double(), self.hidden_bias.double()
        precision = torch.exp(-2 * self.log_scale.double())
        blocks = []
        for h in all_states(len(b), weight):
            mean = a + h @ weight.T
            blocks.append(torch.logsumexp(h @ b + 0.5 * ((mean**2 - a**2) * precision).sum(-1), 0))
        units = 0.5 * len(a) * math.log(2 * math.pi) + self.log_scale.double().sum() + self.spread.double().log().sum()
        return torch.logsumexp(torch.stack(blocks), 0) + units

    def log_density(self, x: Tensor) -> Tensor:
        """log p(v) = -F(v) - log Z per row, exact; rows x visible -> rows."""
        return -self.free_energy(x).double() - self.log_partition()


def gaussian_rbm(visible: int | None = None, hidden: int = 16, *, scale: float = 0.01, sweeps: int = 1000) -> Recipe:
    r"""A restricted Boltzmann machine over rows of numbers (N x visible), with hidden zeros and ones.

    .. math:: p(x) = e^{-F(x)} / Z, \quad F(x) = \sum_i \frac{(x_i - a_i)^2}{2 \sigma_i^2}
              - \sum_j \log \Bigl(1 + e^{b_j + \sum_i x_i W_{ij} / \sigma_i^2}\Bigr)

    It is a mixture of 2^hidden normals with one diagonal covariance, whose means are sums of columns of W. Rows are
    standardised inside: every column shifted by its mean and divided by its standard deviation; densities are those of
    the user's units. Trained by ``SVI(objective=ContrastiveDivergence(...))``; the variances are learned. Up to 16
    hidden units log Z is enumerated and ``fit.evidence`` is exact; elsewhere ``fit.evidence(method=pg.AIS())``. The
    network is ``machine``; ``fit.sample`` runs one chain of ``sweeps`` for each row.

    Args:
        visible: columns of the data; None: as many as they have.
        hidden: hidden units.
        scale: standard deviation of the starting weights, in standardised units.
        sweeps: Gibbs sweeps behind each drawn row.

    Returns:
        A recipe; it raises ValueError for data of another shape, or with a constant column.

    Raises:
        ValueError: for an argument out of its range.

    References:
        Reducing the dimensionality of data with neural networks (Hinton and Salakhutdinov, 2006).
        Improved learning of Gaussian-Bernoulli restricted Boltzmann machines (Cho, Ilin and Raiko, 2011).

    Example:
        >>> import torch, ppl_gen as pg
        >>> from ppl_gen.inference import SVI, ContrastiveDivergence
        >>> x = torch.cat([torch.randn(50, 2) - 3, torch.randn(50, 2) + 3])
        >>> fit = pg.fit(gaussian_rbm(hidden=2), x, SVI(ContrastiveDivergence(), steps=20), seed=0)
        >>> fit.evidence().exact, fit.sample(3)["x"].shape
        (True, torch.Size([3, 2]))
    """
    check_width("visible", visible)
    for name, value in (("hidden", hidden), ("sweeps", sweeps)):
        require_whole(name, value)
    require_number("scale", scale)

    def build(data: Any) -> Program:
        rows = number_rows(data, row_width(visible, data, "gaussian_rbm"), "gaussian_rbm")
        machine = GaussianMachine(rows.mean(0), rows.std(0, correction=0), hidden, scale)
        return machine_program(machine, sweeps, exact=hidden <= ENUMERABLE, name="gaussian_rbm")

    return Recipe(build, name="gaussian_rbm", arguments={"visible": visible, "hidden": hidden})


def number_rows(data: Any, visible: int, program: str) -> Tensor:
    """The entry x, rows x ``visible`` numbers in float64; raises ValueError for other shapes and constant columns."""
    (rows,) = entries(data, program, "x")
    assert rows is not None
    if rows.dim() != 2 or rows.shape[1] != visible:
        raise ValueError(
            f"data: {program}(visible={visible}) takes rows of {visible} columns, got shape {tuple(rows.shape)}"
        )
    constant = (rows == rows[:1]).all(0)
    if bool(constant.any()):
        columns = ", ".join(map(str, constant.nonzero().squeeze(-1).tolist()))
        raise ValueError(f"data: column(s) {columns} are constant: no density exists in that direction; leave them out")
    return rows.double()
