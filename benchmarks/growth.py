"""How time grows with particles, rows of a batch, components, rows of the data, and chains: ours beside itself.

.venv/bin/python benchmarks/growth.py

Writes `results/growth.md` and `results/growth.png`, on logarithmic axes: work that grows in proportion is a line of
slope 1. `--quick` measures two small sizes of each and writes nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from mixtures import fitted, groups
from steps import images, ours, program, wide
from timing import Block, alternate
from versions import table, write

import ppl_gen as pg
from ppl_gen.inference import IWAE, NUTS

RESULTS = Path(__file__).parent / "results"
Timed = Callable[[], object]


def particles(count: int) -> Timed:
    block = ours(wide(), images(), "inductor", objective=IWAE(particles=count), batch_size=128)
    return lambda: block(20)


def batch(rows: int) -> Timed:
    x = images()
    x = x[: len(x) // rows * rows]  # a shorter last batch would be compiled while the clock runs
    block = ours(program(), x, "inductor", batch_size=rows)
    return lambda: block(20)


def mixture(rows: int, components: int) -> Timed:
    x, _ = groups(rows, 8, components, dtype=torch.float64)
    return fitted(x, components, torch.float64)


def chains(count: int) -> Timed:
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=torch.float64)
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=torch.float64)

    def schools(y: torch.Tensor, sigma: torch.Tensor) -> None:
        import pyro
        import pyro.distributions as dist

        mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("data", len(y)):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * theta, sigma), obs=y)

    algorithm = NUTS(draws=2000, warmup=500, chains=count)

    def once() -> float:
        return float(pg.fit(schools, {"y": y, "sigma": sigma}, algorithm, seed=0, progress=False).cost["seconds"])

    return once


KINDS: Mapping[str, tuple[str, Callable[[int], Timed], Sequence[int]]] = {
    "particles": ("IWAE step, particles", particles, (1, 2, 4, 8, 16, 32, 64)),
    "batch": ("VAE step, rows of a batch", batch, (32, 64, 128, 256, 512, 1024, 2048)),
    "components": ("EM iteration, 50000 x 8, components", lambda k: mixture(50_000, k), (2, 4, 8, 16, 32, 64)),
    "rows": ("EM iteration, K = 10, rows", lambda n: mixture(n, 10), (10_000, 30_000, 100_000, 300_000, 1_000_000)),
    "chains": ("NUTS, eight schools, 500 + 2000, chains", chains, (1, 2, 4, 8, 16, 32)),
}


def measured(quick: bool) -> dict[str, dict[int, Block]]:
    found: dict[str, dict[int, Block]] = {}
    for title, make, sizes in KINDS.values():
        chosen = sizes[:2] if quick else sizes
        blocks = alternate({str(size): make(size) for size in chosen}, 1 if quick else 3, 1)
        found[title] = {int(size): block for size, block in blocks.items()}
        print(title, {size: round(block.median, 2) for size, block in found[title].items()}, flush=True)
    return found


def slope(blocks: Mapping[int, Block]) -> float:
    """Of the upper half of the sizes, in logarithms: 1 is proportional."""
    sizes = sorted(blocks)[-(len(blocks) // 2 + 1) :]
    return float(np.polyfit(np.log(sizes), np.log([blocks[size].median for size in sizes]), 1)[0])


def draw(found: Mapping[str, Mapping[int, Block]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(3.2 * len(found), 3.2), constrained_layout=True)
    for axis, (title, blocks) in zip(axes, found.items(), strict=True):
        sizes = sorted(blocks)
        axis.loglog(sizes, [blocks[size].median for size in sizes], "o-")
        last = blocks[sizes[-1]].median
        axis.loglog(sizes, [last * size / sizes[-1] for size in sizes], "--", color="grey", linewidth=1)
        name, _, unit = title.rpartition(", ")
        axis.set(title=name, xlabel=unit, ylabel="ms")
        axis.minorticks_off()
        axis.title.set_fontsize(9)
    figure.suptitle("Time against size; the dashed line is proportional", fontsize=10)
    figure.savefig(RESULTS / "growth.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two small sizes of each, nothing written to results/")
    quick, began = parser.parse_args().quick, time.perf_counter()
    found = measured(quick)
    if quick:
        return
    draw(found)
    lines = [
        [title, ", ".join(f"{size}: {block.median:.3g}" for size, block in blocks.items()), f"{slope(blocks):.2f}"]
        for title, blocks in found.items()
    ]
    shown = table(["what grows", "size: ms, median of 3", "slope of the upper half"], lines)
    write(Path(__file__).stem, "How time grows", f"{shown}\n\n![growth](growth.png)", time.perf_counter() - began)


if __name__ == "__main__":
    main()
