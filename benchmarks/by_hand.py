"""Flows, diffusion and a Boltzmann machine of MNIST beside loops by hand in PyTorch: equal networks, updates and rates.

The loops have neither programs nor fits nor the library's objectives; networks are the library's, at equal starting
weights. Both sides are scored alike: flows and diffusion in bits per dimension (bounds), the machine by annealed
importance sampling. Stops and goes on. ``--quick`` shortens all and writes no results; ``--seeds N`` repeats all.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from stages import WORK, recorded
from torch import Tensor, nn
from versions import table, write

import ppl_gen as pg
from ppl_gen.inference import ELBO, SVI, ContrastiveDivergence
from ppl_gen.models import bits_per_dimension, denoising_diffusion, nice, rbm, real_nvp
from ppl_gen.models.diffusion.chain import Diffusion
from ppl_gen.models.diffusion.noising import noise_schedule
from ppl_gen.models.energy.rbm import machine_program

PIXELS, LEVELS, BATCH = 28 * 28, 256, 64
STILL = 1e-30  # a rate that moves no parameter
Answer = tuple[str, float]  # a score in words, and the seconds of training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, nothing written to results/")
    parser.add_argument("--seeds", type=int, default=1, help="of each run")
    options = parser.parse_args()
    began, lines = time.perf_counter(), []
    train, test = (pg.load_data("mnist", split=split, images=True)["x"] for split in ("train", "test"))
    test = test[:: 1000 if options.quick else 20]
    if options.quick:
        train = train[:500]
    flat = nice(PIXELS, layers=4, hidden=(500, 500, 500), levels=LEVELS)
    images = real_nvp((1, 28, 28), channels=16, blocks=1, levels=LEVELS)
    runs: dict[str, tuple[int, Callable[[int, int], tuple[Answer, Answer]]]] = {
        "NICE": (1500, lambda n, s: _flows(flat, train.flatten(1), test.flatten(1), n, s)),
        "RealNVP": (300, lambda n, s: _flows(images, train, test, n, s)),
        "diffusion, bound": (300, lambda n, s: _diffusions(train, test, n, s)),
        "Boltzmann machine, 500 hidden": (5000, lambda n, s: _machines(options.quick, n, s)),
    }
    for name, (updates, run) in runs.items():
        for seed in range(options.seeds):

            def line(
                run: Any = run, updates: int = 4 if options.quick else updates, seed: int = seed
            ) -> dict[str, Any]:
                ours, by_hand = run(updates, seed)
                times = [f"{seconds:.0f} s" for _, seconds in (ours, by_hand)]
                return {"cells": [ours[0], by_hand[0], *times, f"{ours[1] / by_hand[1]:.2f}"]}

            folder = WORK / ("by_hand-quick" if options.quick else "by_hand")
            found = recorded(folder / f"{name.split()[0]}-{updates}-{seed}.json", line)
            lines.append([name, str(updates), str(seed), *found["cells"]])
            print(*lines[-1], sep=" | ", flush=True)
    if not options.quick:
        _written(lines, len(test), time.perf_counter() - began)


def _batches(rows: Tensor, updates: int, size: int) -> Iterator[Tensor]:
    """Shuffled passes over the rows."""
    while True:
        for part in torch.randperm(len(rows)).split(size):
            if updates == 0:
                return
            updates -= 1
            yield rows[part]


def _begun(recipe: Any, rows: Any, network: str, seed: int, objective: Any = None) -> nn.Module:
    """The library's network at its first weights, to be trained by hand."""
    still = SVI(objective or ELBO(), steps=1, lr=STILL, batch_size=min(BATCH, len(rows)))
    fit = pg.fit(recipe, rows, still, seed=seed, progress=False)
    return copy.deepcopy(fit.module(network)).requires_grad_(True).train()


def _within(x: Tensor) -> Tensor:
    """Grey levels with noise that fills their intervals."""
    return ((x * (LEVELS - 1)).round() + torch.rand_like(x)) / LEVELS


def _bits(log_density: Tensor) -> str:
    """Of the levels, from the density of what lies under them."""
    bits = math.log2(LEVELS) - log_density.double() / (PIXELS * math.log(2))
    return f"{float(bits.mean()):.3f} +- {float(bits.std()) / math.sqrt(len(bits)):.3f}"


def _flows(recipe: Any, train: Tensor, test: Tensor, updates: int, seed: int) -> tuple[Answer, Answer]:
    fit = pg.fit(recipe, train, SVI(steps=updates, batch_size=BATCH, lr=1e-3), seed=seed, progress=False)
    found = fit.evidence(test, particles=1, seed=seed)
    said = f"{bits_per_dimension(found, PIXELS):.3f} +- {bits_per_dimension(-found.stderr, PIXELS):.3f}"
    flow: Any = _begun(recipe, train, "flow", seed)
    torch.manual_seed(seed)
    began = time.perf_counter()
    adam = torch.optim.Adam(flow.parameters(), lr=1e-3, fused=True)
    for x in _batches(train, updates, BATCH):
        loss = -flow.log_prob(_within(x)).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    seconds = time.perf_counter() - began
    with torch.no_grad():
        flow.eval()
        density = torch.cat([flow.log_prob(_within(part)) for part in test.split(100)])
    return (said, float(fit.cost["seconds"])), (_bits(density), seconds)


def _diffusions(train: Tensor, test: Tensor, updates: int, seed: int) -> tuple[Answer, Answer]:
    steps = 50
    recipe, torch_seed = denoising_diffusion(steps=steps, hidden=16), torch.Generator().manual_seed(seed)
    train, test = (((x * 255).round() + torch.rand(x.shape, generator=torch_seed)) / LEVELS for x in (train, test))

    def scored(fit: pg.Fit) -> str:
        found = fit.evidence(test, particles=1, chunk=100, seed=seed)
        bits = bits_per_dimension(found, PIXELS, levels=LEVELS)
        return f"{bits:.3f} +- {bits_per_dimension(found.mean - found.stderr, PIXELS, levels=LEVELS) - bits:.3f}"

    fit = pg.fit(recipe, train, SVI(steps=updates, batch_size=BATCH, lr=1e-3), seed=seed, progress=False)
    network: Any = _begun(recipe, train, "denoiser", seed)
    torch.manual_seed(seed)
    began = time.perf_counter()
    loc, scale = train.mean(), train.std()
    betas = noise_schedule("linear", steps).betas.to(train)
    kept = torch.cat([torch.ones(1), (1 - betas).cumprod(0)])  # abar_0, ..., abar_T
    adam = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    for x in _batches(train, updates, BATCH):
        start, t = (x - loc) / scale, torch.randint(1, steps + 1, (len(x), 1, 1, 1))
        state = kept[t].sqrt() * start + (1 - kept[t]).sqrt() * torch.randn_like(start)
        mean, width = network(state, t.flatten())
        beta, now, before = betas[t - 1], kept[t], kept[t - 1]
        target = (before.sqrt() * beta * start + (1 - beta).sqrt() * (1 - before) * state) / (1 - now)
        left = beta * (1 - before) / (1 - now)  # zero at t = 1, where the target is x_0 itself
        loss = steps * (width.log() + (left + (target - mean).square()) / (2 * width.square())).sum((1, 2, 3)).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    seconds = time.perf_counter() - began
    shape = train[0].shape
    units = loc.double().expand(shape).contiguous(), scale.double().expand(shape).contiguous()
    program = Diffusion(noise_schedule("linear", steps), network, *units).program("by hand")
    hand = pg.fit(program, train, SVI(steps=1, lr=STILL, batch_size=BATCH), seed=seed, progress=False)
    return (scored(fit), float(fit.cost["seconds"])), (scored(hand), seconds)


def _machines(quick: bool, updates: int, seed: int) -> tuple[Answer, Answer]:
    train = pg.load_data("mnist", split="train", binarize="dynamic")
    test = pg.load_data("mnist", split="test", binarize="fixed")["x"][:: 100 if quick else 1]
    grey, hidden, rate, chains = train["x"], 20 if quick else 500, 0.1, 100
    method = pg.AIS(temperatures=100 if quick else 10_000, chains=10 if quick else 100)

    def scored(fit: pg.Fit) -> str:
        found = fit.evidence(test, method=method, seed=seed)
        assert found.log_partition is not None
        return f"{found.mean:.2f} +- {found.stderr:.2f} ({found.log_partition.doubt or 'no doubt'})"

    def line(optimiser: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.001, total_iters=updates)

    objective = ContrastiveDivergence(persistent=True, chains=chains)
    sgd = SVI(objective, steps=updates, batch_size=chains, lr=rate, optimiser="sgd", schedule=line)
    fit = pg.fit(rbm(hidden=hidden), train, sgd, seed=seed, progress=False)
    machine: Any = copy.deepcopy(
        pg.fit(rbm(hidden=hidden), train, SVI(objective, steps=1, lr=STILL), seed=seed).module("machine")
    )
    torch.manual_seed(seed)
    began = time.perf_counter()
    with torch.no_grad():
        weight, below, above = (p.detach().clone() for p in (machine.weight, machine.visible_bias, machine.hidden_bias))
        fantasy = torch.rand(chains, PIXELS).lt(next(_batches(grey, 1, chains))).float()  # chains begin at rows
        for step, x in enumerate(_batches(grey, updates, chains)):
            seen = (torch.rand_like(x) < x).float()
            hears = (fantasy @ weight + above).sigmoid()
            fantasy = ((torch.rand_like(hears) < hears).float() @ weight.T + below).sigmoid()
            fantasy = (torch.rand_like(fantasy) < fantasy).float()
            on, off = (seen @ weight + above).sigmoid(), (fantasy @ weight + above).sigmoid()
            now = rate * (1 + (0.001 - 1) * step / updates)
            weight += now * (seen.T @ on - fantasy.T @ off) / chains
            below += now * (seen - fantasy).mean(0)
            above += now * (on.mean(0) - off.mean(0))
        seconds = time.perf_counter() - began
        for parameter, value in ((machine.weight, weight), (machine.visible_bias, below), (machine.hidden_bias, above)):
            parameter.copy_(value)
    program = machine_program(machine, 1000, exact=False, name="by hand")
    hand = pg.fit(program, train, SVI(objective, steps=1, lr=STILL), seed=seed, progress=False)
    return (scored(fit), float(fit.cost["seconds"])), (scored(hand), seconds)


def _written(lines: list[list[str]], images: int, took: float) -> None:
    head = ["", "updates", "seed", "ppl_gen", "by hand", "time, ppl_gen", "time, by hand", "ratio"]
    body = (
        f"Flows and diffusion in bits per dimension of {images} test images (bounds, one draw each; lower is better), "
        f"by Adam at 1e-3 on batches of {BATCH}; the machine in nats of all test images by 10000 temperatures and 100 "
        "chains each way, by persistent chains and SGD that falls from 0.1 to zero. Networks begin at equal weights; "
        "batches and noise are each side's own, the library spreads the time steps of a batch evenly where the loop "
        "draws each by itself, and the errors do not include what another seed would do. Seconds are of "
        "training alone, recording and compiling included, on a machine with other work: they are no benchmark of "
        "speed ([bench.md](bench.md) is).\n\n" + table(head, lines)
    )
    write("by_hand", "Beside loops by hand", body, took)


if __name__ == "__main__":
    main()
