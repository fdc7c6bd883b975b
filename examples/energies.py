"""Energies and chains: annealed normalisers, a network as energy, deep machines of digits, and a chain that walks."""

import math
import os
import warnings

import torch
from matplotlib.figure import Figure
from torch import nn

import ppl_gen as pg
from ppl_gen.inference import SVI, ContrastiveDivergence, WakeSleep, Walkback
from ppl_gen.models import dbm, dbn, energy_model, gsn, helmholtz, rbm, rbm_stack

quick = bool(os.environ.get("PPL_GEN_QUICK"))
digits = pg.load_data("digits", binarize="fixed")["x"]
train, test = digits[:1500], digits[1500:]


def falling(steps):
    """A learning rate that falls to zero, which persistent chains need."""
    return lambda optimiser: torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.01, total_iters=steps)


def trained(recipe, data, objective, steps, lr, **more):
    steps = steps // 50 if quick else steps
    algorithm = SVI(objective, steps=steps, batch_size=100, lr=lr, schedule=falling(steps), **more)
    return pg.fit(recipe, data, algorithm, seed=0)


# ---------------------------------------------------- log Z of a machine that can be enumerated, from below and above
machine = trained(rbm(hidden=16), train, ContrastiveDivergence(steps=5, persistent=True, chains=200), 3000, 0.01)
exact = float(machine.module("machine").log_partition().detach())
ladder, ways = [2, 5, 10, 30, 100] if quick else [2, 5, 10, 30, 100, 300, 1000], {"forward": [], "reverse": []}
for temperatures in ladder:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # with few temperatures nothing is to be trusted, and it says so
        found = machine.evidence(test, method=pg.AIS(temperatures=temperatures, chains=200)).log_partition
    for way, values in ways.items():
        values.append(getattr(found, way) - exact)
print(f"log Z exactly {exact:.2f}; by {temperatures} temperatures {found.forward:.2f}, in reverse {found.reverse:.2f}")

# --------------------------------------------------------------------------------- an energy of one's own: two moons
generator = torch.Generator().manual_seed(0)
angle = math.pi * torch.rand(2000, generator=generator)
upper, lower = torch.stack([angle.cos(), angle.sin()], 1), torch.stack([1 - angle.cos(), 0.5 - angle.sin()], 1)
moons = torch.cat([upper[::2], lower[1::2]]) + 0.1 * torch.randn(2000, 2, generator=generator)
moons = moons[torch.randperm(2000, generator=generator)]
network = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))
chains = ContrastiveDivergence(steps=10, persistent=True, chains=500)
energy = trained(energy_model(network, step=0.3, sweeps=500), moons[:1500], chains, 1500, 5e-3)
walk = pg.AIS(temperatures=100 if quick else 3000, chains=300, burn=500)
held_out = energy.evidence(moons[1500:], method=walk)
normal = torch.distributions.MultivariateNormal(moons[:1500].mean(0), torch.cov(moons[:1500].T))
beside = float(normal.log_prob(moons[1500:]).mean())
print(f"two moons: log p = {held_out.mean:.2f} nats per held-out row ({held_out.kind}); a normal {beside:.2f}")

# ------------------------------------------------------------------------------------------- deep machines of digits
stack = rbm_stack(train, (100, 50), SVI(ContrastiveDivergence(), steps=40 if quick else 2000, batch_size=100, lr=0.01))
deep = {
    "deep belief network": trained(dbn(layers=stack), train, WakeSleep(steps=5), 2000, 1e-3),
    "deep Boltzmann machine": trained(
        dbm(hidden=(100, 50)), train, ContrastiveDivergence(steps=5, persistent=True, chains=100), 3000, 5e-3
    ),
    "Helmholtz machine": trained(helmholtz(hidden=(100, 30)), train, WakeSleep(particles=5, guide="both"), 3000, 3e-3),
}
scores = {}
for name, fit in deep.items():
    method = None if name.startswith("Helmholtz") else pg.AIS(temperatures=1000, chains=100)
    evidence = fit.evidence(test, particles=500, method=method)
    scores[name] = evidence.mean
    print(f"{name}: log p = {evidence.mean:.2f} nats per held-out row, {evidence.kind}")
coins = train.mean(0).clamp(0.5 / len(train), 1 - 0.5 / len(train))
alone = float(torch.distributions.Bernoulli(coins).log_prob(test).sum(-1).mean())
print(f"independent pixels: log p = {alone:.2f}")

# ------------------------------------------------------------------------------ a chain that corrupts rows and restores
walker = trained(gsn(hidden=(300,), corruption=0.25), train, Walkback(steps=3), 3000, 1e-3)
chain = walker.module("machine")
torch.manual_seed(0)
with torch.no_grad():
    steps = [test[:8]]
    for _ in range(7):
        steps.append(chain.gibbs(steps[-1], 2))
drawn = walker.sample(300, seed=1)["x"]


def distance(rows):
    """Pixels in which a row differs from the nearest one of the data, mean over rows."""
    return float(torch.cdist(rows, train, p=1).min(1).values.mean())


noise = torch.bernoulli(coins.expand(300, -1), generator=generator)
near = {"chain": distance(drawn), "held out": distance(test), "coins": distance(noise)}
print("pixels to the nearest digit:", ", ".join(f"{name} {pixels:.1f}" for name, pixels in near.items()))


def mosaic(rows, across=8):
    """Rows of 64 numbers as one picture of 8 x 8 pixel images."""
    return rows.reshape(-1, across, 8, 8).permute(0, 2, 1, 3).reshape(-1, 8 * across)


figure = Figure(figsize=(12, 8), layout="constrained")
panels = figure.subplots(2, 3).flatten()
for way, values in ways.items():
    panels[0].plot(ladder, values, "o-", label=way)
panels[0].axhline(0.0, color="0.5", linewidth=0.8, label="exact")
panels[0].set(xscale="log", xlabel="temperatures", ylabel="log Z minus its exact value, nats", title="annealing")
panels[0].legend(frameon=False)
axis = [torch.linspace(-1.6, 2.6, 200), torch.linspace(-1.1, 1.6, 200)]
grid = torch.stack(torch.meshgrid(*axis, indexing="xy"), -1)
with torch.no_grad():
    density = (-energy.module("machine").free_energy(grid) - held_out.log_partition.forward).exp()
panels[1].pcolormesh(*axis, density, cmap="Blues", shading="auto")
samples = energy.sample(300, seed=1)["x"]
panels[1].scatter(*samples.T, s=4, color="tab:orange", label="ends of chains")
panels[1].set(title="a network as energy: two moons", xlim=(-1.6, 2.6), ylim=(-1.1, 1.6))
panels[1].legend(frameon=False, loc="lower left")
for panel, (name, fit) in zip(panels[2:5], deep.items(), strict=True):
    panel.imshow(mosaic(fit.sample(64, seed=1)["x"]), cmap="gray_r")
    panel.set_title(f"{name}: samples")
panels[5].imshow(mosaic(torch.stack(steps, 1).flatten(0, 1)), cmap="gray_r")
panels[5].set_title("stochastic network: walks from eight digits")
for panel in panels[2:]:
    panel.set(xticks=[], yticks=[])
    for line in range(8, 64, 8):
        panel.axhline(line - 0.5, color="0.8", linewidth=0.5)
        panel.axvline(line - 0.5, color="0.8", linewidth=0.5)
figure.savefig("energies.png", dpi=120)

slack = 0.3  # nats: what 200 chains leave open at many temperatures
assert quick or (ways["forward"][-1] < slack and ways["reverse"][-1] > -slack), "forward below, reverse above"
assert quick or ways["reverse"][-1] - ways["forward"][-1] < ways["reverse"][0] - ways["forward"][0], "and they close in"
assert quick or abs(ways["forward"][-1]) < slack, "on the exact value"
assert quick or held_out.mean > beside + 0.3, "the energy knows that there are two moons"
assert quick or min(scores.values()) > alone + 2, "every deep machine learns how pixels depend on each other"
assert quick or near["chain"] < near["coins"] - 0.5, "the chain draws rows that are nearer to digits than coins are"
