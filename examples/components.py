"""Principal components and factors of the digits: what they look like, and the pixels they fill in."""

import os

import torch
from matplotlib.figure import Figure

import ppl_gen as pg
from ppl_gen.inference import EM
from ppl_gen.models import factor_analysis, ppca, reconstructions

quick = bool(os.environ.get("PPL_GEN_QUICK"))
x = pg.load_data("digits")["x"].double()
x = (x + 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))[: 300 if quick else None]
train, test = x[::2], x[1::2]

# More components always fit the training rows better; held-out evidence says what each adds to rows not seen.
sizes = (2, 10) if quick else (1, 2, 5, 10, 15, 20, 30, 40)
algorithm = EM(steps=30 if quick else 300, tolerance=0.01)
evidence = {"PPCA": [], "factor analysis": []}
for latent in sizes:
    evidence["PPCA"].append(pg.fit(ppca(latent=latent, start="principal"), train, algorithm, seed=0).evidence(test))
    evidence["factor analysis"].append(pg.fit(factor_analysis(latent=latent), train, algorithm, seed=0).evidence(test))

# Half of the pixels of half of the rows are hidden, from the fit too.
seen = (
    torch.rand(train.shape, generator=torch.Generator().manual_seed(1)) > 0.5 * (torch.arange(len(train)) % 2)[:, None]
)
gaps = {"x": torch.where(seen, train, 0.0), "mask": seen}
fit = pg.fit(ppca(latent=10), gaps, algorithm, seed=0)
filled = torch.where(seen, train, reconstructions(fit, gaps, draws=50))
known = (train * seen).sum(0) / seen.sum(0)  # the mean of each pixel, the plainest filler
error = {"mean": known.expand_as(train), "PPCA": filled}
print(fit)
for name, guess in error.items():
    error[name] = float((guess - train)[~seen].square().mean().sqrt())
    print(f"{name}: root mean square error of the hidden pixels {error[name]:.3f}")
for name, found in evidence.items():
    print(name, {latent: round(e.mean, 2) for latent, e in zip(sizes, found, strict=True)})

figure = Figure(figsize=(11, 5), layout="constrained")
left, right = figure.subfigures(1, 2, width_ratios=(1, 1.2))
panel = left.subplots()
for name, found in evidence.items():
    panel.errorbar(sizes, [e.mean for e in found], [e.stderr for e in found], marker="o", capsize=3, label=name)
panel.set(xlabel="latent dimensions", ylabel="nats per held-out row", title="Held-out evidence of digits")
panel.legend()
loadings = fit.posterior(draws=1)["loadings"][0]
directions = torch.linalg.svd(loadings, full_matrices=False)[0].T
shown = {
    "components": directions[:8],
    "rows": train[1:16:2],
    "seen": (train * seen)[1:16:2],
    "filled in": filled[1:16:2],
}
for row, (title, images) in zip(right.subplots(4, 8), shown.items(), strict=True):
    limit = float(images.abs().max())
    for axis, image in zip(row, images, strict=True):
        colours = {"cmap": "RdBu", "vmin": -limit, "vmax": limit} if title == "components" else {"cmap": "gray_r"}
        axis.imshow(image.reshape(8, 8), **colours)
        axis.set(xticks=[], yticks=[])
    row[0].set_ylabel(title)
figure.savefig("components.png", dpi=120)
assert error["PPCA"] < 0.85 * error["mean"], "the components fill in hidden pixels better than the means do"
means = {name: [e.mean for e in found] for name, found in evidence.items()}
above = [factors > components for factors, components in zip(means["factor analysis"], means["PPCA"], strict=True)]
assert quick or all(above), "a noise variance for each pixel predicts better than one for all"
for found in means.values():
    first, last = (found[1] - found[0]) / (sizes[1] - sizes[0]), (found[-1] - found[-2]) / (sizes[-1] - sizes[-2])
    assert quick or 0 < last < first / 4, "each further component adds less to rows that were held out"
