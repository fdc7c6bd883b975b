"""Adversarial networks of images: four families on digits, scored in the features of a classifier."""

import os

import torch
from matplotlib.figure import Figure
from torch import nn

import ppl_gen as pg
from ppl_gen.distances import frechet_distance
from ppl_gen.inference import EBGAN, SVI, Adversarial, ConditionalAdversarial
from ppl_gen.models import classifier, dcgan, gran, lapgan

quick = bool(os.environ.get("PPL_GEN_QUICK"))
numbers = torch.Generator().manual_seed(0)
digits = pg.load_data("digits", images=True)
parts = [300, 100] if quick else [1200, 597]
order = torch.randperm(len(digits["x"]), generator=numbers)
train, held_out = (
    {name: digits[name][rows] for name in ("x", "y")} for rows in order[: 400 if quick else None].split(parts)
)
count = len(held_out["x"])


def played(recipe, objective, steps):
    steps = 2 if quick else steps
    return pg.fit(recipe, train, SVI(objective, steps=steps, batch_size=64), seed=0)


# All at their defaults.
fits = {
    "DCGAN": played(dcgan(), Adversarial(), 3000),
    "LAPGAN": played(lapgan(filters=16), ConditionalAdversarial(), 3000),
    "GRAN": played(gran(), Adversarial(), 2000),
    "EBGAN": played(dcgan(), EBGAN(), 2500),
}
samples = {name: fit.sample(count, seed=1) for name, fit in fits.items()}
columns = train["x"].flatten(1)
each = torch.randint(len(columns), (count, columns.shape[1]), generator=numbers)
images = {
    "held-out": held_out["x"],
    **{name: drawn["x"].detach() for name, drawn in samples.items()},
    "training": train["x"][:count],
    "independent pixels": columns.gather(0, each).reshape(count, 1, 8, 8),  # each of another training digit
    "uniform noise": torch.rand(count, 1, 8, 8, generator=numbers),
}

judge = pg.fit(classifier(10), train, SVI(epochs=1 if quick else 30, batch_size=100, lr=1e-3), seed=0)
network, seen = judge.module("network"), []
last = [layer for layer in network.modules() if isinstance(layer, nn.Linear)][-1]
last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
with torch.no_grad():
    scores = {name: network(rows).softmax(1) for name, rows in images.items()}
features = dict(zip(images, seen, strict=True))
right = float((scores["held-out"].argmax(1) == held_out["y"]).float().mean())
print(f"the judge reads {right:.0%} of {count} held-out digits; Frechet distance in its {last.in_features} features:")
distance = {name: frechet_distance(of, features["held-out"]) for name, of in features.items() if name != "held-out"}
for name, value in distance.items():
    shares = scores[name].mean(0)
    sure = float(scores[name].max(1).values.mean())
    print(f"  {name}: {value:.1f}; the judge's mean certainty {sure:.0%}, its rarest digit {float(shares.min()):.1%}")
for name, fit in fits.items():
    print(f"{name}: {fit.verdict}")

# What each family makes on the way: coarse images and what they lack; the strokes of three canvases, added up.
pyramid, strokes = samples["LAPGAN"], fits["GRAN"].module("generator").canvases(samples["GRAN"]["z"]).detach()
rows = {
    "data, held out": images["held-out"],
    **{f"{name}\n{distance[name]:.0f}": images[name] for name in ("DCGAN", "EBGAN")},
    "LAPGAN: coarse": pyramid["coarse"].detach(),
    f"LAPGAN\n{distance['LAPGAN']:.0f}": images["LAPGAN"],
    **{f"GRAN: {t} of {len(strokes)}": strokes[:t].sum(0).mul(2).sigmoid() for t in range(1, len(strokes))},
    f"GRAN\n{distance['GRAN']:.0f}": images["GRAN"],
    f"independent pixels\n{distance['independent pixels']:.0f}": images["independent pixels"],
}
figure = Figure(figsize=(9.5, 0.62 * len(rows) + 0.4), layout="constrained")
for axis, (name, shown) in zip(figure.subplots(len(rows)), rows.items(), strict=True):
    large = nn.functional.interpolate(shown[:16], size=40)[:, 0]  # of one size, whatever the scale of a pyramid
    axis.imshow(torch.cat(list(nn.functional.pad(large, (3, 0), value=0.4)), 1), cmap="gray_r", vmin=0, vmax=1)
    axis.set(xticks=[], yticks=[])
    axis.set_ylabel(name, fontsize=8, rotation=0, ha="right", va="center")
figure.suptitle(
    "Digits by four games, and their Frechet distance from held-out ones in a classifier's features", fontsize=9
)
figure.savefig("image_games.png", dpi=110)
if not quick:
    assert right > 0.95, "the judge knows digits"
    for name in fits:
        assert distance[name] < distance["independent pixels"] / 2, "nearer to digits than their pixels alone"
        assert float(scores[name].mean(0).min()) > 0.01, "and every digit is made"
