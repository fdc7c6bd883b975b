"""Styles and classes apart: M2 sees labels of half of the digits, then writes every class in one style."""

import os

import torch
from matplotlib.figure import Figure

import ppl_gen as pg
from ppl_gen.data.rows import Rows
from ppl_gen.inference import SVI
from ppl_gen.models import m2
from ppl_gen.report import plot_samples

quick = bool(os.environ.get("PPL_GEN_QUICK"))
try:
    digits = pg.load_data("mnist", binarize="dynamic")
except (FileNotFoundError, ImportError):
    digits = pg.load_data("digits", binarize="dynamic")  # 8 x 8 pixels, from scikit-learn
rows = min(1000 if quick else 10_000, len(digits["x"]) - 300)
side = round(digits["x"].shape[1] ** 0.5)
labels = torch.where(torch.arange(rows) % 2 == 0, digits["y"][:rows], -1)  # every second row has a label
train = Rows({"x": digits["x"][:rows], "y": labels}, digits.on_batch)

recipe = m2(classes=10, latent=3, hidden=(200,), alpha=10.0)
algorithm = SVI(epochs=3 if quick else 15, batch_size=100, lr=2e-3, stratify="y")
fit = pg.fit(recipe, train, algorithm, seed=0)

x, y = torch.bernoulli(digits["x"][-300:], generator=torch.Generator().manual_seed(0)), digits["y"][-300:]
guessed = fit.module("classifier")(x).probs.argmax(-1)
print(fit)
error = float((guessed != y).float().mean())
print(f"{int((labels >= 0).sum())} of {rows} rows have a label; error on 300 others: {error:.1%}")

classes = torch.arange(10).repeat(10)  # across
drawn = fit.sample(10, seed=1)["z"]  # ten styles from the prior
seen = torch.tensor([int((y == label).nonzero()[0]) for label in range(10)])  # one held-out digit of each class
found = fit.module("encoder")(x[seen], y[seen]).mean  # and its style

figure = Figure(figsize=(11, 5.2), layout="constrained")
left, middle, right = figure.subplots(1, 3, width_ratios=(10, 1, 10))
plot_samples(fit, 100, given={"y": classes, "z": drawn.repeat_interleave(10, 0)}, axes=left)
left.set_title("A style in each row, a class in each column", fontsize=10, loc="left")
middle.imshow(x[seen].reshape(10 * side, side), cmap="gray_r")
middle.set(xticks=[], yticks=[])
middle.set_title("seen", fontsize=10)
plot_samples(fit, 100, given={"y": classes, "z": found.repeat_interleave(10, 0)}, axes=right)
right.set_title("Analogies: the style of the digit at the left, in every class", fontsize=10, loc="left")
figure.savefig("styles.png", dpi=120)
written = fit.sample(100, given={"y": classes, "z": found.repeat_interleave(10, 0)}, seed=2)["x"]
recognised = float((fit.module("classifier")(written).probs.argmax(-1) == classes).float().mean())
print(f"{recognised:.0%} of the digits written in the styles seen are recognised as their class")
assert quick or (error < 0.15 and recognised > 0.7), "classes are learned, and written in every style"
