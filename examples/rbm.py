"""A Boltzmann machine of digits: contrastive divergence against persistent chains, features, and what it dreams."""

import os

import torch
from matplotlib.figure import Figure

import ppl_gen as pg
from ppl_gen.inference import SVI, ContrastiveDivergence
from ppl_gen.models import rbm

quick = bool(os.environ.get("PPL_GEN_QUICK"))
digits = pg.load_data("digits", binarize="fixed")["x"]
train, test = digits[:1500], digits[1500:]
steps = 150 if quick else 4000


def falling(optimiser):
    """A learning rate that falls to zero, which persistent chains need."""
    return torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.01, total_iters=steps)


objectives = {
    "CD-1": ContrastiveDivergence(),
    "CD-10": ContrastiveDivergence(steps=10),
    "persistent": ContrastiveDivergence(steps=5, persistent=True, chains=200),
}
fits, scores = {}, {}
for name, objective in objectives.items():
    algorithm = SVI(objective, steps=steps, batch_size=100, lr=0.01, schedule=falling)
    fits[name] = pg.fit(rbm(hidden=16), train, algorithm, seed=0)
    # Sixteen hidden units: log Z is a sum over 65536 states, so that this is exact.
    evidence = fits[name].evidence(test)
    scores[name] = float(evidence.mean)
    print(f"{name}: log p = {scores[name]:.2f} nats per held-out row, {evidence.kind}")


def mosaic(rows, across):
    """Rows of 64 numbers as one picture of 8 x 8 pixel images."""
    return rows.reshape(-1, across, 8, 8).permute(0, 2, 1, 3).reshape(-1, 8 * across)


figure = Figure(figsize=(13, 3.6), layout="constrained")
panels = figure.subplots(1, 2 + len(fits))
panels[0].imshow(mosaic(test[:64], 8), cmap="gray_r")
panels[0].set_title("held-out rows")
weights = fits["persistent"].module("machine").weight.detach()
limit = float(weights.abs().quantile(0.99))
panels[1].imshow(mosaic(weights.T, 4), cmap="RdBu_r", vmin=-limit, vmax=limit)
panels[1].set_title("16 features (persistent)")
for panel, (name, fit) in zip(panels[2:], fits.items(), strict=True):
    panel.imshow(mosaic(fit.sample(64)["x"], 8), cmap="gray_r")
    panel.set_title(f"samples, {name}")
for panel in panels:
    panel.set(xticks=[], yticks=[])
    size = panel.images[0].get_array().shape[0]
    for line in range(8, size, 8):
        panel.axhline(line - 0.5, color="0.8", linewidth=0.5)
        panel.axvline(line - 0.5, color="0.8", linewidth=0.5)
figure.savefig("rbm.png", dpi=120)
coins = train.mean(0).clamp(0.5 / len(train), 1 - 0.5 / len(train))
alone = float(torch.distributions.Bernoulli(coins).log_prob(test).sum(-1).mean())
print(f"independent pixels: log p = {alone:.2f}")
assert quick or min(scores.values()) > alone + 2, "every way learns how pixels depend on each other"
assert quick or max(scores.values()) - min(scores.values()) < 0.5, "with a rate that falls, all three ways do alike"
