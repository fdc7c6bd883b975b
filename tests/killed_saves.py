"""Kills a process in the middle of `Fit.save`, at every step it takes on the file system and at random moments.

Run as a script, ``python killed_saves.py FOLDER placed`` or ``... FOLDER random COUNT``: it prints, as JSON, what
`pg.load` found after each kill: "old", "new", or the error. Every save replaces the same old fit by the same new one.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import pyro
import pyro.distributions as dist
import safetensors.torch
import torch

import ppl_gen as pg
from ppl_gen.inference import SVI

WATCHED = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree", "open")


def model(x: torch.Tensor) -> None:
    loc = pyro.param("loc", torch.tensor(0.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


class Killer:
    """Ends this process, as a power cut would, just before its ``last``-th step in ``folder`` (and half way through)."""

    def __init__(self, folder: Path, last: int) -> None:
        self.folder, self.left = str(folder), last

    def step(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        """Every call of Python's own that changes the file system."""
        if event not in WATCHED or self.folder not in str(args[0]):
            return
        if event != "open" or args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self.step()

    def install(self) -> None:
        """Also what Python does not report: fsync, and the libraries that write by themselves (half their bytes)."""
        sys.addaudithook(self.hook)
        fsync, save_file, close = os.fsync, safetensors.torch.save_file, h5py.File.close

        def killed_fsync(handle: int) -> None:
            self.step()
            fsync(handle)

        def half_written(tensors: Any, filename: Any, *args: Any, **kwargs: Any) -> None:
            self.step()
            save_file(tensors, filename, *args, **kwargs)
            if self.left == 1:
                os.truncate(filename, os.path.getsize(filename) // 2)
            self.step()

        def killed_close(file: h5py.File) -> None:
            self.step()
            close(file)

        os.fsync, safetensors.torch.save_file, h5py.File.close = killed_fsync, half_written, killed_close


def in_child(work: Callable[[], Any], kill_after: float | None = None) -> bool:
    """Run ``work`` in a copy of this process; whether it was killed."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        raise RuntimeError("the save failed by itself")
    return os.WIFSIGNALED(status)


def found(path: Path) -> str:
    """Which fit there is; both forms of loading have to agree."""
    try:
        bare, whole = pg.load(path).seed, pg.load(path, program=model).seed
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return {0: "old", 1: "new"}[whole] if bare == whole else f"two fits: {bare}, {whole}"


def killed(folder: Path, moments: int | None) -> tuple[list[str], list[str]]:
    """What was found after each kill, and what lies about after one save that ends: names that the first has not."""
    old, new = (pg.fit(model, torch.arange(6.0), SVI(steps=20), seed=seed) for seed in (0, 1))
    path, answers = folder / "kept", []
    old.save(path)
    names = {file.relative_to(folder).parts[0] for file in folder.rglob("*")}
    began = time.perf_counter()
    in_child(lambda: old.save(path))
    seconds, chance = time.perf_counter() - began, random.Random(0)
    for number in range(1, 10_000 if moments is None else moments + 1):
        if answers and answers[-1] != "old":
            old.save(path)

        def save(number: int = number) -> None:
            if moments is None:
                Killer(folder, number).install()
            new.save(path)

        ended = in_child(save, None if moments is None else chance.uniform(0.0, seconds))
        if moments is None and not ended:
            break
        answers.append(found(path))
    for file in path.iterdir():
        os.utime(file, (0.0, 0.0))  # long ago: a claim of a minute is not swept
    new.save(path)
    left = sorted(str(f.relative_to(folder)) for f in folder.iterdir() if f.name not in names)
    return answers, left + sorted(f.name for f in path.iterdir())


if __name__ == "__main__":
    answers, left = killed(Path(sys.argv[1]), int(sys.argv[3]) if sys.argv[2] == "random" else None)
    print(json.dumps({"answers": answers, "left": left}))
