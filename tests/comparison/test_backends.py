"""Comparisons through joblib's backends: the same bits wherever fits run, and one that dies takes none along.

The tests for dask and ray start a cluster of their own on this machine.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import joblib
import pyro
import pyro.distributions as dist
import pytest
import torch

import ppl_gen as pg
from ppl_gen.comparison.spread import spread_over
from ppl_gen.inference import NUTS, SVI, Algorithm

pytestmark = pytest.mark.timeout(600)


def model(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


X = torch.randn(40, generator=torch.Generator().manual_seed(0))
FITS = {"whole": SVI(steps=40, lr=0.05), "batches": SVI(steps=40, batch_size=7, lr=0.05)}


@dataclass(frozen=True)
class Dying(Algorithm):
    """Ends its process in one way or another, or says in a file which process it is, and waits."""

    how: str
    needs = ()

    def run(self, run):
        if self.how == "exit":
            os._exit(7)
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "sys.exit":
            sys.exit(3)
        Path(self.how).write_text(f"{os.getpid()} {os.getppid()}")
        time.sleep(300.0)


ALL = {"whole": FITS["whole"], "gone": Dying("exit"), "batches": FITS["batches"]}


@pytest.fixture(scope="module")
def alone():
    return pg.compare(model, X, FITS)


def same(alone, spread):
    """Bit for bit, where a fit was made."""
    for line in alone.lines:
        other = next(found for found in spread.lines if found.label == line.label)
        assert other.status == "finished", other.message
        assert torch.equal(line.evidence.values, other.evidence.values)
        for name, value in line.fit.params.items():
            assert torch.equal(value, other.fit.params[name])


def one_died(spread, said="its process ended before the fit was judged: it exited with code 7"):
    line = next(found for found in spread.lines if found.label == "gone")
    assert (line.status, line.message, line.fit) == ("failed", said, None)


@pytest.mark.slow
def test_whatever_ends_a_process_is_a_row_and_the_others_finish(alone) -> None:
    dying = {"gone": Dying("exit"), "killed": Dying("kill"), "left": Dying("sys.exit")}
    spread = pg.compare(model, X, {**dying, **FITS}, n_jobs=2)
    same(alone, spread)
    one_died(spread)
    said = {line.label: (line.status, line.message) for line in spread.lines}
    assert said["killed"][0] == "failed" and "killed (SIGKILL), perhaps for lack of memory" in said["killed"][1]
    assert said["left"] == ("failed", "its process could not make the fit: SystemExit: 3")
    assert "2, each fit on 1 thread(s)" == spread.facts["processes"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes under /proc")
@pytest.mark.parametrize("above", [False, True])
def test_a_process_killed_from_outside_is_a_row_and_the_others_finish(alone, tmp_path, above) -> None:
    """The one that fits, or the worker of loky above it: loky then ends all of its workers."""
    note = tmp_path / "pids"

    def kill() -> None:
        while not (note.exists() and len(note.read_text().split()) == 2):
            time.sleep(0.05)
        os.kill(int(note.read_text().split()[above]), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    spread = pg.compare(model, X, {"gone": Dying(str(note)), **FITS}, n_jobs=2)
    killer.join()
    same(alone, spread)
    line = spread.lines[0]
    assert line.status == "failed" and ("its worker ended" if above else "SIGKILL") in line.message


@pytest.mark.slow
def test_threads_of_joblib_wait_for_processes(alone) -> None:
    """Fits in threads of one process would share Pyro's parameter store: here each has a process."""
    with joblib.parallel_config("threading", n_jobs=2):
        spread = pg.compare(model, X, ALL)
    same(alone, spread)
    one_died(spread)
    assert "2 of joblib's threading backend" in spread.facts["processes"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [True, False])
def test_dask_gives_the_same_bits(alone, processes) -> None:
    distributed = pytest.importorskip("distributed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ports and temporary folders
        kind = {"n_workers": 2, "threads_per_worker": 1} if processes else {"n_workers": 1, "threads_per_worker": 2}
        with (
            distributed.LocalCluster(processes=processes, dashboard_address=None, **kind) as cluster,
            distributed.Client(cluster),
            joblib.parallel_config(backend="dask"),
        ):
            spread = pg.compare(model, X, ALL)
    same(alone, spread)
    one_died(spread)
    assert spread.facts["processes"] == "2 of joblib's dask backend, each fit on 1 thread(s)"


@pytest.fixture
def ray_of_two():
    ray = pytest.importorskip("ray")
    from ray.util.joblib import register_ray

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        register_ray()
        try:
            yield
        finally:
            ray.shutdown()


@pytest.mark.slow
def test_ray_gives_the_same_bits(alone, ray_of_two) -> None:
    with joblib.parallel_config(backend="ray"):
        spread = pg.compare(model, X, ALL)
    same(alone, spread)
    one_died(spread)
    assert spread.facts["processes"] == "2 of joblib's ray backend, each fit on 1 thread(s)"


@pytest.mark.slow
def test_chains_inside_of_a_process_are_those_outside() -> None:
    algorithms = {"NUTS": NUTS(draws=20, warmup=20, chains=2)}
    here, there = (pg.compare(model, X, algorithms, n_jobs=n) for n in (1, 2))
    assert torch.equal(here["NUTS"].posterior(draws=40)["loc"], there["NUTS"].posterior(draws=40)["loc"])


def test_what_forks_is_refused() -> None:
    with pytest.raises(ValueError, match="multiprocessing backend, which forks"):
        with joblib.parallel_config("multiprocessing", n_jobs=2):
            pg.compare(model, X, FITS)


@pytest.mark.parametrize("given, configured, expected", [(None, None, None), (1, 3, None), (3, None, 3), (None, 3, 3)])
def test_the_number_of_processes(given, configured, expected) -> None:
    with joblib.parallel_config(n_jobs=configured) if configured else contextlib.nullcontext():
        spread = spread_over(given)
    assert (spread and spread.n_jobs) == expected
