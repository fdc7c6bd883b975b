"""Ctrl-C, SIGTERM and kills: what was learned is kept, everything is put back, and nobody is left behind.

Each run is a process of its own (`killed_runs`). Old code, for comparison: 2 of 2 parents killed while chains ran left
four processes and a folder each; SIGTERM ended every run with nothing kept; Ctrl-C in ``compare(n_jobs=2)`` kept no
partial fit.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
from killed_runs import ended

import ppl_gen as pg
from ppl_gen.runtime import interrupts, workers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes under /proc")


@pytest.fixture(autouse=True)
def _listening():
    """A shell starts what it runs in the background with Ctrl-C ignored, and whatever is started there inherits that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_gives_the_partial_fit_and_puts_everything_back(number: int) -> None:
    run = ended("steps", [(0.2, number)], after="STEPPING")
    assert run.code == 0 and run.rows == ["interrupted"] and int(run.steps[0]) > 10
    assert run.out[-1] == "AS BEFORE" and run.err == ""


@pytest.mark.slow
def test_ctrl_c_in_a_comparison_keeps_the_partial_fits_of_its_processes() -> None:
    # Either of the two fits that run may step first: the quick one has four seconds to come to its five steps.
    run = ended("compare", [(4.0, signal.SIGINT)], after="STEPPING", group=True)
    assert run.rows[1:] == ["interrupted"] * 3 and run.rows[0] in ("finished", "interrupted")
    assert run.steps[0] == "5" and int(run.steps[1]) > 10 and run.steps[-1] == "-"
    assert run.out[-1] == "AS BEFORE" and run.err == "" and run.orphans == 0
    assert not [name for name in run.folders if name.startswith(("ppl_gen", "joblib"))]


@pytest.mark.parametrize("body", ["chains", "compare"])
def test_workers_and_folders_go_with_a_killed_parent(body: str) -> None:
    ready = "STEPPING" if body == "compare" else "BEGUN"
    run = ended(body, [(0.5 if body == "compare" else 8.0, signal.SIGKILL)], after=ready)
    assert run.code == -signal.SIGKILL and run.orphans == 0
    assert not [name for name in run.folders if name.startswith(("ppl_gen", "joblib"))]


@pytest.mark.slow
@pytest.mark.parametrize("body", ["chains", "compare", "nested"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_kills_at_random_times_leave_nothing(body: str, number: int) -> None:
    times = random.Random(f"{body} {number}")
    for turn in range(7):
        seconds = times.uniform(0.0, 14.0)
        run = ended(body, [(seconds, number)], group=number == signal.SIGINT and turn % 2 == 0)
        about = f"{body}, signal {number} after {seconds:.2f} s: {run}"
        assert run.orphans == 0, about
        assert not [name for name in run.folders if name.startswith(("ppl_gen", "joblib"))], about
        if number != signal.SIGKILL:
            assert run.code == 0 and run.out[-1] == "AS BEFORE" and run.err == "", about
            assert set(run.rows) <= {"interrupted", "finished"}, about


#: CPython ends by SIGINT, even where it was caught, if it had interrupted an exec() of text: imports do these.
_ENDINGS = (0, -signal.SIGINT)


@pytest.mark.slow
def test_ctrl_c_at_random_moments_of_the_setup_puts_everything_back() -> None:
    times = random.Random(7)
    bodies = {
        "recipe": "pg.fit(gaussian_mixture(components=3), pg.load_data('crabs'), EM(steps=100000, tolerance=0.0))",
        "nuts": "pg.fit(model, ROWS, NUTS(draws=100000, chains=2, processes=1))",
        "inspection": "pg.compare(model, ROWS, {'a': LONG})",
    }
    for turn in range(12):
        body = list(bodies.values())[turn % 3]
        run = ended(f"said({body})", [(times.uniform(0.0, 0.4), signal.SIGINT)])
        assert run.out[-1] == "AS BEFORE" and run.err == "", (body, run)
        assert run.code in _ENDINGS, (body, run)
        assert "INTERRUPT" in run.out or "interrupted" in run.rows, (body, run)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_the_command_line_ends_with_the_signals_code(number: int) -> None:
    body = """
from ppl_gen.cli import main
print("CODE", main(["fit", "gaussian_mixture:components=2", "crabs", "--algorithm", "NUTS:draws=100000,processes=1"]))
"""
    run = ended(body, [(0.4, number)])
    assert run.out[-2:] == [f"CODE {128 + number}", "AS BEFORE"] and "Traceback" not in run.err
    assert run.code in _ENDINGS


def test_a_handler_of_the_users_stays() -> None:
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with interrupts.listening():
            signal.raise_signal(signal.SIGTERM)
            assert not interrupts.taken()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]


def test_the_first_signal_waits_for_the_step_and_the_second_does_not() -> None:
    with interrupts.listening():
        signal.raise_signal(signal.SIGINT)  # held
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert not interrupts.taken()
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
        with interrupts.allowed(), pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt), interrupts.allowed():
            raise AssertionError("a signal noted before is acted on at once")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_context_manager_at_work_is_not_interrupted() -> None:
    class Slow:
        entered = left = False

        def __enter__(self) -> None:
            signal.raise_signal(signal.SIGINT)
            self.entered = True

        def __exit__(self, *exception: object) -> None:
            self.left = True

    slow = Slow()
    with pytest.raises(KeyboardInterrupt), interrupts.listening(), interrupts.allowed(), slow:
        time.sleep(1.0)
    assert slow.entered and slow.left


def test_a_partial_fit_is_the_fit_of_so_many_steps() -> None:
    import pyro
    import pyro.distributions as dist
    import torch

    from ppl_gen.inference import SVI

    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            if len(calls) == 40:
                signal.raise_signal(signal.SIGTERM)  # in the middle of a step
            calls.append(None)
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    calls: list[None] = []
    part = pg.fit(model, torch.arange(5.0), SVI(steps=1000, lr=1e-3), seed=3)
    steps = int(part.cost["steps"])
    assert part.status is pg.Status.INTERRUPTED and 0 < steps < 60
    whole = pg.fit(model, torch.arange(5.0), SVI(steps=steps, lr=1e-3), seed=3)
    assert all(torch.equal(value, whole.params[name]) for name, value in part.params.items())


def test_folders_of_killed_processes_are_swept_and_others_are_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead, fresh = tmp_path / "ppl_gen-scratch-dead", tmp_path / "ppl_gen-scratch-fresh"
    for folder in (dead, fresh):
        folder.mkdir()
        (folder / "chain0").write_bytes(b"0" * 8)
    long_ago = time.time() - 3600.0
    os.utime(dead, (long_ago, long_ago))
    with workers.scratch() as mine:
        os.utime(mine, (long_ago, long_ago))
        workers.sweep()
        assert mine.exists() and fresh.exists() and not dead.exists()
    assert not mine.exists()
