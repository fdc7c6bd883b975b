"""NUTS beside Pyro, NumPyro and PyMC under nutpie: effective draws per second on three posteriors.

.venv-bench/bin/python benchmarks/chains.py

Every run is a process of its own, and the libraries take turns. A run is made twice in its process: the first counts
everything from the call to the draws, compilation included (not the import of the library); of the second, what was
compiled before is left out. Effective draws are the least bulk ESS (ArviZ) over the parameters of the model, components
ordered by their means. `--quick` draws little, once; a library that is not installed is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
import warnings

import numpy as np
from timing import Block, Result, tell

LIBRARIES = {"ppl_gen": "ppl_gen", "Pyro": "pyro", "NumPyro": "numpyro", "PyMC, nutpie": "pymc"}
POSTERIORS = ("eight schools", "logistic regression 1000 x 25", "crabs")
#: chains, warm-up, draws. Pyro draws fewer: its effective draws per second do not depend on how many it makes.
LENGTHS = {"ppl_gen": (4, 500, 1000), "NumPyro": (4, 500, 1000), "PyMC, nutpie": (4, 500, 1000), "Pyro": (1, 300, 300)}
#: Largest share of our seconds per effective draw in the peer's: everything counted, and compilation apart.
TARGETS = {"Pyro": (1 / 6, 1 / 15), "NumPyro": (1.0, 1.0), "PyMC, nutpie": (1.0, 1.0)}


def data(posterior: str) -> dict[str, np.ndarray]:
    if posterior == "eight schools":
        y = [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]
        return {"y": np.array(y), "sigma": np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])}
    if posterior == "crabs":
        import ppl_gen as pg

        x = np.asarray(pg.load_data("crabs"), dtype=float)
        return {"x": (x - x.mean()) / x.std()}
    draws = np.random.default_rng(0)
    x = draws.normal(size=(1000, 25))
    chance = 1 / (1 + np.exp(-x @ draws.normal(size=25) * 0.5))
    return {"x": x, "y": (draws.uniform(size=1000) < chance).astype(float)}


def effective(draws: dict[str, np.ndarray]) -> float:
    """The least bulk ESS; arrays are chains x draws x shape."""
    import arviz

    if "means" in draws:  # of exchangeable components
        order = draws["means"].argsort(-1)
        draws = {n: np.take_along_axis(v, order, -1) if v.shape == order.shape else v for n, v in draws.items()}
    return min(float(np.min(arviz.ess(value if value.ndim < 4 else value)[...])) for value in _columns(draws))


def _columns(draws: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [
        value.reshape(*value.shape[:2], -1)[..., i]
        for value in draws.values()
        for i in range(int(np.prod(value.shape[2:])) if value.ndim > 2 else 1)
    ]


def run(library: str, posterior: str, quick: bool) -> dict[str, float]:
    """One process: both runs, as seconds and effective draws of each, and the seconds of compilation that it told."""
    from chain_models import SAMPLERS

    chains, warmup, draws = (2, 50, 50) if quick else LENGTHS[library]
    sample = SAMPLERS[library](posterior, data(posterior), chains, warmup, draws)
    found = {}
    for name, seed in (("first", 0), ("second", 1)):
        began = time.perf_counter()
        kept, compiling = sample(seed)
        found[name] = time.perf_counter() - began - (compiling if name == "second" else 0.0)
        found[f"{name} ess"] = effective(kept)
    return found


def child(library: str, posterior: str, quick: bool) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", __file__, "--one", library, posterior, *(["--quick"] if quick else [])]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_ENABLE_X64": "1"})
    if done.returncode:
        raise RuntimeError(f"{library} on {posterior}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def rows(quick: bool) -> list[Result]:
    """For each posterior seconds per 1000 effective draws, everything counted and compilation apart."""
    libraries = [name for name, module in LIBRARIES.items() if importlib.util.find_spec(module) is not None]
    results = []
    for posterior in POSTERIORS:
        found: dict[str, list[dict[str, float]]] = {name: [] for name in libraries}
        for turn in range(1 if quick else 3):
            for name in libraries:
                if turn == 0 or name != "Pyro":  # minutes each, where the others take seconds
                    found[name].append(child(name, posterior, quick))
        for place, (kind, title) in enumerate((("first", "everything counted"), ("second", "compilation apart"))):
            blocks = {n: Block(tuple(1e6 * r[kind] / r[f"{kind} ess"] for r in runs)) for n, runs in found.items()}
            aims = {name: aim[place] for name, aim in TARGETS.items() if name in blocks}
            told = "; ".join(
                f"{n}: {np.median([r[f'{kind} ess'] / r[kind] for r in runs]):.0f} effective draws a second, "
                f"{np.median([r[kind] for r in runs]):.1f} s"
                for n, runs in found.items()
            )
            lengths = "; ".join(f"{n} {c} x ({w} + {d})" for n, (c, w, d) in LENGTHS.items() if n in found)
            note = f"ms for 1000 effective draws. {told}. Chains x (warm-up + draws): {lengths}."
            results.append(Result(f"NUTS, {posterior}, {title}", blocks, aims, note=note))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--one", nargs=2, metavar=("LIBRARY", "POSTERIOR"), help="one run, told as JSON")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.one:
        print(json.dumps(run(*arguments.one, arguments.quick)))
        return
    tell("chains", "Effective draws", rows, arguments.quick)


if __name__ == "__main__":
    main()
