"""A game on eight modes: the program has no density, so its samples are checked against the modes."""

import math
import os

import torch
from matplotlib.figure import Figure

import ppl_gen as pg
from ppl_gen.inference import SVI, Adversarial
from ppl_gen.models import gan

quick = bool(os.environ.get("PPL_GEN_QUICK"))
noise, sd = torch.Generator().manual_seed(0), 0.02
turns = torch.arange(8) * (2 * math.pi / 8)
modes = 2 * torch.stack([turns.cos(), turns.sin()], -1)
ring = modes[torch.randint(0, 8, (5000,), generator=noise)] + sd * torch.randn(5000, 2, generator=noise)

objective = Adversarial(penalty="r1")  # flat where the critic has nothing more to tell
steps = 20 if quick else 4000
fit = pg.fit(gan(), ring, SVI(objective, steps=steps, batch_size=256), seed=0)
samples = fit.sample(2500)["x"]
found, share = pg.modes_covered(samples, modes, within=3 * sd)
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
assert quick or (found == 8 and share >= 0.8), "the samples cover all modes, and four of five lie in one"
