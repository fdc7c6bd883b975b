"""What EM for a Gaussian mixture costs, beside scikit-learn and pomegranate: an iteration, a whole fit, memory.

.venv/bin/python benchmarks/mixtures.py

pomegranate takes part where it can be imported (PYTHONPATH). Blocks of each kind take turns. `--quick` takes few rows
and writes nothing. `--memory` and `--peer` are what children run: memory is measured in processes of their own, and
pomegranate is.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from timing import Ends, Result, alternate, tell
from torch import Tensor

import ppl_gen as pg
from ppl_gen.inference import EM
from ppl_gen.models import gaussian_mixture

ITERATIONS = 6
SHAPES = {"60000 x 20, K = 10": (60_000, 20, 10), "1000000 x 8, K = 10": (1_000_000, 8, 10)}
TARGETS = {"60000 x 20, K = 10": (0.25, 0.8), "1000000 x 8, K = 10": (0.12, 0.4)}


def groups(count: int, columns: int, components: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Rows of overlapping groups, and means to start from."""
    generator = torch.Generator().manual_seed(0)
    means = 2 * torch.randn(components, columns, generator=generator)
    which = torch.randint(components, (count,), generator=generator)
    x = torch.randn(count, columns, generator=generator).add_(means[which])
    return x.to(dtype), means + 0.3 * torch.randn(means.shape, generator=generator)


class Timed(Ends, EM):
    """With the time of each step."""


def fitted(x: Tensor, components: int, dtype: torch.dtype) -> Callable[[], float]:
    """A whole fit by `pg.fit`; the seconds of one of its iterations."""

    def call() -> float:
        Timed.ends.clear()
        algorithm = Timed(steps=ITERATIONS + 1, tolerance=0.0)
        fit = pg.fit(gaussian_mixture(components), x, algorithm, seed=0, dtype=dtype, progress=False)
        assert fit.cost["steps"] == ITERATIONS + 1, fit.message
        return (Timed.ends[-1] - Timed.ends[0]) / ITERATIONS

    return call


def scikit(x: Tensor, means: Tensor) -> Callable[[], float]:
    """A fit of several iterations less one of a single iteration: the seconds of one."""
    from sklearn.mixture import GaussianMixture

    data = x.numpy()

    def seconds(iterations: int) -> float:
        mixture = GaussianMixture(
            len(means),
            max_iter=iterations,
            tol=0.0,
            means_init=means.numpy().astype(data.dtype),
            init_params="random_from_data",
            random_state=0,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            began = time.perf_counter()
            mixture.fit(data)
            return time.perf_counter() - began

    return lambda: (seconds(ITERATIONS + 1) - seconds(1)) / ITERATIONS


def pomegranate(x: Tensor, means: Tensor) -> float:
    """Seconds of an iteration."""
    from pomegranate.distributions import Normal
    from pomegranate.gmm import GeneralMixtureModel

    mixture = GeneralMixtureModel([Normal(mean.clone(), torch.eye(len(mean))) for mean in means])
    mixture.summarize(x)
    mixture.from_summaries()
    began = time.perf_counter()
    for _ in range(ITERATIONS):
        mixture.summarize(x)
        mixture.from_summaries()
    return (time.perf_counter() - began) / ITERATIONS


def apart(shape: tuple[int, int, int]) -> Callable[[], float]:
    """The same in a process of its own: what pomegranate imports makes torch several times slower in this one."""
    command = [sys.executable, __file__, "--peer", *map(str, shape)]

    def call() -> float:
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])

    return call


def kinds(shape: tuple[int, int, int]) -> dict[str, Callable[[], float]]:
    x, means = groups(*shape)
    single = x.float()
    found: dict[str, Callable[[], float]] = {
        "ppl_gen, float32": fitted(single, shape[2], torch.float32),
        "ppl_gen, float64": fitted(x, shape[2], torch.float64),
        "scikit-learn, float64": scikit(x, means),
        "scikit-learn, float32": scikit(single, means),
    }
    if importlib.util.find_spec("pomegranate") is not None:
        found["pomegranate, float32"] = apart(shape)
    return found


def whole(shape: tuple[int, int, int]) -> dict[str, Callable[[], object]]:
    """From nothing to a result, after some iterations: what comes before and after them is in it."""
    x, _ = groups(*shape)

    def ours() -> None:
        pg.fit(gaussian_mixture(shape[2]), x, EM(steps=10, tolerance=0.0), seed=0, progress=False)

    def theirs() -> None:
        from sklearn.mixture import GaussianMixture

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            GaussianMixture(shape[2], max_iter=10, tol=0.0, init_params="k-means++", random_state=0).fit(x.numpy())

    return {"ppl_gen, float64": ours, "scikit-learn, float64": theirs}


# -------------------------------------------------------------------------------------------------------------- memory


def peak(kind: str, shape: tuple[int, int, int]) -> tuple[float, float]:
    """MB at most of a process of its own, and how much of that was there before the fit: packages and rows."""
    command = [sys.executable, __file__, "--memory", kind, *map(str, shape)]
    last = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()[-1]
    most, before = last.split()
    return float(most), float(before)


def remembered(kind: str, shape: tuple[int, int, int]) -> None:
    """In the child: one short fit, and the largest resident set."""
    single = kind.endswith("float32")
    x, means = groups(*shape, dtype=torch.float32 if single else torch.float64)
    small = groups(1000, 3, 2)[0]
    pg.fit(gaussian_mixture(2), small, EM(steps=2), seed=0, progress=False)  # what a first fit loads
    resident = _status("VmRSS")
    if kind.startswith("ppl_gen"):
        dtype = x.dtype
        pg.fit(gaussian_mixture(shape[2]), x, EM(steps=2, tolerance=0.0), seed=0, dtype=dtype, progress=False)
    elif kind.startswith("scikit"):
        from sklearn.mixture import GaussianMixture

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            GaussianMixture(
                shape[2], max_iter=2, tol=0.0, means_init=means.numpy().astype(np.float64), init_params="k-means++"
            ).fit(x.numpy())
    else:
        pomegranate(x, means)
    print(_status("VmHWM"), resident)


def _status(what: str) -> float:
    """MB by /proc: getrusage would count what the parent held when it started this process."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(f"{what}:"))


def rows(quick: bool) -> list[Result]:
    """The rows of the benchmark."""
    results = []
    for title, full in SHAPES.items():
        shape = (full[0] // 50, *full[1:]) if quick else full
        blocks = alternate(kinds(shape), blocks=2 if quick else 3 if full[0] > 100_000 else 7, calls=1)
        aims = dict(zip(("scikit-learn, float64", "pomegranate, float32"), TARGETS[title], strict=True))
        memory = {} if quick else {name: peak(name, shape)[0] for name in blocks}
        title = f"Gaussian mixture, full covariances, {title}: one iteration of EM"
        results.append(Result(title, blocks, {k: v for k, v in aims.items() if k in blocks}, memory))
    shape = (4000, 8, 10) if quick else SHAPES["1000000 x 8, K = 10"]
    blocks = alternate(whole(shape), blocks=2 if quick else 3, calls=1)
    results.append(Result("The same on 1000000 x 8: a whole fit of ten iterations", blocks))
    if not quick:
        results.append(large())
    return results


def large() -> Result:
    """Memory at 1e6 x 50 with 50 components, and one iteration."""
    shape = (1_000_000, 50, 50)
    x, _ = groups(*shape, dtype=torch.float32)
    blocks = alternate({"ppl_gen, float32": fitted(x, 50, torch.float32)}, blocks=1, calls=1, warm=0)
    most, before = peak("ppl_gen, float32", shape)
    note = f"Of the {most:.0f} MB, {before:.0f} MB were there before the fit: 200 MB of rows, and the packages."
    memory = {"ppl_gen, float32": most}
    return Result("1000000 x 50, K = 50: one iteration, and memory", blocks, {}, memory, note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rows and blocks; nothing is written")
    parser.add_argument("--memory", nargs=4, metavar=("KIND", "ROWS", "COLUMNS", "COMPONENTS"))
    parser.add_argument("--peer", nargs=3, type=int, metavar=("ROWS", "COLUMNS", "COMPONENTS"))
    given = parser.parse_args()
    if given.peer:
        print(pomegranate(*groups(*given.peer, dtype=torch.float32)))
        return
    if given.memory:
        kind, *shape = given.memory
        remembered(kind, tuple(map(int, shape)))  # type: ignore[arg-type]
        return
    note = "Starting means differ: ours are rows far apart. An iteration costs the same from any start."
    tell("mixtures", "What EM for a Gaussian mixture costs", rows, given.quick, note)


if __name__ == "__main__":
    main()
