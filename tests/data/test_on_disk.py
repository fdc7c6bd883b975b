"""Data in files: the rows of the array, at constant memory, and refusals in words where all rows would be needed."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import ppl_gen as pg
from ppl_gen.comparison.split import split_rows
from ppl_gen.data import on_disk as files
from ppl_gen.data.batches import Batches
from ppl_gen.data.batching import as_dataset
from ppl_gen.data.on_disk import RowsOnDisk, as_received, for_sending, is_on_disk, on_disk
from ppl_gen.errors import IncompatibleError, NonFiniteError
from ppl_gen.inference import EM, NUTS, SVI
from ppl_gen.models import gaussian_mixture, vae

X = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
MANY = np.random.default_rng(0).normal(size=(600, 3)).astype(np.float32)


def takes(x):
    """A signature is all that batching looks at."""


def model(x):
    loc = pyro.sample("loc", dist.Normal(torch.zeros(3), 10.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


def saved(folder: Path, array: np.ndarray = X, mode: str = "r") -> np.memmap:
    np.save(folder / "x.npy", array)
    return np.load(folder / "x.npy", mmap_mode=mode)


def changed(folder: Path) -> np.memmap:
    """Changed in memory and not in the file, which is what mode "c" is for."""
    rows = saved(folder, np.zeros_like(X), "c")
    rows[:] = X
    return rows


def in_h5(folder: Path) -> h5py.Dataset:
    with h5py.File(folder / "x.h5", "w") as file:
        file["x"] = X
    return h5py.File(folder / "x.h5", "r")["x"]


def torch_file(folder: Path) -> torch.Tensor:
    X.tofile(folder / "x.bin")
    return torch.from_file(str(folder / "x.bin"), shared=True, size=X.size).reshape(X.shape)


def renamed(folder: Path) -> np.memmap:
    """Another file takes the name of the one that is mapped."""
    rows = saved(folder)
    np.save(folder / "y.npy", np.zeros_like(X))
    (folder / "y.npy").rename(folder / "x.npy")
    return rows


def removed(folder: Path) -> np.memmap:
    rows = saved(folder)
    (folder / "x.npy").unlink()
    return rows


SOURCES = {
    "npy": saved,
    "writable": lambda folder: saved(folder, mode="r+"),
    "changed in memory": changed,
    "a part": lambda folder: saved(folder, np.concatenate([X[:7] + 1, X]))[7:],
    "every other row": lambda folder: saved(folder, np.repeat(X, 2, 0))[::2],
    "backwards": lambda folder: saved(folder, X[::-1].copy())[::-1],
    "columns": lambda folder: saved(folder, np.concatenate([X, X], 1))[:, 3:],
    "Fortran order": lambda folder: saved(folder, np.asfortranarray(X)),
    "big endian": lambda folder: saved(folder, X.astype(">f4")),
    "h5py": in_h5,
    "torch.from_file": torch_file,
    "renamed": renamed,
    "removed": removed,
}


@pytest.mark.parametrize("kind", SOURCES)
def test_rows_are_those_of_the_array(kind, tmp_path) -> None:
    source = SOURCES[kind](tmp_path)
    assert is_on_disk(source)
    rows, index = on_disk(source), torch.tensor([4, 49, 4, 0, 5, 6, 7])
    assert rows.shape == X.shape and torch.equal(rows.take(index), torch.from_numpy(X)[index])
    some = rows.chosen(torch.arange(40, 9, -1))
    assert torch.equal(some.take(torch.tensor([0, 30])), torch.from_numpy(X)[[40, 10]])
    assert torch.equal(torch.cat(list(rows.pieces())), torch.from_numpy(X)) and rows.same_as(torch.from_numpy(X))
    assert not rows.same_as(torch.from_numpy(X) + 1.0) and np.array_equal(np.asarray(rows), X)
    mine, wanted = (Batches(as_dataset(data, takes), 8, 3) for data in (source, X))
    assert all(torch.equal(mine.next().args[0], wanted.next().args[0]) for _ in range(14))


@pytest.mark.parametrize("kind", ["npy", "a part", "h5py", "columns", "changed in memory"])
def test_rows_travel_by_the_name_of_their_file(kind, tmp_path) -> None:
    rows = on_disk(SOURCES[kind](tmp_path)).chosen(torch.tensor([3, 2]))
    content = pickle.dumps(rows)
    assert torch.equal(pickle.loads(content)[:], torch.from_numpy(X)[[3, 2]])
    if kind in ("npy", "h5py"):
        next(tmp_path.iterdir()).unlink()
        with pytest.raises(FileNotFoundError, match="every machine of a comparison has to see it"):
            pickle.loads(content)


def test_a_fit_and_a_split_of_a_file_are_those_of_the_array(tmp_path) -> None:
    rows, algorithm = saved(tmp_path), SVI(steps=40, batch_size=8, lr=0.05)
    one, two = (pg.fit(model, data, algorithm) for data in (X, rows))
    assert all(torch.equal(value, two.params[name]) for name, value in one.params.items())
    assert torch.equal(one.evidence(X[:9]).values, two.evidence(rows[:9]).values)
    for mine, wanted in zip(split_rows(rows, 0.2, model), split_rows(X, 0.2, model), strict=True):
        found = pg.fit(model, mine, algorithm).evidence(rows[:9])
        assert isinstance(mine, RowsOnDisk) and torch.equal(mine[:], torch.from_numpy(wanted))
        assert torch.equal(found.values, pg.fit(model, wanted, algorithm).evidence(X[:9]).values)


def test_processes_are_sent_the_name_of_a_file(tmp_path) -> None:
    rows = saved(tmp_path, np.random.default_rng(0).normal(size=(50_000, 3)).astype(np.float32))
    for data in (rows, {"x": rows, "label": [1]}, (rows,), torch_file(tmp_path)):
        content = pickle.dumps(for_sending(data))
        assert len(content) < 1000
        again = as_received(pickle.loads(content))
        one, two = (d["x"] if isinstance(d, dict) else d[0] if isinstance(d, tuple) else d for d in (data, again))
        assert np.array_equal(np.asarray(one), np.asarray(two)) and isinstance(two, np.memmap)
    assert for_sending(X) is X and as_received(X) is X


@pytest.fixture
def small(monkeypatch):
    """The file of `MANY` counts as too large for memory."""
    for module in (files, sys.modules["ppl_gen.data.arrays"], sys.modules["ppl_gen.data.dataset"]):
        monkeypatch.setattr(module, "WHOLE", MANY.nbytes - 1)
    monkeypatch.setattr("ppl_gen.data.columns._ROWS", 256)
    monkeypatch.setattr("ppl_gen.data.inputs.LOOK", 256)
    monkeypatch.setattr("ppl_gen.data.inputs.WHOLE", MANY.nbytes - 1)


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: pg.fit(model, x, SVI(steps=2)),
        lambda x: pg.fit(model, x, NUTS(draws=2, warmup=2)),
        lambda x: pg.fit(gaussian_mixture(components=2), x, EM()),
        lambda x: pg.fit(model, x, SVI(steps=2, batch_size=2)).predict(draws=1),
    ],
)
def test_what_needs_all_rows_says_so(ask, small, tmp_path) -> None:
    with pytest.raises(IncompatibleError, match=r"all 600 rows at once.*SVI\(batch_size=\.\.\.\).*np\.array\(x\)"):
        ask(saved(tmp_path, MANY))


def test_a_likelihood_is_not_guessed_from_a_part(small, tmp_path) -> None:
    with pytest.raises(ValueError, match='likelihood: "auto" looks at all of the data'):
        pg.fit(vae(latent=1, hidden=(2,)), saved(tmp_path, MANY), SVI(steps=2, batch_size=2))


@pytest.mark.parametrize(
    "value, said", [(np.inf, "row 531 of the data on disk"), (np.nan, "row 531 of data 'x' on disk")]
)
def test_what_is_not_finite_is_found_as_it_is_read_and_the_fit_is_kept(value, said, small, tmp_path) -> None:
    bad = MANY.copy()
    bad[531, 1] = value
    with pytest.raises(NonFiniteError, match=said) as found:
        pg.fit(model, saved(tmp_path, bad), SVI(steps=500, batch_size=4, lr=0.05), seed=1)
    assert found.value.fit.status is pg.Status.DIVERGED and found.value.fit.cost["steps"] < 150
    assert all(bool(value.isfinite().all()) for value in found.value.fit.params.values())


def test_a_small_file_is_looked_at_before_anything_runs(tmp_path) -> None:
    bad = X.copy()
    bad[31, 1] = np.nan
    with pytest.raises(ValueError, match="row 31"):
        pg.fit(model, saved(tmp_path, bad), SVI(steps=2, batch_size=2))


def test_a_verdict_is_not_made_of_some_rows(small, tmp_path) -> None:
    fit = pg.fit(model, saved(tmp_path, MANY), SVI(steps=20, batch_size=8, lr=0.05))
    with pytest.warns(match="not held against the density, which takes all 600 rows"):
        assert not fit.verdict.trusted
    assert fit.posterior(draws=7)["loc"].shape == (7, 3)


def run(gib: float, held: float) -> list[dict]:
    top = Path(__file__).parents[2]
    command = [
        sys.executable,
        str(top / "benchmarks" / "large_files.py"),
        "--gib",
        str(gib),
        "--held",
        str(held),
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident set under /proc")
@pytest.mark.parametrize("gib, held", [(4.0, 0.2), (20.0, 0.002)])
def test_memory_does_not_grow_with_the_file(gib, held) -> None:
    """The imports take 550 MiB; the rest are batches, draws and the order of the rows (8 bytes each)."""
    steps = run(gib, held)
    assert steps[-1]["step"].startswith("compare") and steps[-1]["peak"] < 2048


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident set under /proc")
def test_reading_a_file_does_not_fill_the_process(tmp_path) -> None:
    """Half a GiB of rows, read three times over in any order; through the map, the pages read would be resident."""
    path = tmp_path / "x"
    with open(path, "wb") as file:
        file.truncate(2**29)
    code = f"""
import numpy as np, torch
from ppl_gen.data.batches import Batches
from ppl_gen.data.batching import as_dataset
def takes(x): pass
def resident(): return int([l for l in open("/proc/self/status") if l.startswith("VmHWM")][0].split()[1]) // 1024
x = np.memmap({str(path)!r}, np.float32, "r", shape=(2**17, 2**10))
source = Batches(as_dataset(x, takes), 256, 0)
source.next()
before = resident()
for _ in range(3 * source.per_epoch): source.next()
print(resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64, "MiB; the order of the rows is 1, a batch 1"
