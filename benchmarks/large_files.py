"""A file larger than memory, from fit to comparison: seconds and the largest resident set after every step.

    python benchmarks/large_files.py --gib 20

The file is sparse (`truncate`): it takes no room on the disk, and reading it costs what copying zeros does.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch

import ppl_gen as pg
from ppl_gen.inference import SVI
from ppl_gen.models import vae

COLUMNS = 1000
SHORT = {"progress": False}


def means(x):
    loc = pyro.sample("loc", dist.Normal(torch.zeros(COLUMNS), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


def resident() -> dict[str, int]:
    """Peak and present resident set in MiB (Linux), what is mapped of files included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) // 1024 for line in lines if line.startswith(("VmHWM", "VmRSS"))}
    return {"peak": found["VmHWM"], "now": found["VmRSS"]}


def steps(x: np.memmap, folder: Path, held: float):
    """What a user does, in order; each step is a name and a function."""
    made = {}

    def fit():
        made["fit"] = pg.fit(means, x, SVI(steps=300, batch_size=128, lr=0.05), **SHORT)

    yield "fit, 300 steps of 128 rows", fit
    yield "evidence of 10000 rows", lambda: made["fit"].evidence(x[-10_000:], draws=20, particles=1)
    yield "verdict and table", lambda: made["fit"].diagnose()
    yield "draws of the posterior", lambda: made["fit"].posterior(draws=100)
    yield "predictions for 100 rows", lambda: made["fit"].predict(x[:100], draws=10)
    yield "save", lambda: made["fit"].save(folder / "fit")
    yield "load", lambda: pg.load(folder / "fit", program=means, data=x)
    yield "to_arviz", lambda: made["fit"].to_arviz(draws=100)
    recipe = vae(latent=4, hidden=(32,), likelihood="normal", scale=1.0)
    yield "fit of a VAE", lambda: made.update(vae=pg.fit(recipe, x, SVI(steps=100, batch_size=128), **SHORT))
    yield "verdict of the VAE", lambda: made["vae"].diagnose()
    algorithms = {"fast": SVI(steps=100, batch_size=128, lr=0.05), "slow": SVI(steps=100, batch_size=128)}
    settings = {"holdout": held, "draws": 5, "particles": 1, **SHORT}
    yield f"compare, {held:.1%} held out", lambda: pg.compare(means, x, algorithms, **settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=20.0, help="size of the file")
    parser.add_argument("--held", type=float, default=0.002, help="share of rows that the comparison holds out")
    parser.add_argument("--json", action="store_true", help="one line of JSON for each step")
    arguments = parser.parse_args()
    rows = int(arguments.gib * 2**30) // (4 * COLUMNS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with open(folder / "x", "wb") as file:
            file.truncate(rows * COLUMNS * 4)
        x = np.memmap(folder / "x", np.float32, "r", shape=(rows, COLUMNS))
        before = {"step": "imports", "seconds": 0.0, **resident()}
        report(before, arguments.json)
        for step, run in steps(x, folder, arguments.held):
            began = time.perf_counter()
            run()
            report({"step": step, "seconds": time.perf_counter() - began, **resident()}, arguments.json)


def report(row: dict, as_json: bool) -> None:
    if as_json:
        print(json.dumps(row), flush=True)
    else:
        print(
            f"{row['step']:30} {row['seconds']:7.1f} s   peak {row['peak']:6} MiB   now {row['now']:6} MiB", flush=True
        )


if __name__ == "__main__":
    import warnings

    warnings.simplefilter("ignore")  # so few steps are said to be too few
    main()
