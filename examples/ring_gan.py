"""A Wasserstein game on eight modes: the program has no density, so its samples are checked against the modes."""

import math
import os

import torch
from matplotlib.figure import Figure
from torch import nn

import ppl_gen as pg
from ppl_gen.inference import SVI, Adversarial
from ppl_gen.models import gan

quick = bool(os.environ.get("PPL_GEN_QUICK"))
noise, sd = torch.Generator().manual_seed(0), 0.02
turns = torch.arange(8) * (2 * math.pi / 8)
modes = 2 * torch.stack([turns.cos(), turns.sin()], -1)
ring = modes[torch.randint(0, 8, (5000,), generator=noise)] + sd * torch.randn(5000, 2, generator=noise)

torch.manual_seed(0)  # the fit's seed does not reach the first weights of a critic made here
critic = nn.Sequential(nn.Linear(2, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1))
objective = Adversarial("wasserstein", critic=critic, penalty="gradient", critic_steps=5)
steps = 20 if quick else 4000


def falling(optimiser):
    """A learning rate that falls to a hundredth: players that go on at the full rate circle around the equilibrium."""
    return torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.01, total_iters=steps)


fit = pg.fit(gan(), ring, SVI(objective, steps=steps, batch_size=256, lr=2e-3, schedule=falling), seed=0)
samples = fit.sample(2500)["x"]
distance, nearest = torch.cdist(samples, modes).min(-1)
close = distance < 3 * sd
found, share = nearest[close].unique().numel(), float(close.float().mean())
print(fit, "\n", fit.diagnose().attrs["verdict"])
print(f"{found} of 8 modes; {share:.0%} of the samples within three standard deviations of one")

figure = Figure(figsize=(10, 4), layout="constrained")
left, right = figure.subplots(1, 2)
left.plot(*ring[:1000].T, ".", color="0.7", markersize=4, label="data")
left.plot(*samples[:1000].T, ".", color="tab:blue", markersize=2, label="samples")
left.set(title=f"{found} of 8 modes, {share:.0%} of the samples within 3 sd")
left.set_aspect("equal")
left.legend(frameon=False, loc="center")
for name in ("program_loss", "critic_loss"):
    right.plot(fit.history["step"], fit.history[name], label=name, linewidth=0.7)
right.set(xlabel="step", ylabel="loss per row", title="Losses of a game are no measure of fit")
right.legend(frameon=False)
figure.savefig("ring_gan.png", dpi=120)
assert quick or (found == 8 and share >= 0.5), "the samples cover all modes, and most of them lie in one"
