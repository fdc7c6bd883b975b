"""A Wasserstein game on eight modes: the program has no density, so its samples are looked at."""

import math
import os

import torch
from matplotlib.figure import Figure
from torch import nn

import ppl_gen as pg
from ppl_gen.inference import SVI, Adversarial
from ppl_gen.models import gan

quick = bool(os.environ.get("PPL_GEN_QUICK"))
noise = torch.Generator().manual_seed(0)
angle = torch.randint(0, 8, (5000,), generator=noise) * (2 * math.pi / 8)
ring = 2 * torch.stack([angle.cos(), angle.sin()], -1) + 0.02 * torch.randn(5000, 2, generator=noise)

critic = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
objective = Adversarial("wasserstein", critic=critic, penalty="gradient", critic_steps=5)
fit = pg.fit(gan(), ring, SVI(objective=objective, steps=20 if quick else 1500, batch_size=128), seed=0)
samples = fit.sample(1000)["x"]
print(fit, "\n", fit.diagnose().attrs["verdict"])

figure = Figure(figsize=(10, 4), layout="constrained")
left, right = figure.subplots(1, 2)
left.plot(*ring[:1000].T, ".", color="0.7", markersize=4, label="data")
left.plot(*samples.T, ".", color="tab:blue", markersize=2, label="samples")
left.set_aspect("equal")
left.legend(frameon=False)
for name in ("program_loss", "critic_loss"):
    right.plot(fit.history["step"], fit.history[name], label=name, linewidth=0.7)
right.set(xlabel="step", ylabel="nats per row", title="Losses of a game are no measure of fit")
right.legend(frameon=False)
figure.savefig("ring_gan.png", dpi=120)
