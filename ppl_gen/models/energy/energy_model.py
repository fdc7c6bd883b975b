r"""An energy that is a network of the user's: rows are moved by Langevin steps along its gradient.

.. math:: p(x) = e^{-F(x)} / Z, \quad F(x) = U(v) + \frac{|v|^2}{2 \tau^2}, \quad v = (x - m) / s
"""

from __future__ import annotations

import math
from typing import Any

import pyro
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from ppl_gen.data.inputs import entries, row_shape
from ppl_gen.errors import require_positive, require_whole
from ppl_gen.nn.chain_rows import ChainRows
from ppl_gen.nn.copies import own_copy
from ppl_gen.program.extensions import Energy, Tempering
from ppl_gen.program.program import Program, Recipe
from ppl_gen.workspace.isolation import without_side_effects

__all__ = ["LangevinMachine", "energy_model"]

_FEW, _ROUNDING = 4, 1e-4  # rows that the network is asked about, and what another batch may change of its numbers
_RAYS, _FAR = 200, (1e3, 1e6)  # directions, and how far out along them, in standardised units


class LangevinMachine(nn.Module):
    """A network with a normal around it, and chains of Metropolis-adjusted Langevin steps in standardised units.

    Args:
        network: from standardised rows to one number each.
        loc: what is subtracted from every row.
        spread: what rows are divided by.
        tail: standard deviation of the normal, in standardised units; None: none, the network alone.
        step: length of a Langevin step.
    """

    loc: Tensor
    spread: Tensor

    def __init__(self, network: nn.Module, loc: Tensor, spread: Tensor, tail: float | None, step: float) -> None:
        super().__init__()
        self.network, self.tail, self.step = network, tail, step
        self.register_buffer("loc", loc.to(torch.get_default_dtype()))
        self.register_buffer("spread", spread.to(torch.get_default_dtype()))
        self.row, self.support = loc.shape, constraints.independent(constraints.real, loc.dim())

    def standardised(self, x: Tensor) -> Tensor:
        """Rows in the network's units."""
        return (x.to(self.loc) - self.loc) / self.spread

    def free_energy(self, x: Tensor) -> Tensor:
        """F(x), nats: ... x shape of a row -> ..."""
        return self.energy(self.standardised(x))

    def energy(self, v: Tensor) -> Tensor:
        """F of standardised rows."""
        lead = v.shape[: v.dim() - len(self.row)]
        found = self.network(v.reshape(-1, *self.row)).reshape(lead)
        return found if self.tail is None else found + 0.5 * self._square(v) / self.tail**2

    def _square(self, v: Tensor) -> Tensor:
        return v.square().flatten(v.dim() - len(self.row)).sum(-1)

    def log_density_at(self, v: Tensor, b: Any) -> Tensor:
        """log f_b of standardised rows, a normal at b = 0."""
        b = b.squeeze(-1) if isinstance(b, Tensor) and b.dim() else b
        return -(1 - b) * 0.5 * self._square(v) / self._width**2 - b * self.energy(v)

    @property
    def _width(self) -> float:
        return 1.0 if self.tail is None else self.tail

    def begin(self, shape: torch.Size) -> Tensor:
        """Independent draws from the normal of b = 0."""
        return self.loc + self.spread * self._width * torch.randn((*shape, *self.row), dtype=self.loc.dtype)

    def gibbs(self, x: Tensor, steps: int) -> Tensor:
        """The rows after ``steps`` Langevin steps, each accepted or refused; leaves p(x) invariant."""
        lead = x.shape[: x.dim() - len(self.row)]
        flat = self.standardised(x).reshape(-1, *self.row)
        return self.loc + self.spread * self.move(flat, 1.0, steps).reshape(*lead, *self.row)

    @torch.no_grad()
    def move(self, v: Tensor, b: Any, steps: int) -> Tensor:
        """Langevin steps of standardised rows with the correction of Metropolis; leaves f_b invariant."""
        density, slope = self._slope(v, b)
        for _ in range(steps):
            there = v + self._drift(slope) + self.step * torch.randn_like(v)
            density_there, slope_there = self._slope(there, b)
            out, back = self._proposal(there, v, slope), self._proposal(v, there, slope_there)
            taken = torch.rand_like(density).log() < density_there - density + back - out
            wide = taken.reshape(taken.shape + (1,) * len(self.row))
            v, slope = torch.where(wide, there, v), torch.where(wide, slope_there, slope)
            density = torch.where(taken, density_there, density)
        return v

    def _proposal(self, to: Tensor, at: Tensor, slope: Tensor) -> Tensor:
        """log of the density with which a step from ``at`` goes ``to``, but for a constant."""
        return -self._square(to - at - self._drift(slope)) / (2 * self.step**2)

    def _drift(self, slope: Tensor) -> Tensor:
        """Along the slope, and not further than the noise goes: in steep places every longer step would be refused."""
        drift, most = 0.5 * self.step**2 * slope, self.step * self.loc.numel() ** 0.5
        length = self._square(drift).sqrt().reshape(drift.shape[: drift.dim() - len(self.row)] + (1,) * len(self.row))
        return drift * (most / length.clamp_min(most))

    def _slope(self, v: Tensor, b: Any) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = v.detach().requires_grad_()
            density = self.log_density_at(leaf, b)
            (slope,) = torch.autograd.grad(density.sum(), leaf)
        return density.detach(), slope

    @torch.no_grad()
    def improper(self) -> bool:
        """Whether exp(-F) has no finite integral, since F grows no faster than the logarithm of volume somewhere.

        Looked at far away along rays: further than this, a network that grows at all has grown enough.
        """
        if self.tail is not None:
            return False
        away = torch.randn((_RAYS, *self.row), dtype=self.loc.dtype, device=self.loc.device)
        grown = self.energy(_FAR[1] * away) - self.energy(_FAR[0] * away)
        return bool((grown <= self.loc.numel() * math.log(_FAR[1] / _FAR[0])).any())

    def tempering(self) -> Tempering:
        """From a normal to p(x); states are standardised rows."""
        numbers, wide = self.loc.numel(), self.spread.double()
        log_base = numbers * math.log(self._width * math.sqrt(2 * math.pi)) + wide.log().sum()
        like, width = self.loc, self._width

        def begin(count: int) -> Tensor:
            return width * torch.randn(count, *self.row, dtype=like.dtype, device=like.device)

        def elsewhere(count: int) -> Tensor:
            """Normals of widths up to three times that of the first density."""
            far = torch.linspace(0, 3, count, dtype=like.dtype, device=like.device)
            return far.reshape(-1, *[1] * len(self.row)) * begin(count)

        return Tempering(
            begin,
            log_base,
            self.log_density_at,
            self.move,
            None,
            self.standardised,
            self.improper,
            elsewhere=elsewhere,
        )


def energy_model(network: nn.Module, *, tail: float | None = 2.0, step: float = 0.1, sweeps: int = 1000) -> Recipe:
    r"""Rows of numbers with an energy of your own: any network from rows to one number each.

    .. math:: p(x) = e^{-F(x)} / Z, \quad F(x) = U(v) + \frac{|v|^2}{2 \tau^2}, \quad v = (x - m) / s

    Rows are standardised inside, every column by its mean m and standard deviation s; the network U sees v. Chains are
    Langevin steps :math:`v' = v - \epsilon^2 / 2 \, \nabla F(v) + \epsilon \xi`, the drift no longer than the noise,
    with the correction of Metropolis, so that they leave p invariant at any step. ``SVI(objective=
    ContrastiveDivergence(steps=k, persistent=True, restart=0.05))`` learns the network with chains that live on from
    update to update, some of them begun anew.
    ``fit.evidence(method=pg.AIS())`` estimates log p(x), from a normal on; the network is ``machine.network``.

    Args:
        network: from rows, N x shape of a row, to N numbers or N x 1, each a function of its row alone: without batch
            norm and dropout. The fit trains a private copy.
        tail: standard deviation of a normal that the energy contains, in standardised units, so that Z is finite
            whatever a bounded network says; None: the network alone, which then has to grow by itself: where it does
            not, Z is infinite, and ``fit.evidence`` refuses.
        step: length of a Langevin step, in standardised units.
        sweeps: Langevin steps behind each drawn row.

    Returns:
        A recipe; it raises ValueError for data with a constant column, or a network that gives other numbers, draws
        some, or mixes rows.

    Raises:
        ValueError: for an argument out of its range.
        TypeError: for what is no network.

    References:
        A tutorial on energy-based learning (LeCun et al., 2006).
        Implicit generation and modeling with energy-based models (Du and Mordatch, 2019).
        Exponential convergence of Langevin distributions and their discrete approximations (Roberts and Tweedie, 1996).

    Example:
        >>> import torch, ppl_gen as pg
        >>> from torch import nn
        >>> from ppl_gen.inference import SVI, ContrastiveDivergence
        >>> network = nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 1))
        >>> chains = ContrastiveDivergence(steps=5, persistent=True, restart=0.05)
        >>> fit = pg.fit(energy_model(network, sweeps=20), torch.randn(50, 2), SVI(chains, steps=10), seed=0)
        >>> fit.sample(3)["x"].shape, fit.evidence(method=pg.AIS(temperatures=100, chains=50)).exact
        (torch.Size([3, 2]), False)
    """
    given: Any = network  # whatever was passed
    if not isinstance(given, nn.Module):
        hint = f"{given.__name__}(...) (an instance)" if isinstance(given, type) else "a torch network"
        raise TypeError(f"network: expected {hint}, got {given!r}")
    if tail is not None:
        require_positive("tail", tail)
    require_positive("step", step)
    require_whole("sweeps", sweeps)

    def build(data: Any) -> Program:
        rows = _rows(data)
        own = own_copy("network", network).to(torch.get_default_dtype())
        machine = LangevinMachine(own, rows.mean(0), rows.std(0, correction=0), tail, step)
        _check_network(machine, rows[:_FEW])

        def energy_model(x: Tensor) -> None:
            pyro.module("machine", machine)
            with pyro.plate("data", len(x)):
                pyro.sample("x", ChainRows(machine, sweeps), obs=x.to(machine.loc))

        return Program(energy_model, energy=Energy(machine.free_energy, machine.gibbs, tempering=machine.tempering))

    return Recipe(build, name="energy_model", arguments={"network": network, "tail": tail, "step": step})


def _check_network(machine: LangevinMachine, rows: Tensor) -> None:
    """Raise ValueError unless the network reads the rows and gives one number for each."""
    training = machine.training
    v = machine.standardised(rows)
    try:
        with torch.no_grad():
            shape = tuple(machine.eval().network(v).shape)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"data: the network cannot read rows of shape {tuple(machine.row)}: {error}") from error
    finally:
        machine.train(training)
    if shape not in ((len(rows),), (len(rows), 1)):
        raise ValueError(f"network: expected one number for each of {len(rows)} rows, got shape {shape}")
    with without_side_effects():  # as it is in training, where its chains move
        machine.train()
        try:
            first, again = (machine.network(v).flatten() for _ in range(2))
            beside = first if len(v) < 2 else machine.network(torch.cat([v[:1], v[1:] + 1.0])).flatten()
        finally:
            machine.train(training)
    least = _ROUNDING * (1 + float(first.abs().max()))
    for found, count, why in (
        (again, len(v), "it draws random numbers in training (dropout), which no correction of Metropolis survives"),
        (beside, 1, "it ties the rows of a batch together (batch norm, a mean over rows); take LayerNorm"),
    ):
        if float((found - first)[:count].abs().max()) > least:
            raise ValueError(f"network: expected one whose number is a function of each row alone, and {why}")


def _rows(data: Any) -> Tensor:
    (rows,) = entries(data, "energy_model", "x")
    assert rows is not None
    row_shape(data, "energy_model")
    constant = (rows == rows[:1]).all(0)
    if bool(constant.any()):
        columns = ", ".join(map(str, constant.flatten().nonzero().squeeze(-1).tolist()[:5]))
        raise ValueError(f"data: column(s) {columns} are constant: no density exists in that direction; leave them out")
    return rows.double()
