"""Flows of images: NICE, RealNVP and Glow of digits, their samples, and bits per dimension beside simpler densities."""

import os

import torch
from matplotlib.figure import Figure
from torch.distributions import MultivariateNormal

import ppl_gen as pg
from ppl_gen.inference import SVI
from ppl_gen.models import bits_per_dimension, glow, nice, real_nvp

quick = bool(os.environ.get("PPL_GEN_QUICK"))
LEVELS, PIXELS = 17, 64  # grey levels in sixteenths, from 0 to 1
digits = pg.load_data("digits", images=True)["x"]  # 8 x 8 pixels, from scikit-learn
order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
train, held_out = digits[order].split([1497, 300])

flows = {
    "NICE": (nice(hidden=(256, 256), levels=LEVELS), 2000),
    "RealNVP": (real_nvp(channels=24, blocks=1, levels=LEVELS), 1000),
    "Glow": (glow(channels=24, levels=LEVELS), 1000),
}
bits, samples = {}, {}
for name, (recipe, steps) in flows.items():
    steps = 10 if quick else steps
    rows, others = (part.flatten(1) if name == "NICE" else part for part in (train, held_out))
    falling = SVI(
        steps=steps,
        batch_size=100,
        lr=1e-3,
        schedule=lambda o, steps=steps: torch.optim.lr_scheduler.CosineAnnealingLR(o, steps),
    )
    fit = pg.fit(recipe, rows, falling, seed=0)
    # One draw of the noise that fills the interval of each level, as published figures have it: a bound.
    bits[name] = bits_per_dimension(fit.evidence(others, particles=1, seed=0), PIXELS)
    samples[name] = fit.sample(24, seed=1)["x"].reshape(-1, 8, 8)
    print(f"{name}: {bits[name]:.3f} bits per pixel of held-out digits, {fit.cost['seconds']:.0f} s")

# Densities that need no network: every level of every pixel counted, and a normal on the same noisy pixels.
places = [(16 * part.flatten(1)).round().long() for part in (train, held_out)]
counts = torch.stack([places[0].eq(level).sum(0) for level in range(LEVELS)]) + 1.0
shares = counts / counts.sum(0)
bits["independent pixels"] = bits_per_dimension(float(shares.log().gather(0, places[1]).sum(1).mean()), PIXELS)
noise = torch.Generator().manual_seed(0)
filled = [(part + torch.rand(part.shape, generator=noise, dtype=torch.float64)) / LEVELS for part in places]
normal = MultivariateNormal(filled[0].mean(0), torch.cov(filled[0].T))
bits["normal"] = bits_per_dimension(float(normal.log_prob(filled[1]).mean()), PIXELS, levels=LEVELS)
for name in ("independent pixels", "normal"):
    print(f"{name}: {bits[name]:.3f} bits per pixel")
apart = torch.multinomial(shares.T, 24, replacement=True, generator=noise).T / 16
together = (normal.rsample((24,)) * LEVELS - 0.5).clamp(0, 16) / 16

rows = {
    "digits, held out": held_out[:24, 0],
    **{f"{name}: {bits[name]:.2f}": samples[name] for name in flows},
    f"independent pixels: {bits['independent pixels']:.2f}": apart.reshape(-1, 8, 8),
    f"a normal: {bits['normal']:.2f}": together.reshape(-1, 8, 8),
}
figure = Figure(figsize=(10.5, 4.2), layout="constrained")
for axis, (name, shown) in zip(figure.subplots(len(rows)), rows.items(), strict=True):
    strip = torch.cat(list(torch.nn.functional.pad(shown.detach().float(), (1, 0), value=0.4)), 1)
    axis.imshow(strip, cmap="gray_r", vmin=0, vmax=1)
    axis.set(xticks=[], yticks=[])
    axis.set_ylabel(name, fontsize=8, rotation=0, ha="right", va="center")
figure.suptitle("Samples of flows of digits, and bits per pixel of held-out ones (a bound for the flows)", fontsize=9)
figure.savefig("image_flows.png", dpi=110)
if not quick:
    for name in ("RealNVP", "Glow"):
        assert bits[name] < bits["independent pixels"] - 0.2, "what pixels have to do with each other is learned"
    assert bits["NICE"] < bits["normal"], "and more than their covariances, even without scales"
