"""A diffusion model of two moons: a fixed noising guide, a learned reverse chain, the ELBO at a sampled time step."""

import os

import torch
from matplotlib.figure import Figure

import ppl_gen as pg
from ppl_gen.inference import SVI
from ppl_gen.models import denoising_diffusion

quick = bool(os.environ.get("PPL_GEN_QUICK"))
noise = torch.Generator().manual_seed(0)
angle = torch.pi * torch.rand(2000, generator=noise)
upper = torch.arange(2000) % 2 == 0
x = torch.where(upper, angle.cos(), 1 - angle.cos())
y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
moons = torch.stack([x, y], -1) + 0.06 * torch.randn(2000, 2, generator=noise)

algorithm = SVI(steps=20 if quick else 4000, batch_size=256, lr=2e-3)
fit = pg.fit(denoising_diffusion(steps=40), moons, algorithm, seed=0)
samples = fit.sample(1000)
print(fit, "\n", fit.notes["gradients"])

figure = Figure(figsize=(12, 3.2), layout="constrained")
stages = {"noise": samples["x_40"], "step 10": samples["x_10"], "samples": samples["x"], "data": moons[:1000]}
for panel, (title, rows) in zip(figure.subplots(1, 4), stages.items(), strict=True):
    panel.plot(*rows.T, ".", markersize=2)
    panel.set(title=title)
figure.savefig("diffusion.png", dpi=120)
nearby = {
    stage: float((torch.cdist(rows, moons).min(-1).values < 0.1).float().mean()) for stage, rows in stages.items()
}
print("share of the rows near the data:", nearby)
assert quick or nearby["samples"] > 0.9 > nearby["noise"], "the noise has become moons"
share = float(upper[torch.cdist(samples["x"], moons).argmin(-1)].float().mean())
print("share of the samples on the upper moon:", share)
assert quick or 0.4 < share < 0.6, "both of them"
