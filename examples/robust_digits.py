"""Adversarial training: a classifier of digits against an adversary who may move every pixel a little."""

import os

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn.functional import cross_entropy

import ppl_gen as pg
from ppl_gen.inference import ELBO, SVI, AdversarialTraining

quick = bool(os.environ.get("PPL_GEN_QUICK"))
digits = pg.load_data("digits")
x, y = digits["x"].float(), digits["y"]
train, test = {"x": x[:1400], "y": y[:1400]}, {"x": x[1400:], "y": y[1400:]}
torch.manual_seed(0)
network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def classifier(x, y):
    pyro.module("network", network)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Categorical(logits=network(x)), obs=y)


def attacked(scores, x, y, radius, steps=20):
    """Rows moved within the ball by ascent of the loss, pixels kept in 0 to 1: an attack of its own, not the fit's."""
    r = torch.zeros_like(x)
    for _ in range(steps):
        r.requires_grad_()
        (slope,) = torch.autograd.grad(cross_entropy(scores((x + r).clamp(0, 1)), y), r)
        r = (r.detach() + 2.5 * radius / steps * slope.sign()).clamp(-radius, radius)
    return (x + r).clamp(0, 1)


radius = 0.15
objectives = {"plain": ELBO(), "adversarial": AdversarialTraining(radius, steps=5, bounds=(0, 1))}
radii = torch.linspace(0, 0.3, 7)
right, shown = {}, {}
for name, objective in objectives.items():
    fit = pg.fit(classifier, train, SVI(objective, epochs=2 if quick else 60, batch_size=100, lr=1e-3), seed=0)
    scores = fit.module("network")
    moved = [attacked(scores, test["x"], test["y"], float(r)) for r in radii]
    right[name] = [float((scores(m).argmax(1) == test["y"]).float().mean()) for m in moved]
    shown[name] = moved[3][:10], scores(moved[3][:10]).argmax(1)
    print(f"{name}: {right[name][0]:.1%} right, {right[name][3]:.1%} with every pixel moved by at most {radii[3]:.2f}")

figure = Figure(figsize=(11, 4), layout="constrained")
left, panel = figure.subfigures(1, 2, width_ratios=(1.6, 1))
rows = {"digits": (test["x"][:10], test["y"][:10]), **{f"against\n{name}": found for name, found in shown.items()}}
for line, (name, (images, guesses)) in zip(left.subplots(3, 10), rows.items(), strict=True):
    for axis, image, guess, label in zip(line, images, guesses, test["y"], strict=False):
        axis.imshow(image.reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
        axis.set_title(int(guess), fontsize=8, color="black" if guess == label else "tab:red")
    line[0].set_ylabel(name, fontsize=8)
axes = panel.subplots()
for name, values in right.items():
    axes.plot(radii, values, ".-", label=name)
axes.axvline(radius, color="0.8", zorder=0)
axes.set(xlabel="largest change of a pixel", ylabel="share of held-out digits that are right", ylim=(0, 1))
axes.legend(frameon=False)
figure.savefig("robust_digits.png", dpi=120)
if not quick:
    assert right["plain"][0] > 0.9 and right["adversarial"][0] > 0.88, "both read digits"
    assert right["adversarial"][3] > right["plain"][3] + 0.2, "and one of them also where an adversary was"
