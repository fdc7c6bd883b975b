"""DCGAN and WGAN-GP of MNIST by the library and by a hand-written loop in PyTorch, at equal numbers of updates.

Samples are scored by the Frechet distance in the features of a named classifier: the 128 numbers before the scores of
``classifier()`` of the zoo, trained on the MNIST training images by the library at seed 0. ``--quick`` shortens all and
writes no results; ``--steps N`` changes the budget, ``--seeds N`` repeats both ways.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import softplus
from versions import table, write

import ppl_gen as pg
from ppl_gen.distances import frechet_distance
from ppl_gen.inference import SVI, Adversarial
from ppl_gen.models import ConvolutionalCritic, classifier, dcgan
from ppl_gen.models.adversarial.dcgan import Shades
from ppl_gen.nn.images import Writer

LATENT, FILTERS, BATCH, CRITIC_STEPS = 64, 32, 64, 5
NAME = "mnist-classifier (16, 32, 128), seed 0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, nothing written to results/")
    parser.add_argument(
        "--steps", type=int, default=1500, help="updates of the generator of DCGAN; WGAN-GP has a third"
    )
    parser.add_argument("--seeds", type=int, default=1, help="of each run")
    options = parser.parse_args()
    began, quick = time.perf_counter(), options.quick
    steps = {"DCGAN": 3 if quick else options.steps, "WGAN-GP": 2 if quick else options.steps // 3}
    train, test = (pg.load_data("mnist", split=split, images=True) for split in ("train", "test"))
    images = train["x"][: 500 if quick else None]
    features, accuracy = named_features(train, test, quick)
    count = 200 if quick else 5000
    real = features(test["x"][:count])
    samples: dict[str, Tensor] = {"test images": test["x"][:count]}
    lines = [["training images", "", "", f"{frechet_distance(features(images[:count]), real):.2f}"]]
    for game, updates in steps.items():
        for way, run in (("ppl_gen", by_library), ("PyTorch by hand", by_hand)):
            distances, start = [], time.perf_counter()
            for seed in range(options.seeds):
                made, how = run(game, images, updates, count, seed)
                distances.append(f"{frechet_distance(features(made), real):.2f}")
                samples.setdefault(f"{game}, {way}", made)
            seconds = (time.perf_counter() - start) / options.seeds
            lines.append([f"{game}, {way}", str(updates), f"{seconds:.0f} s{how}", ", ".join(distances)])
            print(*lines[-1], flush=True)
    noise = torch.rand(count, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    lines.append(["uniform noise", "", "", f"{frechet_distance(features(noise), real):.2f}"])
    if not quick:
        _written(lines, samples, accuracy, options.seeds, time.perf_counter() - began)


def named_features(train: Any, test: Any, quick: bool) -> tuple[Callable[[Tensor], Tensor], float]:
    """The inputs of the classifier's last layer, rows x 128; and its share of right test images."""
    data = {name: train[name][: 500 if quick else None] for name in ("x", "y")}
    fit = pg.fit(classifier(10), data, SVI(epochs=1 if quick else 2, batch_size=100, lr=1e-3), seed=0, progress=False)
    network = fit.module("network")
    last = [layer for layer in network.modules() if isinstance(layer, nn.Linear)][-1]
    seen: list[Tensor] = []
    last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))

    def features(x: Tensor) -> Tensor:
        seen.clear()
        with torch.no_grad():
            for part in x.split(500):
                network(part)
        return torch.cat(seen)

    with torch.no_grad():
        right = torch.cat([network(part).argmax(1) for part in test["x"].split(500)]) == test["y"]
    return features, float(right.float().mean())


def by_library(game: str, images: Tensor, steps: int, count: int, seed: int) -> tuple[Tensor, str]:
    objective = Adversarial(critic=critic_of(game, seed), **settings_of(game))
    algorithm = SVI(objective, steps=steps, batch_size=BATCH, optimiser=adam_of(game))
    fit = pg.fit(dcgan(latent=LATENT, filters=FILTERS), images, algorithm, seed=seed, progress=False)
    return fit.sample(count, seed=seed + 1)["x"], f" ({fit.cost['path']})"


def settings_of(game: str) -> dict[str, Any]:
    return {} if game == "DCGAN" else {"kind": "wasserstein", "penalty": "gradient", "critic_steps": CRITIC_STEPS}


def adam_of(game: str) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    # As published for DCGAN; the penalty was published with 1e-4 and tens of thousands of updates, which this is not.
    rate, betas = (2e-4, (0.5, 0.999)) if game == "DCGAN" else (5e-4, (0.5, 0.9))
    return lambda params: torch.optim.Adam(params, lr=rate, betas=betas, fused=True)


def critic_of(game: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return ConvolutionalCritic((1, 28, 28), filters=FILTERS, norm="batch" if game == "DCGAN" else "none")


def by_hand(game: str, images: Tensor, steps: int, count: int, seed: int) -> tuple[Tensor, str]:
    """The same networks, optimisers and numbers of updates, without programs, fits or the loop of the library."""
    critic = critic_of(game, seed)
    generator = nn.Sequential(Writer((1, 28, 28), FILTERS, LATENT), Shades(images))
    ours, theirs = (adam_of(game)(list(network.parameters())) for network in (generator, critic))
    rounds = 1 if game == "DCGAN" else CRITIC_STEPS
    for _ in range(steps):
        for _ in range(rounds):
            real = images[torch.randint(len(images), (BATCH,))]
            with torch.no_grad():
                fake = generator(torch.randn(BATCH, LATENT))
            loss = critic_loss(game, critic, real, fake)
            theirs.zero_grad()
            loss.backward()
            theirs.step()
        score = critic(generator(torch.randn(BATCH, LATENT)))
        loss = softplus(-score).mean() if game == "DCGAN" else -score.mean()
        ours.zero_grad()
        loss.backward()
        ours.step()
    with torch.no_grad():
        return torch.cat([generator.eval()(torch.randn(500, LATENT)) for _ in range(-(-count // 500))])[:count], ""


def critic_loss(game: str, critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    if game == "DCGAN":
        return softplus(-critic(real)).mean() + softplus(critic(fake)).mean()
    between = torch.lerp(fake, real, torch.rand(len(real), 1, 1, 1)).requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
    return critic(fake).mean() - critic(real).mean() + 10.0 * penalty


def _written(lines: list[list[str]], samples: dict[str, Tensor], accuracy: float, seeds: int, took: float) -> None:
    figure = Figure(figsize=(9, 1.1 * len(samples)), layout="constrained")
    for row, (name, images) in zip(figure.subplots(len(samples), 12), samples.items(), strict=True):
        for axis, image in zip(row, images, strict=False):
            axis.imshow(image[0], cmap="gray_r", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, fontsize=7, rotation=0, ha="right", va="center")
    figure.savefig(Path(__file__).parent / "results" / "gans.png", dpi=110)
    body = (
        "5000 samples against 5000 test images. The features are the 128 numbers before the scores of "
        f"{NAME} ({accuracy:.1%} of the test images right): no other figure is comparable, those of the "
        f"Inception network least of all. Batches of {BATCH}, generator and critic of {FILTERS} filters, {LATENT} "
        "numbers of noise; DCGAN by Adam (2e-4, betas 0.5 and 0.999), WGAN-GP by Adam (5e-4, betas 0.5 and 0.9) with "
        f"{CRITIC_STEPS} updates of the critic for each. A small budget ({seeds} seed(s)): a check that both ways "
        "arrive at the same place, not a record. Images are those of the first seed.\n\n"
        + table(["", "updates of the generator", "time of a run", "Frechet distance, by seed"], lines)
        + "\n\n![Samples](gans.png)\n"
    )
    write("gans", "Adversarial networks of MNIST", body, took)


if __name__ == "__main__":
    main()
