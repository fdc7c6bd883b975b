"""Kills fits that keep checkpoints: at every step they take on the file system, or at random moments.

Run as a script, ``python killed_checkpoints.py FOLDER placed`` or ``... FOLDER random COUNT``: it prints, as JSON, what
was found after each kill, and whether the fits that were gone on with to their end are equal to one that was not
killed, bit for bit.
"""

from __future__ import annotations

import json
import mmap
import random
import shutil
import struct
import sys
import time
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from killed_saves import Killer, in_child

import ppl_gen as pg
from ppl_gen.inference import SVI
from ppl_gen.runtime.numbered import Numbered

EVERY = 5
ROWS = torch.linspace(-1.0, 1.0, 10)


def model(x: torch.Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def learned(steps: int, **settings: Any) -> dict[str, list[float]]:
    fit = pg.fit(model, ROWS, SVI(steps=steps, lr=0.1, batch_size=3), progress=False, **settings)
    return {**{name: value.tolist() for name, value in fit.params.items()}, **fit.records}


def killed(folder: Path, moments: int | None) -> dict[str, Any]:
    """The steps that each kill lost (None: no checkpoint yet, and no step was made), and whether the ends are equal."""
    steps, path, chance = (
        (12, folder / "run", random.Random(0)) if moments is None else (60, folder / "run", random.Random(1))
    )
    whole, step = learned(steps), mmap.mmap(-1, 8)  # shared with the child, which writes the step it has made
    lost: list[int | None] = []
    equal: list[bool] = []

    def report(number: int, info: Any) -> None:
        step[:8] = struct.pack("q", number)

    def run(pause: float, last: int | None) -> None:
        def slow(number: int, info: Any) -> None:
            report(number, info)
            time.sleep(pause)

        if last is not None:
            Killer(path, last).install()
        learned(steps, checkpoint=path, every=EVERY, callbacks=[slow])

    def at_the_end() -> None:
        equal.append(learned(steps, checkpoint=path, every=EVERY) == whole)
        shutil.rmtree(path)

    began = time.perf_counter()
    in_child(lambda: run(0.01, None))
    seconds = time.perf_counter() - began
    at_the_end()
    for number in range(1, 10_000 if moments is None else moments + 1):
        step[:8] = struct.pack("q", 0)
        if moments is None:
            ended = in_child(lambda number=number: run(0.0, number))
        else:
            ended = in_child(lambda: run(0.01, None), chance.uniform(0.0, seconds))
        made, record = struct.unpack("q", step[:8])[0], Numbered(path).read() if path.exists() else None
        if record is not None:
            lost.append(max(0, made - int(record.facts["step"])))  # below 0: it did not come to a step
        else:
            assert made == 0, "steps were made, and nothing was kept"
            lost.append(None)
        if moments is None and not ended:
            break
        if moments is None or (record is not None and record.facts["step"] == steps):
            at_the_end()
    if path.exists():
        at_the_end()
    return {"lost": lost, "equal": equal}


if __name__ == "__main__":
    print(json.dumps(killed(Path(sys.argv[1]), int(sys.argv[3]) if sys.argv[2] == "random" else None)))
