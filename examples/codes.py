"""Autoencoder codes of digits: clusters, reconstructions, compression, and rows that are strange."""

import os

import torch
from matplotlib.figure import Figure
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

import ppl_gen as pg
from ppl_gen.inference import SVI
from ppl_gen.models import anomaly_scores, autoencoder, codes, reconstructions

quick = bool(os.environ.get("PPL_GEN_QUICK"))
digits = pg.load_data("digits", images=True)
train, test, labels = digits["x"][:1400], digits["x"][1400:], digits["y"][1400:]
algorithm = SVI(epochs=2 if quick else 100, batch_size=128, lr=2e-3)

variants = {
    "convolutional": {"kind": "convolutional"},
    "denoising": {"corruption": 0.3},
    "3-sparse": {"top_k": 3},
}
fits = {name: pg.fit(autoencoder(code=10, **more), train, algorithm, seed=0) for name, more in variants.items()}
variance = float((test - train.mean(0)).square().mean())
kept, agreement = {}, {}
for name, fit in fits.items():
    error = float((reconstructions(fit, test) - test).square().mean())
    groups = KMeans(10, n_init=5, random_state=0).fit_predict(codes(fit, test))
    agreement[name] = adjusted_rand_score(labels, groups)
    size = "3 of 10 numbers" if name == "3-sparse" else "10 numbers"
    kept[name] = 1 - error / variance
    shown = f"64 pixels in {size}, {kept[name]:.0%} of the variance kept"
    print(f"{name}: {shown}; clusters and labels agree by {agreement[name]:.2f}")

fit = fits["convolutional"]
strange = test[:200].flip(-1)  # digits in a mirror
scores = {"digits": anomaly_scores(fit, test), "mirrored digits": anomaly_scores(fit, strange)}
z = codes(fit, test)
flat = (z - z.mean(0)) @ torch.linalg.svd(z - z.mean(0), full_matrices=False)[2][:2].T

figure = Figure(figsize=(13, 4), layout="constrained")
left, middle, right = figure.subfigures(1, 3)
panel = left.subplots()
panel.scatter(*flat.T, c=labels, cmap="tab10", s=8)
panel.set(title="Two principal axes of the codes, by label", xticks=[], yticks=[])
rows = [test[:8], *(reconstructions(fit, test[:8]) for fit in fits.values())]
for row, images, title in zip(middle.subplots(4, 8), rows, ["rows", *fits], strict=True):
    for axis, image in zip(row, images, strict=True):
        axis.imshow(image[0], cmap="gray_r", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
    row[0].set_ylabel(title, fontsize=7)
panel = right.subplots()
edges = torch.linspace(*(float(v) for v in torch.cat([*scores.values()]).quantile(torch.tensor([0.0, 0.995]))), 40)
for name, values in scores.items():
    panel.hist(values, edges, alpha=0.6, density=True, label=name)
panel.set(title="Anomaly scores", xlabel="-log p(x | code) in nats", yticks=[])
panel.legend()
figure.savefig("codes.png", dpi=120)
if not quick:
    assert kept["convolutional"] > 0.7 and kept["denoising"] > 0.7, "ten numbers keep most of the variance"
    assert agreement["convolutional"] > 0.4, "clusters of codes are classes of digits"
    assert scores["mirrored digits"].mean() > scores["digits"].mean(), "strange rows score higher"
