"""Variational autoencoders of digits: ELBO, IWAE and beta-VAE, what their codes keep, and a manifold of two numbers."""

import os

from matplotlib.figure import Figure

import ppl_gen as pg
from ppl_gen.data.rows import Rows
from ppl_gen.diagnostics import active_units
from ppl_gen.inference import ELBO, IWAE, SVI
from ppl_gen.models import vae
from ppl_gen.report import plot_manifold, plot_reconstructions, plot_traversal

quick = bool(os.environ.get("PPL_GEN_QUICK"))
try:
    digits = pg.load_data("mnist", binarize="dynamic")
except (FileNotFoundError, ImportError):
    digits = pg.load_data("digits", binarize="dynamic")  # 8 x 8 pixels, from scikit-learn
rows = min(1000 if quick else 10_000, len(digits["x"]) - 300)
train = Rows({"x": digits["x"][:rows]}, digits.on_batch)
test = Rows({"x": digits["x"][-300:]}, digits.on_batch)


def training(objective):
    return SVI(objective, epochs=2 if quick else 25, batch_size=100, lr=2e-3)


algorithms = {"ELBO": training(ELBO()), "IWAE": training(IWAE(particles=5)), "beta 4": training(ELBO(beta=4.0))}
comparison = pg.compare(vae(latent=10), train, algorithms, test=test)
print(comparison)
units = {label: active_units(comparison[label], test) for label in algorithms}
for label, found in units.items():
    print(f"{label}: {found}")
plane = pg.fit(vae(latent=2), train, training(ELBO()), seed=0)

figure = Figure(figsize=(14, 4.9), layout="constrained")
left, middle, right = figure.subfigures(1, 3, width_ratios=(1, 1.15, 1.15))
for axes, label in zip(left.subplots(3, 1), algorithms, strict=True):
    plot_reconstructions(comparison[label], test, rows=8, axes=axes)
    axes.set_title(f"{label}: held-out rows, and from their codes", fontsize=9, loc="left")
for axes, label in zip(middle.subplots(1, 2), ("ELBO", "beta 4"), strict=True):
    plot_traversal(comparison[label], 5, axes=axes)
    axes.set_title(f"{label}: one code, unit by unit", fontsize=9, loc="left")
plot_manifold(plane, 15, axes=right.subplots())
figure.savefig("vae.png", dpi=120)
if not quick:
    evidence = {label: comparison[label].evidence(test, particles=100) for label in algorithms}
    assert int(units["beta 4"].active.sum()) < int(units["ELBO"].active.sum()), "beta-VAE keeps fewer units of its code"
    assert evidence["beta 4"].mean < min(evidence["ELBO"].mean, evidence["IWAE"].mean), "and pays for it in evidence"
