"""kill -9 at any moment leaves a checkpoint to go on from, at most one interval old; SIGTERM writes a last one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import killed_checkpoints
import pytest
from killed_runs import ended

from ppl_gen.runtime.numbered import Numbered

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and looks for processes under /proc")


def _found(folder: Path, *how: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, killed_checkpoints.__file__, str(folder), *how],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _check(found: dict[str, Any], kills: int) -> None:
    assert len(found["lost"]) >= kills and all(found["equal"]) and found["equal"]
    # A kill may come between a step and its checkpoint, which is the last of the interval.
    assert all(lost is None or lost <= killed_checkpoints.EVERY for lost in found["lost"]), found
    assert any(lost is not None for lost in found["lost"])


@pytest.mark.slow
def test_kills_at_random_moments(tmp_path: Path) -> None:
    _check(_found(tmp_path, "random", "3"), 3)


@pytest.mark.slow
def test_fifty_kills_at_random_moments(tmp_path: Path) -> None:
    found = _found(tmp_path, "random", "50")
    _check(found, 50)
    assert sum(lost is not None and lost > 0 for lost in found["lost"]) > 10, "most kills come in the middle of a run"


@pytest.mark.slow
def test_kills_before_every_step_on_the_file_system(tmp_path: Path) -> None:
    """Making the folder, writing, syncing and renaming both files, removing the old: all of them, one by one."""
    _check(_found(tmp_path, "placed"), 40)


BODY = """
from ppl_gen.inference import SVI
def begun_stepping(step, info):
    if step == 20:
        print("STEPPING", flush=True)
said(pg.fit(model, ROWS, SVI(steps=1_000_000), checkpoint=PLACE, every=1_000_000, callbacks=[begun_stepping]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_writes_a_last_checkpoint(number: int, tmp_path: Path) -> None:
    run = ended(BODY.replace("PLACE", repr(str(tmp_path))), [(0.2, number)], after="STEPPING")
    assert run.code == 0 and run.rows == ["interrupted"] and run.out[-1] == "AS BEFORE" and run.err == ""
    assert Numbered(tmp_path).read().facts["step"] == int(run.steps[0]) >= 20


CHAINS = """
from pathlib import Path
told = []
def under_way(step, info):
    if not told and all(len(list(Path(PLACE, f"chain {chain}").glob("*.json"))) == 2 for chain in range(2)):
        told.append(print("STEPPING", flush=True))
chains = NUTS(draws=100000, warmup=100, chains=2, processes=2, sampler="pyro")
said(pg.fit(model, ROWS, chains, checkpoint=PLACE, every=EVERY, callbacks=[under_way]))
"""


def _chains(folder: Path, every: int) -> str:
    return CHAINS.replace("PLACE", repr(str(folder))).replace("EVERY", str(every))


def test_chains_of_a_killed_parent_end_and_can_be_gone_on_with(tmp_path: Path) -> None:
    run = ended(_chains(tmp_path, 10), [(0.2, signal.SIGKILL)], after="STEPPING")
    assert run.code == -signal.SIGKILL and run.orphans == 0
    for chain in range(2):
        records = Numbered(tmp_path / f"chain {chain}")
        assert records.read().facts["step"] >= 10
        _claim(records)


def _claim(records: Numbered) -> None:
    """As the next run does; the system may take a moment to let go of what a killed process held."""
    for moment in range(100):
        try:
            with records.claimed():
                return
        except ValueError:
            if moment == 99:
                raise
            time.sleep(0.1)


@pytest.mark.slow
def test_chains_that_are_told_to_end_write_what_they_have(tmp_path: Path) -> None:
    run = ended(_chains(tmp_path, 150), [(0.2, signal.SIGTERM)], after="STEPPING")
    assert run.code == 0 and run.orphans == 0 and run.rows == ["interrupted"], run
    steps = [Numbered(tmp_path / f"chain {chain}").read().facts["step"] for chain in range(2)]
    assert sum(steps) == int(run.steps[0]) and any(step % 150 for step in steps)
