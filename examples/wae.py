"""Wasserstein autoencoders: one program of digits by its bound and by matched codes of two numbers."""

import os

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from torch.distributions import Normal

import ppl_gen as pg
from ppl_gen.distances import mmd
from ppl_gen.inference import ELBO, SVI, WAE
from ppl_gen.models import vae

quick = bool(os.environ.get("PPL_GEN_QUICK"))
digits = pg.load_data("digits")
train, test, labels = digits["x"][:1400].float(), digits["x"][1400:].float(), digits["y"][1400:]
program = vae(latent=2, hidden=(256, 128), activation="relu", scale=0.6)
objectives = {"ELBO": ELBO(), "WAE by MMD": WAE("mmd", weight=50.0), "WAE by a critic": WAE("gan", weight=1.0)}
fits = {
    name: pg.fit(program, train, SVI(objective, steps=20 if quick else 2000, batch_size=200, lr=1e-3), seed=0)
    for name, objective in objectives.items()
}

torch.manual_seed(0)
prior = torch.randn(len(test), 2)
balls, made, found = {}, {}, {}
for name, fit in fits.items():
    with torch.no_grad():
        q = fit.module("encoder")(test)
        z, loc, scale = q.sample(), q.mean, q.stddev
        made[name] = fit.module("decoder")(z).mean
        # Of the balls of all rows, those that explain the code of one: many where balls overlap.
        log_each = Normal(loc, scale).log_prob(z[:, None]).sum(-1)
    share = log_each.softmax(1)
    found[name] = {
        "rows": float((1 / share.square().sum(1)).mean()),
        "error": float((made[name] - test).square().sum(1).mean()),
        "mmd": float(mmd(z, prior)),
    }
    balls[name] = loc, scale
    row = found[name]
    print(f"{name}: squared error {row['error']:.2f}, {row['rows']:.1f} balls at a code, discrepancy {row['mmd']:.4f}")
    print(f"  evidence {fit.evidence(test, particles=200).mean:.1f} nats; {fit.diagnose().attrs['verdict']}")

figure = Figure(figsize=(12, 7.5), layout="constrained")
top, bottom = figure.subfigures(2, 1, height_ratios=(2, 1))
for axes, (name, (loc, scale)) in zip(top.subplots(1, 3), balls.items(), strict=True):
    for centre, width, label in zip(loc.tolist(), scale.tolist(), labels.tolist(), strict=True):
        axes.add_patch(Ellipse(centre, 4 * width[0], 4 * width[1], color=f"C{label}", alpha=0.25, linewidth=0))
    axes.scatter(*loc.T, c=[f"C{label}" for label in labels.tolist()], s=4, edgecolors="black", linewidths=0.2)
    axes.set(title=f"{name}: {found[name]['rows']:.1f} balls at a code", xlim=(-3.5, 3.5), ylim=(-3.5, 3.5))
    axes.set_aspect("equal")
top.suptitle("Codes of held-out digits by class: balls of two standard deviations", fontsize=10)
grid = bottom.subplots(4, 20)
for line, (name, images) in zip(grid, {"rows": test, **made}.items(), strict=True):
    for axis, image in zip(line, images[:20], strict=True):
        axis.imshow(image.reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
    error = "" if name == "rows" else f"\n{found[name]['error']:.2f}"
    line[0].set_ylabel(f"{name}{error}", fontsize=7, rotation=0, ha="right", va="center")
figure.savefig("wae.png", dpi=110)
if not quick:
    for name in ("WAE by MMD", "WAE by a critic"):
        assert found[name]["rows"] < 0.5 * found["ELBO"]["rows"], "balls of the bound overlap, matched ones do not"
        assert found[name]["error"] < found["ELBO"]["error"], "and reconstruct better"
        assert found[name]["mmd"] < 0.05, "codes all together are near the prior"
