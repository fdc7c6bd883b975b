"""Stand-ins for what Pyro's examples download: small data of the same form, made up; MNIST comes from PPL_GEN_DATA."""

from __future__ import annotations

import os
import random
import sys
import types
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch

__all__ = ["install"]

IMAGES = 600  # of MNIST
SEMI_SUPERVISED = 14_000  # of which that example sets 10000 aside
SEQUENCES, LENGTH, NOTES = 12, 20, 88


def install() -> None:
    """Put the stand-ins in place, and let what is left of downloads fail at once."""
    _refuse_downloads()
    _few_images()
    _polyphonic()
    _tables()
    seed = random.seed
    random.seed = lambda value=None: seed(int(value) if isinstance(value, np.integer) else value)  # Python 3.11 refuses
    for name in ("seaborn", "graphviz", "visdom"):  # pictures are not looked at
        if name not in sys.modules:
            sys.modules[name] = MagicMock(__spec__=None)
    wget = types.ModuleType("wget")
    wget.download = lambda url, path: np.savetxt(path, np.random.default_rng(0).poisson(3.0, (20, 4096)), delimiter=",")
    sys.modules["wget"] = wget


def _refuse_downloads() -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no downloads")

    urllib.request.urlopen = refuse
    urllib.request.urlretrieve = refuse


def _few_images() -> None:
    from torchvision.datasets import MNIST

    begin = MNIST.__init__

    def smaller(self: Any, root: Any, *args: Any, **kwargs: Any) -> None:
        kwargs["download"] = False
        begin(self, os.environ.get("PPL_GEN_DATA", root), *args, **kwargs)
        images = SEMI_SUPERVISED if "ss_vae" in sys.argv[0] else IMAGES
        self.data, self.targets = self.data[:images], self.targets[:images]

    MNIST.__init__ = smaller
    MNIST.raw_folder = property(lambda self: str(Path(self.root) / "MNIST" / "raw"))
    MNIST.processed_folder = MNIST.raw_folder


def _polyphonic() -> None:
    import pyro.contrib.examples.polyphonic_data_loader as loader

    def load_data(_: Any) -> dict[str, dict[str, Any]]:
        rng = torch.Generator().manual_seed(0)

        def split() -> dict[str, Any]:
            lengths = torch.randint(LENGTH // 2, LENGTH + 1, (SEQUENCES,), generator=rng)
            notes = torch.bernoulli(torch.full((SEQUENCES, LENGTH, NOTES), 0.05), generator=rng)
            for row, length in enumerate(lengths):
                notes[row, length:] = 0
            return {"sequences": notes, "sequence_lengths": lengths}

        return {part: split() for part in ("train", "valid", "test")}

    loader.load_data = load_data


def _tables() -> None:
    import pandas

    read = pandas.read_csv
    rng = np.random.default_rng(0)

    def made(source: Any, *args: Any, **kwargs: Any) -> Any:
        if not str(source).startswith("http"):
            return read(source, *args, **kwargs)
        if "rugged" in str(source):
            africa, rugged = rng.integers(0, 2, 170), rng.exponential(1.0, 170)
            gdp = np.exp(9 - 2 * africa - 0.2 * rugged + 0.3 * africa * rugged + 0.9 * rng.normal(size=170))
            return pandas.DataFrame({"cont_africa": africa, "rugged": rugged, "rgdppc_2000": gdp})
        if "EfronMorrisBB" in str(source):
            hits, later = rng.binomial(45, 0.27, 18), rng.binomial(300, 0.27, 18)
            columns = {"At-Bats": 45, "Hits": hits, "SeasonAt-Bats": 345, "SeasonHits": hits + later}
            names = [f"player {i}" for i in range(18)]
            return pandas.DataFrame({"FirstName": names, "LastName": names, **columns})
        if "SN_y_tot" in str(source):
            return pandas.DataFrame(
                {"time": np.arange(1700.5, 2000), "sunspot.year": rng.poisson(80, 300).astype(float)}
            )
        if "guo_qpcr" in str(source):
            stages = np.repeat(["1", "2", "4", "8", "16", "32 TE", "32 ICM", "64 PE", "64 TE", "64 EPI"], 44)[:437]
            columns = [f"gene {j}" for j in range(48)]
            return pandas.DataFrame(rng.normal(size=(437, 48)), index=stages, columns=columns)
        raise urllib.error.URLError(f"no stand-in for {source}")

    pandas.read_csv = made
