"""Diffusion of digits: noise to samples, the lower half of digits drawn given the upper half."""

import os

import torch
from matplotlib.figure import Figure

import ppl_gen as pg
from ppl_gen.inference import SVI, SimpleDiffusion
from ppl_gen.models import ddim_sample, denoising_diffusion, inpaint

quick = bool(os.environ.get("PPL_GEN_QUICK"))
digits = pg.load_data("digits", images=True)["x"]  # 8 x 8 pixels, from scikit-learn
train, test = digits[:-8], digits[-8:]
side, steps = digits.shape[-1], 10 if quick else 1500


def falling(optimiser):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)


algorithm = SVI(SimpleDiffusion(), steps=steps, batch_size=64, lr=2e-3, schedule=falling)
fit = pg.fit(denoising_diffusion(steps=50, hidden=16, layers=2), train, algorithm, seed=0)
print(fit, "\n", fit.notes["loss"])

samples = fit.sample(8, seed=1)
fewer = ddim_sample(fit, 8, steps=10, seed=1)
seen = torch.zeros_like(test, dtype=torch.bool)
seen[:, :, : side // 2] = True
plain = inpaint(fit, test, seen, resamples=1, seed=2)[0]
drawn = fit.predict({"x": test, "mask": seen}, draws=8, seed=2)["x"]

rows = {
    "noise": samples["x_50"],
    "step 15": samples["x_15"],
    "samples": samples["x"],
    "10 steps, without noise": fewer,
    "held-out digits": test,
    "what is seen": torch.where(seen, test, 0.5),
    "completed, plain": plain,
    "completed, resampled": drawn[0],
    "another draw": drawn[1],
}
figure = Figure(figsize=(6, 8), layout="constrained")
panels = figure.subplots(len(rows), 8)
for line, (title, images) in zip(panels, rows.items(), strict=True):
    for panel, image in zip(line, images, strict=True):
        low, high = (image.min(), image.max()) if title in ("noise", "step 15") else (0, 1)
        panel.imshow(image[0], cmap="gray_r", vmin=low, vmax=high)
        panel.set(xticks=[], yticks=[])
    line[0].set_ylabel(title, rotation=0, ha="right", va="center")
figure.savefig("inpainting.png", dpi=120)

assert bool((drawn[:, seen] == test[seen]).all()), "what is seen is left alone"
middle = train.mean(0).expand_as(test)
errors = {
    "the mean digit": float((middle - test)[~seen].square().mean()),
    "the mean of eight draws": float((drawn.mean(0) - test)[~seen].square().mean()),
}
print("squared error of the hidden half:", errors)
assert quick or errors["the mean of eight draws"] < errors["the mean digit"], "the upper half tells of the lower one"
spread = {title: float(rows[title].flatten(1).std(1).mean()) for title in ("samples", "held-out digits")}
print("contrast within a picture:", spread)
