"""A normalising flow of two moons: its density, its samples, and the codes that it makes of the data."""

import os

import torch
from matplotlib.figure import Figure

import ppl_gen as pg
from ppl_gen.inference import SVI
from ppl_gen.models import real_nvp

quick = bool(os.environ.get("PPL_GEN_QUICK"))


def two_moons(rows, seed):
    noise = torch.Generator().manual_seed(seed)
    angle = torch.pi * torch.rand(rows, generator=noise)
    upper = torch.arange(rows) % 2 == 0
    x = torch.where(upper, angle.cos(), 1 - angle.cos())
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
    return torch.stack([x, y], -1) + 0.08 * torch.randn(rows, 2, generator=noise), upper


moons, upper = two_moons(4000, seed=0)
steps = 20 if quick else 2000
falling = SVI(
    steps=steps, batch_size=256, lr=2e-3, schedule=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, steps)
)
fit = pg.fit(real_nvp(), moons, falling, seed=0)
test = two_moons(4000, seed=1)[0]
evidence = fit.evidence(test)  # exact, on rows it has not seen
print(fit, "\n", evidence)

flow = fit.module("flow")
with torch.no_grad():
    x, y = torch.meshgrid(torch.linspace(-1.6, 2.6, 300), torch.linspace(-1.1, 1.6, 200), indexing="xy")
    density = flow.log_prob(torch.stack([x, y], -1)).exp()
    codes = flow.encode(moons)
    # Lines of equal radius and angle among the codes, taken back to the rows: how the flow bends the plane.
    turn = torch.linspace(0, 2 * torch.pi, 400)
    circles = [flow.decode(radius * torch.stack([turn.cos(), turn.sin()], -1)) for radius in (0.5, 1.0, 1.5, 2.0, 2.5)]

figure = Figure(figsize=(15, 2.9), layout="constrained")
panels = figure.subplots(1, 4, width_ratios=(1.6, 1.6, 1.6, 1.0))
panels[0].plot(*moons[upper].T, ".", *moons[~upper].T, ".", markersize=1.5)
panels[0].set(title="data")
panels[1].pcolormesh(x, y, density, cmap="magma", shading="gouraud", rasterized=True)
for circle in circles:
    panels[1].plot(*circle.T, color="white", linewidth=0.5, alpha=0.6)
panels[1].set(title="density, and circles of the codes")
panels[2].plot(*fit.sample(4000)["x"].T, ".", color="tab:purple", markersize=1.5)
panels[2].set(title="samples")
panels[3].plot(*codes[upper].T, ".", *codes[~upper].T, ".", markersize=1.5)
panels[3].set(title="codes of the data", xlim=(-4, 4), ylim=(-4, 4))
for panel in panels[:3]:
    panel.set(xlim=(-1.6, 2.6), ylim=(-1.1, 1.6))
for panel in panels:
    panel.set_aspect("equal")
figure.savefig("moons.png", dpi=120)
normal = torch.distributions.MultivariateNormal(moons.mean(0), torch.cov(moons.T)).log_prob(test).mean()
far = torch.cdist(fit.sample(4000)["x"], moons).min(-1).values > 0.1
assert quick or evidence.mean > float(normal) + 0.7, "the density follows the moons, unlike a normal one"
assert quick or float(far.float().mean()) < 0.05, "the samples lie on the moons"
