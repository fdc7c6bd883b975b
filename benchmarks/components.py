"""What linear components and hidden Markov chains cost, beside scikit-learn: whole fits, iterations, series.

PPL_GEN_DATA=... .venv/bin/python benchmarks/components.py

Rows are MNIST's where `PPL_GEN_DATA` has it, else images of the same shape drawn at random. Blocks of each kind take
turns. `--quick` takes few rows and writes nothing.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from timing import Ends, Result, alternate, run
from torch import Tensor

import ppl_gen as pg
from ppl_gen.inference import EM
from ppl_gen.models import factor_analysis, ppca
from ppl_gen.models.sequences.forward import expectations, pays

LATENT = 50


def images(quick: bool) -> tuple[Tensor, str]:
    """Rows x 784 in float32, and what they are."""
    try:
        x, name = pg.load_data("mnist")["x"], "MNIST"
    except (ValueError, FileNotFoundError, ImportError, OSError):
        generator = torch.Generator().manual_seed(0)
        codes = torch.randn(60_000, 30, generator=generator) @ torch.randn(30, 784, generator=generator)
        x, name = torch.sigmoid(codes + torch.randn(60_000, 784, generator=generator)), "random images"
    return torch.as_tensor(x)[: 3000 if quick else None].contiguous(), name


class Timed(Ends, EM):
    """With the time of each step."""


def iteration(recipe: pg.Recipe, data: Any, steps: int = 6) -> Callable[[], float]:
    """A whole fit; the seconds of one of its iterations."""

    def call() -> float:
        Timed.ends.clear()
        pg.fit(recipe, data, Timed(steps=steps + 1, tolerance=0.0), seed=0, progress=False)
        return (Timed.ends[-1] - Timed.ends[0]) / (len(Timed.ends) - 1)

    return call


def principal(x: Tensor, title: str, blocks: int) -> Result:
    """PPCA by EM(), from data to a converged fit, and scikit-learn's solvers."""
    from sklearn.decomposition import PCA

    double = x.double()

    def ours(data: Tensor) -> Callable[[], object]:
        def call() -> None:
            fit = pg.fit(ppca(latent=LATENT), data, EM(), seed=0, progress=False)
            assert fit.status == "converged", fit.message

        return call

    def theirs(data: Tensor, solver: str) -> Callable[[], object]:
        return lambda: PCA(LATENT, svd_solver=solver, random_state=0).fit(data.numpy())

    kinds = {
        "ppl_gen, float32": ours(x),
        "scikit-learn, covariance_eigh, float32": theirs(x, "covariance_eigh"),
        "scikit-learn, randomized (not exact), float32": theirs(x, "randomized"),
    }
    other = {
        "ppl_gen, float64": ours(double),
        "scikit-learn, covariance_eigh, float64": theirs(double, "covariance_eigh"),
    }
    found = {**alternate(kinds, blocks, 1), **alternate(other, blocks, 1)}
    same = found["ppl_gen, float64"].median / found["scikit-learn, covariance_eigh, float64"].median
    note = f"In float64, ours take {same:.2f} of scikit-learn's time."
    return Result(title, found, {"scikit-learn, covariance_eigh, float32": 1.0}, note=note)


def factors(x: Tensor, title: str, blocks: int) -> Result:
    """Factor analysis: one iteration of EM."""
    from sklearn.decomposition import FactorAnalysis

    x = x[:, x.std(0) > 0].contiguous()
    data = x.numpy()

    def theirs() -> float:
        def seconds(iterations: int) -> float:
            model = FactorAnalysis(LATENT, max_iter=iterations, tol=0.0, svd_method="randomized", random_state=0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                began = time.perf_counter()
                model.fit(data)
                return time.perf_counter() - began

        return (seconds(3) - seconds(1)) / 2

    kinds = {"ppl_gen": iteration(factor_analysis(latent=LATENT), x), "scikit-learn, randomized": theirs}
    return Result(title, alternate(kinds, blocks, 1), {"scikit-learn, randomized": 0.1})


def gaps(quick: bool, blocks: int) -> Result:
    """Entries missing in a few patterns, and in as many as rows: one iteration of EM."""
    generator = torch.Generator().manual_seed(0)
    count, columns, latent = (500 if quick else 20_000), 100, 10
    codes = torch.randn(count, latent, generator=generator) @ torch.randn(latent, columns, generator=generator)
    x = (codes + torch.randn(count, columns, generator=generator)).double()
    some = (torch.rand(20, columns, generator=generator) < 0.8)[torch.arange(count) % 20]
    each = torch.rand(count, columns, generator=generator) < 0.8
    recipe = ppca(latent=latent, start="random")
    kinds = {
        "20 patterns": iteration(recipe, {"x": x, "mask": some}),
        "a pattern for each row": iteration(recipe, {"x": x, "mask": each}),
        "no gaps": iteration(recipe, x),
    }
    return Result(f"PPCA of {count} x {columns} with gaps, 10 latents: one iteration", alternate(kinds, blocks, 1))


def chains(series: int, steps: int, states: int, blocks: int) -> Result:
    """The E-step of hidden Markov chains, step by step and by a scan."""
    generator = torch.Generator().manual_seed(0)
    draw: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    transition = torch.rand(states, states, **draw)
    transition /= transition.sum(-1, keepdim=True)
    log_probs = torch.randn(series, steps, states, **draw)
    active = torch.ones(series, steps, dtype=torch.bool)
    given = transition[0], transition, log_probs, active
    chosen = pays(series, steps, states)
    kinds = {
        f"as chosen ({'a scan' if chosen else 'steps'})": lambda: expectations(*given)[0],
        "steps": lambda: expectations(*given, scan=False)[0],
        "a scan": lambda: expectations(*given, scan=True)[0],
    }
    title = f"Hidden Markov chains, {series} x {steps}, {states} states: forward and backward"
    return Result(title, alternate(kinds, blocks, 1 if steps > 2000 else 3))


def rows(quick: bool) -> list[Result]:
    """The rows of the benchmark."""
    x, name = images(quick)
    blocks = 2 if quick else 9
    shape = f"{name}, {len(x)} x 784 -> {LATENT}"
    return [
        principal(x, f"PPCA, {shape}: a whole fit", blocks),
        factors(x, f"Factor analysis by EM, {shape}: one iteration", 2 if quick else 3),
        gaps(quick, 2 if quick else 5),
        *(chains(*case, blocks) for case in ((1, 300 if quick else 10_000, 3), (10, 200, 10), (500, 200, 5))),
    ]


if __name__ == "__main__":
    run("components", "What linear components and hidden Markov chains cost", rows, __doc__)
