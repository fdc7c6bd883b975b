"""Flows of single numbers before and after training: the data become uniform, Beta or normal codes, and come back."""

import os

import torch
from matplotlib.figure import Figure
from scipy import stats

import ppl_gen as pg
from ppl_gen.inference import SVI
from ppl_gen.models import scalar_flow

quick = bool(os.environ.get("PPL_GEN_QUICK"))
noise = torch.Generator().manual_seed(0)


def two_hills(rows):
    left = torch.rand(rows, generator=noise) < 0.35
    return torch.where(left, -1.0, 5.0) + torch.where(left, 1.0, 1.4) * torch.randn(rows, generator=noise)


x, new = two_hills(3000), two_hills(2000)
bases = {"uniform": stats.uniform(), "beta": stats.beta(5, 5), "normal": stats.norm()}
figure = Figure(figsize=(13, 7.5), layout="constrained")
panels = figure.subplots(3, 4, width_ratios=(1.3, 1, 1, 1.3))
place = torch.linspace(-6.0, 11.0, 400)
distances = {}
for row, (base, codes) in zip(panels, bases.items(), strict=True):
    fits = {
        "before": pg.fit(scalar_flow(base), x, SVI(steps=1, lr=1e-30), seed=0),
        "after": pg.fit(scalar_flow(base), x, SVI(steps=20 if quick else 500, lr=0.03), seed=0),
    }
    low, high = (-4.0, 4.0) if base == "normal" else (0.0, 1.0)
    there = torch.linspace(low, high, 200)
    row[0].hist(new, bins=60, density=True, color="0.8")
    for panel, (when, fit) in zip(row[1:3], fits.items(), strict=True):
        flow = fit.module("flow")
        with torch.no_grad():
            made, density = flow.encode(new), flow.log_prob(place).exp()
        distances[base, when] = float(stats.kstest(made.numpy(), codes.cdf).statistic)
        row[0].plot(place, density, label=f"density {when}", ls="--" if when == "before" else "-")
        panel.hist(made, bins=40, range=(low, high), density=True, color="tab:purple", alpha=0.6)
        panel.plot(there, codes.pdf(there), color="black", lw=1)
        panel.set(title=f"{when}, to {base}: off by {distances[base, when]:.3f}", xlim=(low, high))
    row[3].hist(fits["after"].sample(4000, seed=1)["x"], bins=60, density=True, color="tab:green", alpha=0.6)
    row[3].set(title="codes drawn and taken back", xlim=(-6, 11))
    row[0].set(title="new data", xlim=(-6, 11))
    row[0].legend(frameon=False)
figure.savefig("before_and_after.png", dpi=100)
print({key: round(value, 4) for key, value in distances.items()}, "Kolmogorov-Smirnov distances of new codes")
for base in bases:
    assert quick or distances[base, "after"] < 0.06 < distances[base, "before"], f"{base}: training makes the codes"
