"""RealNVP and MAF on patches of photographs, against zuko's: held-out log-likelihood at equal size and equal training.

Partial results are kept as JSON in the folder given by ``--work``, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import torch
from stages import WORK
from versions import table, write

import ppl_gen as pg
from ppl_gen.inference import SVI
from ppl_gen.models import maf, real_nvp

_VALIDATE = torch.distributions.Distribution._validate_args
import zuko  # noqa: E402

# Importing it switches torch's validation off for the whole process: ours would then run without.
torch.distributions.Distribution.set_default_validate_args(_VALIDATE)

SIDE, STRIDE, BATCH, RATE = 8, 4, 256, 1e-3
STEPS, SEEDS = 1500, 2
FEATURES = SIDE * SIDE - 1
LAYERS = {"RealNVP": 6, "MAF": 5}
HIDDEN = {"RealNVP": (96, 96), "MAF": (96, 96)}

ABOUT = """
8 x 8 grey patches of the two photographs of scikit-learn, every fourth row and column. The left 60 % of each photograph
is for training, the next 20 % for validation, the right 20 % for the test; patches do not straddle the borders, so no
pixel is in two sets. As is usual for natural patches (Zoran and Weiss 2011; Uria et al. 2013): uniform noise makes the
256 levels continuous, values are divided by 256, the mean of each patch is taken away, and the last pixel, which the
other 63 then determine, is left out.

- Density of the 63 numbers in nats for each patch, with the standard error over the patches of the test set, the mean
  over seeds and the spread of the seeds; bits per dimension are -(nats / 63 - log 256) / log 2, for the 256 levels.
- Ours: `pg.fit(real_nvp(...), ...)` and `maf`, which standardise the columns inside. zuko's flows get columns that are
  standardised outside, and the change of units is added to their density.
- Hidden widths of zuko's are those of ours; where its networks have another number of outputs or inputs, so that sizes
  differ by more than 2 %, the script stops.
- Same batches' size, steps, optimiser (Adam, fused) and rate for all, one seed for each run's batches and weights. The
  weights of the last step count; validation chose nothing. Milliseconds are of processor time, set-up shared out.
- A Gaussian with a full covariance is the yardstick to beat. Each pixel is in four patches, so patches are
  not independent, and the standard errors, which take them to be, are too small.
"""


# ----------------------------------------------------------------------------------------------------------------- data


def patches():
    """Training, validation and test rows, N x 63; the noise has a fixed seed."""
    from sklearn.datasets import load_sample_images

    noise, sets = torch.Generator().manual_seed(0), ([], [], [])
    for image in load_sample_images().images:
        grey = torch.tensor(image, dtype=torch.float64) @ torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
        grey = grey.round()
        width = grey.shape[1]
        borders = [0, int(0.6 * width), int(0.8 * width), width]
        for part, left, right in zip(sets, borders[:-1], borders[1:], strict=True):
            cut = grey[:, left:right].unfold(0, SIDE, STRIDE).unfold(1, SIDE, STRIDE).reshape(-1, SIDE * SIDE)
            rows = (cut + torch.rand(cut.shape, generator=noise, dtype=torch.float64)) / 256
            part.append((rows - rows.mean(1, keepdim=True))[:, :-1])
    return [torch.cat(part).float() for part in sets]


def bits(nats):
    """Per dimension, of levels 1/256 wide."""
    return -(nats / FEATURES - math.log(256)) / math.log(2)


# ----------------------------------------------------------------------------------------------------------------- runs


def size(module):
    return sum(value.numel() for value in module.parameters())


def result(log_densities, validation, seconds, parameters):
    return {
        "nats": float(log_densities.double().mean()),
        "stderr": float(log_densities.double().std() / len(log_densities) ** 0.5),
        "validation": float(validation.double().mean()),
        "seconds": seconds,
        "parameters": parameters,
    }


def ours(kind, sets, steps, seed):
    train, validation, test = sets
    recipe = (real_nvp if kind == "RealNVP" else maf)(FEATURES, layers=LAYERS[kind], hidden=HIDDEN[kind])
    began = time.process_time()
    fit = pg.fit(recipe, train, SVI(steps=steps, batch_size=BATCH, lr=RATE), seed=seed)
    seconds = (time.process_time() - began) / steps
    rows = [fit.evidence(part).values for part in (test, validation)]
    return result(*rows, seconds, size(fit.module("flow")))


def theirs(kind, sets, steps, seed):
    train, validation, test = sets
    began = time.process_time()
    torch.manual_seed(seed)
    middle, spread = train.mean(0), train.std(0, correction=0)
    maker = zuko.flows.RealNVP if kind == "RealNVP" else zuko.flows.MAF
    flow = maker(FEATURES, transforms=LAYERS[kind], hidden_features=HIDDEN[kind])
    optimiser = torch.optim.Adam(flow.parameters(), lr=RATE, fused=True)
    rows, order = (train - middle) / spread, torch.tensor([], dtype=torch.long)
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(len(rows))
        picked, order = order[:BATCH], order[BATCH:]
        optimiser.zero_grad()
        (-flow().log_prob(rows[picked]).mean()).backward()
        optimiser.step()
    seconds = (time.process_time() - began) / steps
    with torch.no_grad():
        scored = [
            torch.cat([flow().log_prob((rows - middle) / spread) for rows in part.split(1000)]) - spread.log().sum()
            for part in (test, validation)
        ]
    return result(*scored, seconds, size(flow))


def gaussian(sets):
    train, validation, test = (part.double() for part in sets)
    normal = torch.distributions.MultivariateNormal(train.mean(0), torch.cov(train.T))
    parameters = FEATURES + FEATURES * (FEATURES + 1) // 2
    return result(normal.log_prob(test), normal.log_prob(validation), math.nan, parameters)


def runs(sets, steps, seeds, work):
    """Every run's result, from the folder where it is there already: (kind, who) -> one for each seed."""
    found = {}
    for seed in range(seeds):
        for kind in LAYERS:
            for who, run in (("ppl_gen", ours), ("zuko", theirs)):
                setting = f"{kind}-{LAYERS[kind]}-{'x'.join(map(str, HIDDEN[kind]))}-{who}-{steps}-{seed}"
                path = work / f"flows_patches-{setting}.json"
                if not path.exists():
                    path.write_text(json.dumps(run(kind, sets, steps, seed)))
                found.setdefault((kind, who), []).append(json.loads(path.read_text()))
                print(setting, found[kind, who][-1], flush=True)
    return found


# --------------------------------------------------------------------------------------------------------------- report


def row(name, results):
    nats = [one["nats"] for one in results]
    spread = f"{statistics.stdev(nats):.2f}" if len(nats) > 1 else "-"
    seconds = [1e3 * one["seconds"] for one in results]
    return [
        *name,
        f"{results[0]['parameters']}",
        f"{statistics.mean(nats):.2f} +- {results[0]['stderr']:.2f}",
        spread,
        f"{bits(statistics.mean(nats)):.3f}",
        f"{statistics.mean(one['validation'] for one in results):.2f}",
        "-" if math.isnan(seconds[0]) else f"{statistics.median(seconds):.1f}",
    ]


def check_sizes(found):
    for kind in LAYERS:
        a, b = (found[kind, who][0]["parameters"] for who in ("ppl_gen", "zuko"))
        if abs(a - b) > 0.02 * max(a, b):
            raise SystemExit(f"{kind}: {a} parameters here and {b} in zuko differ by more than 2 %")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=WORK, help="folder of partial results")
    parser.add_argument("--quick", action="store_true", help="30 steps, one seed, nothing written to results")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    steps, seeds = (30, 1) if arguments.quick else (STEPS, SEEDS)
    began, sets = time.perf_counter(), patches()
    found = runs(sets, steps, seeds, arguments.work)
    check_sizes(found)
    rows = [row(("full Gaussian", "closed form"), [gaussian(sets)])]
    rows += [row(key, results) for key, results in found.items()]
    head = ["flow", "of", "parameters", "test nats", "sd of seeds", "bits/dim", "validation nats", "ms per step"]
    said = (
        f"{len(sets[0])} patches for training, {len(sets[1])} for validation, {len(sets[2])} for the test. {steps} "
        f"steps of {BATCH} rows, Adam at {RATE}, {seeds} seed(s), float32, zuko {version('zuko')}. Layers: {LAYERS}; "
        f"hidden widths: {HIDDEN}."
    )
    body = f"{ABOUT.strip()}\n\n{said}\n\n{table(head, rows)}"
    if arguments.quick:
        print(body)
    else:
        spent = sum(steps * one["seconds"] for results in found.values() for one in results)
        write("flows_patches", "Flows on patches of photographs", body, max(spent, time.perf_counter() - began))


if __name__ == "__main__":
    main()
