"""Weldon's crabs: one kind or two? The predictive density of each algorithm and what held-out rows say.

All predict alike, and not all describe the posterior: the picture names the grade of each beside its number. CAVI's
guide is of independent factors and too narrow; SVI's knows correlations, but the posterior is skewed. `ppl-gen demo`
adds NUTS.
"""

import dataclasses
import math
import os

import torch
from matplotlib.figure import Figure
from pyro.infer.autoguide import AutoMultivariateNormal

import ppl_gen as pg
from ppl_gen.inference import CAVI, EM, SVI
from ppl_gen.models import gaussian_mixture

quick = bool(os.environ.get("PPL_GEN_QUICK"))
crabs = pg.load_data("crabs")
grid = torch.linspace(0.57, 0.70, 400, dtype=torch.float64)
algorithms = {"EM": EM(), "CAVI": CAVI(), "SVI": SVI(steps=200 if quick else 2000, lr=0.02)}

fits = {"one kind": pg.fit(gaussian_mixture(components=1), crabs, EM(), seed=0)}
plain = gaussian_mixture(components=2)
two = pg.Recipe(lambda rows: dataclasses.replace(plain(rows), guide=AutoMultivariateNormal), name="gaussian_mixture")
fits |= {f"two kinds, {name}": pg.fit(two, crabs, algorithm, seed=0) for name, algorithm in algorithms.items()}
comparison = pg.compare(two, crabs, algorithms, holdout=0.2, seeds=[0])

figure = Figure(figsize=(10, 4), layout="constrained")
left, right = figure.subplots(1, 2, width_ratios=(2, 1))
left.hist(crabs, bins=29, density=True, color="0.85", label="1000 crabs")
for (label, fit), style in zip(fits.items(), (":", "-", "--", "-."), strict=True):
    left.plot(grid, fit.evidence(grid).values.exp(), style, label=label)
left.set(xlabel="forehead breadth / body length", ylabel="density", title="Predictive density")
left.legend(frameon=False)
table = comparison.table()
right.errorbar(table["heldout"], range(len(table)), xerr=table["difference_se"].fillna(0), fmt="o", capsize=3)
grades = [verdict.split(":")[0] for verdict in table["verdict"]]
right.set_yticks(
    range(len(table)), [f"{name}\n{grade}" for name, grade in zip(table["algorithm"], grades, strict=True)]
)
right.invert_yaxis()
right.locator_params(axis="x", nbins=3)
right.set(xlabel="nats per held-out row", title="One yardstick, and the grade")
figure.savefig("crabs.png", dpi=120)
print(comparison)
gain = fits["two kinds, EM"].evidence(crabs).mean - fits["one kind"].evidence(crabs).mean
# More parameters always fit better: what counts is a gain beyond their price, log(n) / 2n for each of the three (BIC).
assert gain > 1.5 * math.log(len(crabs)) / len(crabs), "two kinds describe the crabs better than one"
assert quick or table["difference"].abs().max() < 0.02, "all algorithms predict alike"
assert quick or grades[list(table["algorithm"]).index("CAVI")] != "trust", (
    "CAVI's factors are too narrow, which is seen"
)
