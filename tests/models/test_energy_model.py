"""Energies that are networks: Langevin chains, annealing and training against quadrature and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from fixtures import float64_under
from torch import nn

import ppl_gen as pg
from ppl_gen.evidence.annealed import AIS, log_partition
from ppl_gen.inference import SVI, ContrastiveDivergence
from ppl_gen.models import energy_model
from ppl_gen.models.energy.energy_model import LangevinMachine

Z = 5.5

float64_and_seed = float64_under(6)


class Quadratic(nn.Module):
    """v'Av / 2 - c'v with A = I e^s + L L', which every normal of two columns is."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.linear = nn.Parameter(torch.eye(2)), nn.Parameter(torch.zeros(2))

    @property
    def precision(self) -> torch.Tensor:
        return self.low @ self.low.T + 0.01 * torch.eye(2)

    def forward(self, v: torch.Tensor) -> torch.Tensor:
        return 0.5 * ((v @ self.precision) * v).sum(-1) - v @ self.linear


class Well(nn.Module):
    """Two wells in one dimension."""

    def forward(self, v: torch.Tensor) -> torch.Tensor:
        return ((v**2 - 1.0) ** 2).sum(-1) + 0.3 * v.sum(-1)


def moons(count, generator):
    angle = math.pi * torch.rand(count, generator=generator)
    upper = torch.stack([angle.cos(), angle.sin()], 1)
    lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], 1)
    rows = torch.where((torch.arange(count) % 2 == 0)[:, None], upper, lower)
    return rows + 0.1 * torch.randn(count, 2, generator=generator)


def by_quadrature(machine, width=6.0, cells=400):
    """log Z in the user's units of a machine over pairs, by a sum over a grid of standardised rows."""
    axis = torch.linspace(-width, width, cells, dtype=machine.loc.dtype)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        total = torch.logsumexp(-machine.energy(grid), 0)
    return float(total + 2 * math.log(2 * width / (cells - 1)) + machine.spread.log().sum())


@pytest.mark.parametrize("step", [0.3, 1.0])
def test_langevin_chains_reach_the_density_at_any_step(step):
    made = LangevinMachine(Well(), torch.zeros(1), torch.ones(1), None, step)
    axis = torch.linspace(-4, 4, 4001)[:, None]
    p = (-made.energy(axis)).softmax(0)
    count = 20_000
    drawn = made.gibbs(made.begin(torch.Size([count])), 300 if step < 1 else 100)
    for power in (1, 2, 3):
        exact = float(p @ axis[:, 0] ** power)
        spread = (float(p @ axis[:, 0] ** (2 * power)) - exact**2) ** 0.5
        assert abs(float((drawn**power).mean()) - exact) / (spread / count**0.5) < Z
    begun = made.begin(torch.Size([count]))
    assert abs(float((begun**2).mean()) - float(p @ axis[:, 0] ** 2)) > 0.05


def test_tempered_chains_have_the_density_on_the_way_and_annealing_the_normaliser():
    made = LangevinMachine(Well(), torch.tensor([4.0]), torch.tensor([2.0]), 2.0, 0.5)
    tempering, axis = made.tempering(), torch.linspace(-8, 8, 8001)[:, None]
    p = tempering.log_density(axis, 0.5).detach().softmax(0)
    drawn = tempering.move(tempering.begin(20_000), torch.full((20_000, 1), 0.5), 300)
    exact = float(p @ axis[:, 0] ** 2)
    spread = (float(p @ axis[:, 0] ** 4) - exact**2) ** 0.5 / 20_000**0.5
    assert abs(float((drawn**2).mean()) - exact) / spread < Z
    log_z = float(torch.logsumexp(-made.energy(axis), 0).detach()) + math.log(16 / 8000) + math.log(2.0)
    found = log_partition(tempering, AIS(temperatures=500, chains=500), made.begin(torch.Size([500])))
    assert found.agrees and abs(found.forward - log_z) < 3 * found.forward_stderr + 0.02
    base = torch.logsumexp(tempering.log_density(axis, 0.0), 0) + math.log(16 / 8000) + math.log(2.0)
    assert float(base) == pytest.approx(float(tempering.log_base), abs=1e-4)  # the normal ends at four of its widths


def test_a_quadratic_energy_learns_the_mean_and_the_precision_of_a_normal():
    factor = torch.tensor([[2.0, 0.0], [1.5, 1.0]])
    x = torch.tensor([10.0, -4.0]) + torch.randn(2000, 2) @ factor.T
    recipe = energy_model(Quadratic(), tail=None, step=0.5, sweeps=200)
    steps = 350
    falling = SVI(
        ContrastiveDivergence(steps=5, persistent=True, chains=2000),
        steps=steps,
        lr=0.05,
        schedule=lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.02, steps),
    )

    def found(fit):
        machine = fit.module("machine")
        precision = machine.network.precision.detach()
        mean = torch.linalg.solve(precision, machine.network.linear.detach())
        scale = torch.diag(1 / machine.spread)
        return machine.loc + machine.spread * mean, scale @ precision @ scale

    exact = torch.linalg.inv(torch.cov(x.T, correction=0))
    # The gradient's noise is that of moments of 2000 chains, about 2 % of a variance; the falling rate averages it.
    before, after = (
        found(pg.fit(recipe, x, algorithm, seed=0))
        for algorithm in (SVI(falling.objective, steps=1, lr=1e-30), falling)
    )
    assert float((after[0] - x.mean(0)).abs().max()) < 0.15
    assert float((after[1] - exact).norm() / exact.norm()) < 0.1 < float((before[1] - exact).norm() / exact.norm())


@pytest.mark.slow
def test_on_two_moons_the_normalised_density_beats_a_normal_and_annealing_agrees_with_quadrature():
    generator = torch.Generator().manual_seed(0)
    x, test = moons(2000, generator).float(), moons(1000, generator).float()
    network = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))
    chains, steps = ContrastiveDivergence(steps=10, persistent=True, chains=500), 1000
    algorithm = SVI(
        chains,
        steps=steps,
        batch_size=500,
        lr=5e-3,
        schedule=lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.02, steps),
    )
    fit = pg.fit(energy_model(network, step=0.3, sweeps=500), x, algorithm, seed=0)
    machine = fit.module("machine")
    normal = torch.distributions.MultivariateNormal(x.mean(0), torch.cov(x.T)).log_prob(test).mean()
    log_z = by_quadrature(machine)
    found = float(-machine.free_energy(test).mean().detach()) - log_z
    assert found > float(normal) + 0.3, (found, float(normal))
    evidence = fit.evidence(test, method=pg.AIS(temperatures=2000, chains=500, burn=500))
    assert abs(evidence.mean - found) < 3 * evidence.mc_stderr + 0.1
    start = pg.fit(energy_model(network, step=0.3), x, SVI(chains, steps=1, lr=1e-30), seed=0).module("machine")
    begun = float(-start.free_energy(test).mean().detach()) - by_quadrature(start, width=12.0)
    assert begun < float(normal)


def test_a_fit_leaves_the_network_as_it_was_and_rows_may_have_any_shape():
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 1))
    kept = [parameter.detach().clone() for parameter in network.parameters()]
    x = torch.randn(20, 3, 2, 2)
    fit = pg.fit(energy_model(network, sweeps=3), x, SVI(ContrastiveDivergence(), steps=3, lr=0.1), seed=0)
    assert all(torch.equal(one, other) for one, other in zip(kept, network.parameters(), strict=True))
    assert not torch.equal(fit.module("machine").network[1].weight, kept[0])
    assert fit.sample(5)["x"].shape == (5, 3, 2, 2)
    with pytest.raises(pg.IncompatibleError, match=r"evidence\(method=pg.AIS\(\)\)"):
        fit.evidence()
    found = fit.evidence(method=pg.AIS(temperatures=50, chains=30, reverse=False))
    assert found.rows == 20 and math.isfinite(found.mean)


def test_what_is_no_energy_is_refused():
    x = torch.randn(10, 2)
    with pytest.raises(TypeError, match="network: expected a torch network"):
        energy_model(lambda v: v.sum(-1))
    with pytest.raises(TypeError, match="an instance"):
        energy_model(nn.Linear)
    for network, words in (
        (nn.Linear(2, 3), "network: .* one number for each"),
        (nn.Linear(3, 1), "data: the network"),
    ):
        with pytest.raises(ValueError, match=words):
            energy_model(network)(x)
    for arguments in ({"tail": 0.0}, {"step": -1.0}, {"sweeps": 0}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            energy_model(nn.Linear(2, 1), **arguments)
    with pytest.raises(ValueError, match="constant"):
        energy_model(nn.Linear(2, 1))(torch.ones(5, 2))


def test_an_energy_that_does_not_grow_has_no_evidence():
    x = torch.randn(30, 2)
    flat, square, line = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)), Square(), nn.Linear(2, 1)
    once = SVI(ContrastiveDivergence(), steps=1)
    for network, tail, proper in ((flat, None, False), (flat, 2.0, True), (square, None, True), (line, None, False)):
        fit = pg.fit(energy_model(network, tail=tail, sweeps=3), x, once, seed=0)
        if proper:
            assert math.isfinite(fit.evidence(method=pg.AIS(temperatures=20, chains=40)).mean)
            continue
        with pytest.raises(pg.IncompatibleError, match="does not grow far from the data, so that its normaliser"):
            fit.evidence(method=pg.AIS(temperatures=20, chains=40))


class Square(nn.Module):
    """Half of the squared length."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.5))

    def forward(self, v):
        return self.factor * v.square().sum(-1)


class _Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(2, 1)

    def forward(self, v: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.line(v) - self.line(v).mean()
        return found


def test_a_network_that_is_no_function_of_each_row_alone_is_refused() -> None:
    """Its chains leave nothing invariant, and evidence of a row changed with the rows beside it."""
    x = torch.randn(30, 2)
    normed = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
    dropped = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 1))
    for network, why in ((normed, "ties the rows"), (_Centred(), "ties the rows"), (dropped, "draws random numbers")):
        with pytest.raises(ValueError, match=f"network: expected one whose number is a function of each row.*{why}"):
            energy_model(network)(x)
    assert int(normed[1].num_batches_tracked) == 0 and torch.equal(normed[1].running_mean, torch.zeros(4))
    layers = nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1))
    assert energy_model(layers)(x).energy is not None and energy_model(layers)(x[:2]).energy is not None
