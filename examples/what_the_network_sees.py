"""What a network sees: filters, saliency, deconvolution, occlusion, best pictures, adversarial digits, neighbours."""

import os

import torch
from matplotlib.figure import Figure

import ppl_gen as pg
from ppl_gen.inference import SVI
from ppl_gen.looking import (
    activation_maximisation,
    adversarial_example,
    deconvnet,
    embed_layers,
    filters,
    guided_backprop,
    nearest_images,
    occlusion,
    saliency,
    top_patches,
)
from ppl_gen.models import classifier

quick = bool(os.environ.get("PPL_GEN_QUICK"))
try:
    data = pg.load_data("mnist", images=True)
except (FileNotFoundError, ImportError):
    data = pg.load_data("digits", images=True)  # 8 x 8 pixels, from scikit-learn
rows = min(1000 if quick else 8000, len(data["x"]) - 400)
train = {name: value[:rows] for name, value in data.items()}
x, y = data["x"][-400:], data["y"][-400:]
side = x.shape[-1]

# A program like any other: p(y | x), learned by maximum likelihood.
fit = pg.fit(classifier(), train, SVI(epochs=2 if quick else 6 if side > 8 else 40, batch_size=100, lr=2e-3), seed=0)
network = fit.module("network")
right = network(x).argmax(1) == y
print(f"{right.double().mean():.1%} of 400 held-out digits are right")

# Where the score comes from: how much of each map lies on the strokes, beside what an even map would have.
shown = torch.stack([(right & (y == k)).nonzero()[0, 0] for k in range(10)])
maps = {
    "saliency": saliency(network, x, y),
    "deconvnet": deconvnet(network, x, y).abs().amax(1),
    "guided": guided_backprop(network, x, y).abs().amax(1),
    "occlusion": occlusion(network, x[:100], y[:100], size=max(2, side // 7), grey=0.0).clamp(min=0),
}
box = torch.zeros(len(x), side, side, dtype=torch.bool)  # the smallest box around each digit
for row, image in enumerate(x[:, 0] > 0.3):
    lines, columns = image.nonzero(as_tuple=True)
    box[row, lines.min() : lines.max() + 1, columns.min() : columns.max() + 1] = True
share = {name: float((m * box[: len(m)]).sum() / m.sum()) for name, m in maps.items()}
chance = float(box.double().mean())
print(f"inside the digit's box ({chance:.0%} of the pixels):", {k: f"{v:.0%}" for k, v in share.items()})

# Small changes after which a digit is called the next one, beside noise of the same size.
few = shown[: 3 if quick else 10]
fooled = adversarial_example(network, x[few], (y[few] + 1) % 10)
noise = torch.randn(50, *fooled.change.shape, generator=torch.Generator().manual_seed(0))
noise *= (fooled.norm / noise.flatten(2).norm(dim=2)).view(50, len(few), 1, 1, 1)
unmoved = (network((x[few] + noise).flatten(0, 1)).argmax(1).view(50, -1) == y[few]).double().mean()
print(fooled, f"beside digits of norm {float(x[few].flatten(1).norm(dim=1).median()):.3g};")
print(f"noise of the same norm leaves {unmoved:.1%} as they are")

# Alike to the network, alike pixel by pixel.
near = nearest_images(network, x, train["x"])
agree = {
    name: float((train["y"][found] == y.unsqueeze(1)).double().mean())
    for name, found in (("layer", near.by_layer), ("pixels", near.by_pixels))
}
print("six nearest training digits of the same class:", {k: f"{v:.1%}" for k, v in agree.items()})
names = [name for name, part in network.named_modules() if isinstance(part, torch.nn.Linear | torch.nn.Conv2d)]
seen = embed_layers(network, x, "tsne", layers=[names[-1]])
for name, found in seen.items():
    print(f"{name}: {found}")

best = activation_maximisation(network, x.shape[1:], range(10), penalty=0.05, low=0.0, high=1.0)
patches = [top_patches(network, train["x"][:1000], channel, names[1]) for channel in range(4)]

figure = Figure(figsize=(15, 8), layout="constrained")
left, middle, right_side = figure.subfigures(1, 3, width_ratios=(1.25, 0.9, 1))


def pictures(part, down, across, images, title, cmap="gray_r"):
    part.suptitle(title, x=0.01, ha="left", fontsize=9)
    for axis, image in zip(part.subplots(down, across, squeeze=False).flat, images, strict=True):
        axis.set_axis_off()
        most = image.abs().max()
        axis.imshow(image, cmap=cmap, **({"vmin": -most, "vmax": most} if cmap == "RdBu_r" else {}))


hidden = occlusion(network, x[shown], y[shown], size=max(2, side // 7), grey=0.0)
lines = [
    (x[shown, 0], "Held-out digits", "gray_r"),
    (maps["saliency"][shown], "Saliency: the gradient of the score", "gray_r"),
    (deconvnet(network, x[shown], y[shown])[:, 0], "Deconvolutional network", "RdBu_r"),
    (guided_backprop(network, x[shown], y[shown])[:, 0], "Guided backpropagation", "RdBu_r"),
    (hidden, "Occlusion: what a square takes from the score", "RdBu_r"),
    (best[:, 0], "Pictures of the largest scores", "gray_r"),
    (fooled.x[:, 0], "Taken for the next digit", "gray_r"),
    (fooled.change[:, 0], "What was added", "RdBu_r"),
]
for part, (images, title, cmap) in zip(left.subfigures(8, 1), lines, strict=True):
    pictures(part, 1, len(images), images, title, cmap)
top, below = middle.subfigures(2, 1)
pictures(top, 4, 4, filters(network)[:, 0], "Filters of the first layer", "RdBu_r")
found = torch.cat([one.patches[:, 0].nan_to_num(0.0) for one in patches])
pictures(below, 4, 9, found, "Top patches of four channels of the second layer")
top, below = right_side.subfigures(2, 1)
for axis, (name, found) in zip(top.subplots(1, 2), seen.items(), strict=True):
    axis.scatter(*found.points.T, c=y, cmap="tab10", s=6)
    title = "t-SNE of the pixels" if name == "x" else "t-SNE of the scores"
    axis.set_title(f"{title}\ntrustworthiness {found.scores['trustworthiness']:.3f}", fontsize=8, loc="left")
    axis.set(xticks=[], yticks=[])
asked = (train["y"][near.by_pixels] != y.unsqueeze(1)).sum(1).topk(3).indices  # where pixels mislead most
both = [index for row in asked for index in (near.by_layer[row], near.by_pixels[row])]
images = [
    image for row, index in zip(asked.repeat_interleave(2), both, strict=True) for image in (x[row], *train["x"][index])
]
pictures(
    below, 6, 7, [image[0] for image in images], "Three digits, and the nearest by the last layer; below, by pixels"
)
figure.savefig("what_the_network_sees.png", dpi=120)

if not quick:
    assert right.double().mean() > 0.9, "it has learned to read"
    assert all(value > 1.15 * chance for value in share.values()), "scores depend on the digit more than on its margin"
    assert fooled.fooled.all() and unmoved > 0.9, "another digit by a change that is harmless in other directions"
    assert fooled.norm.median() < 0.4 * x[few].flatten(1).norm(dim=1).median(), "and small"
    # On 8 x 8 pixels classes lie together as they are.
    assert side == 8 or agree["layer"] > agree["pixels"], "the last layer knows what is alike"
