"""One fit by two processes that torchrun starts (`rank_runs`): one process's curve, and endings that all agree on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import rank_runs
import torch
from programs import X8, conjugate, conjugate_guide

import ppl_gen as pg
from ppl_gen.fits.together import processes_of
from ppl_gen.inference import SVI

pytestmark = pytest.mark.slow

# Of a number, or of one where it is smaller. The two sum the same float32 numbers in another order: relative errors of
# 2^-24 per operation, which Adam may carry on for 30 steps. Seen: 1e-6. Another draw or a wrong weight is seen in the
# first digits.
CURVE = 1e-5


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    pytest.importorskip("lightning_fabric")
    folder = tmp_path_factory.mktemp("together")
    script = Path(rank_runs.__file__)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    paths = os.pathsep.join(filter(None, [str(script.parents[1]), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [*command, str(script), str(folder), "curves", "endings", "dying"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert (folder / "endings-1.json").exists(), done.stderr[-3000:]
    return folder, done


def both(runs: Any, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the first process wrote of a kind of run, and the second."""
    first, second = (json.loads((runs[0] / f"{name}-{rank}.json").read_text()) for rank in (0, 1))
    return first, second


def largest(one: dict[str, list[float]], other: dict[str, list[float]]) -> float:
    """The largest difference between two mappings from names to numbers, over the number where it is above one."""
    assert one.keys() == other.keys()
    pairs = [pair for name in one for pair in zip(one[name], other[name], strict=True)]
    return max((abs(a - b) / max(1.0, abs(b)) for a, b in pairs), default=0.0)


@pytest.mark.parametrize("name", rank_runs.CURVES)
def test_two_processes_give_the_curve_of_one_at_the_same_global_batch(runs: Any, name: str) -> None:
    first, second = (found[name]["together"] for found in both(runs, "curves"))
    alone = both(runs, "curves")[0][name]["alone"]
    assert "error" not in first, first.get("said")
    for what in ("records", "params", "buffers", "checks", "status", "steps"):
        assert first[what] == second[what], what  # bit for bit
    # The spread of made rows is a ratio of deviations, one of each share.
    records = [{k: v for k, v in found["records"].items() if k != "spread"} for found in (first, alone)]
    assert largest(*records) <= CURVE
    assert largest(first["params"], alone["params"]) <= CURVE
    assert "noise" not in first["notes"]
    losses = alone["records"]["program_loss"]
    assert max(losses) - min(losses) > 1e3 * CURVE  # there was something to follow


SAME = ["batch norm", "unseeded", "other noise", "continued", "after all that", "a rule that converges"]


@pytest.mark.parametrize("name", SAME)
def test_both_processes_return_the_same_fit(runs: Any, name: str) -> None:
    first, second = (found[name] for found in both(runs, "endings"))
    assert "error" not in first, first.get("said")
    for what in ("records", "params", "buffers", "checks", "status", "message"):
        assert first[what] == second[what], what


def test_a_run_goes_on_from_what_the_first_process_kept_to_the_same_bits(runs: Any) -> None:
    for found in both(runs, "endings"):
        assert found["kept, interrupted"]["status"] == "interrupted" and found["kept, interrupted"]["steps"] == 14
        assert found["kept, gone on"]["notes"]["resumed"] == "went on from a checkpoint after 14 of 30 steps"
        for what in ("records", "params", "buffers", "status", "steps"):
            assert found["kept, gone on"][what] == found["kept, in one go"][what] == found["kept, finished"][what], what
    first, second = both(runs, "endings")
    assert first["kept, gone on"]["params"] == second["kept, gone on"]["params"]


def test_the_checkpoints_of_another_fit_are_refused_on_all(runs: Any) -> None:
    first, second = (found["kept, another fit"] for found in both(runs, "endings"))
    assert first["error"] == "ValueError" and "belongs to another fit" in first["said"]
    assert second["error"] == "RankError" and "belongs to another fit" in second["said"]


def test_running_statistics_are_those_of_all_rows(runs: Any) -> None:
    found = both(runs, "endings")[0]["batch norm"]["buffers"]
    assert found["net$$$1.num_batches_tracked"] == [30.0]
    assert "every process normalises by its own share" in both(runs, "endings")[0]["batch norm"]["notes"]["batch norm"]
    assert found["net$$$1.running_mean"] != [0.0] * 4 and found["net$$$1.running_var"] != [1.0] * 4


def test_two_processes_learn_what_one_does_where_their_noise_is_their_own(runs: Any) -> None:
    # Dropout and gamma draws: other numbers than one process has, of the same law. The losses of the last 20 steps
    # have a standard deviation below 0.5 (measured), so their means differ by 0.5 * sqrt(2/20) = 0.16 or so.
    first = both(runs, "endings")[0]["other noise"]
    alone = pg.fit(rank_runs.dropping(), rank_runs.ROWS, rank_runs.svi(batch_size=10, steps=60), seed=3)
    one, two = (sum(losses[-20:]) / 20 for losses in (alone.records["program_loss"], first["records"]["program_loss"]))
    assert "each process's own" in first["notes"]["noise"]
    assert one != two and abs(one - two) < 5 * 0.16
    assert first["records"]["program_loss"][0] > two + 5 * 0.16  # and it has learned something


@pytest.mark.parametrize(("name", "steps"), [("not finite", 6), ("not finite at first", 0)])
def test_what_is_not_finite_in_one_process_ends_both_at_the_same_step(runs: Any, name: str, steps: int) -> None:
    for found in both(runs, "endings"):
        assert found[name]["error"] == "NonFiniteError"
        assert found[name]["fit"]["steps"] == steps == len(found[name]["fit"]["records"].get("program_loss", []))
    first, second = (f[name]["fit"] for f in both(runs, "endings"))
    assert first["params"] == second["params"] and first["records"] == second["records"]


ERRORS = {
    "fails on one": ("RuntimeError", "the last row is of another kind"),
    "a callback fails": ("OSError", "no space left"),
    "bad data on one": ("ValueError", "NaN or infinite"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_in_one_process_is_raised_in_both(runs: Any, name: str) -> None:
    first, second = (found[name] for found in both(runs, "endings"))
    kind, said = ERRORS[name]
    assert second["error"] == kind and said in second["said"]
    assert first["error"] == "RankError" and first["said"].startswith("rank 1 failed: ") and said in first["said"]


@pytest.mark.parametrize(("name", "steps"), [("a signal", 8), ("a callback ends it", 6)])
def test_an_interrupt_in_one_process_ends_both_after_the_same_step(runs: Any, name: str, steps: int) -> None:
    first, second = (found[name] for found in both(runs, "endings"))
    assert first["status"] == second["status"] == "interrupted" and first["steps"] == second["steps"] == steps
    assert first["params"] == second["params"] and first["records"] == second["records"]


@pytest.mark.parametrize(
    ("name", "status"), [("a rule of one clock", "converged"), ("a rule on held-out rows", "stopped")]
)
def test_rules_end_both_at_the_same_step(runs: Any, name: str, status: str) -> None:
    first, second = (found[name] for found in both(runs, "endings"))
    assert first["status"] == second["status"] == status and first["message"] == second["message"]
    assert 0 < first["steps"] == second["steps"] < 400
    assert first["checks"] == second["checks"]


DIFFERENT = {
    "frozen, unseeded": "frozen weights",
    "other data": "data",
    "other rows": "rows of the data",
    "another seed": "seed",
    "other settings": "algorithm",
    "checkpoints of one": "checkpoint",
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_processes_that_were_given_something_else_are_told(runs: Any, name: str) -> None:
    for found in both(runs, "endings"):
        assert found[name]["error"] == "ValueError"
        assert f"other than on rank 0 are: {DIFFERENT[name]} on rank(s) 1" in found[name]["said"]


REFUSED = {
    "EM": "EM needs all rows in one process",
    "NUTS": "NUTS needs all rows in one process",
    "local points": "an autoguide holds one set of parameters per row",
    "no plate": "it has no plate over its rows",
    "a stream": "hands whole batches to one process",
    "one row": "cannot share a batch of 1 row(s)",
    "coupled rows": "depends on the other rows of its batch",
    "tied rows": "are summed out in the model, which minibatches do not allow",
    "joint logsumexp": "with all rows inside of it",
    "chunks": "draws every chunk twice",
    "Renyi": "may hold all rows inside one logarithm",
    "a function": "need not be a sum over the rows",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_shared_is_refused_with_its_reason(runs: Any, name: str) -> None:
    for found in both(runs, "endings"):
        assert found[name]["error"] == "IncompatibleError"
        assert found[name]["said"].startswith("fabric: ") and REFUSED[name] in found[name]["said"]


def test_a_path_that_is_not_taken_by_several_processes_is_refused_where_it_was_asked_for(runs: Any) -> None:
    for found in both(runs, "endings"):
        assert found["captured"]["error"] == "ValueError"
        assert "compile='graph' does not go together with fabric" in found["captured"]["said"]


def test_only_the_first_process_warns(runs: Any) -> None:
    first, second = both(runs, "endings")
    assert any("unscaled columns" in said for said in first["warned"]["warned"]) and not second["warned"]["warned"]


def test_questions_have_one_answer_on_all_processes(runs: Any) -> None:
    first, second = both(runs, "endings")
    assert first["evidence"] == second["evidence"]


def test_a_process_that_is_gone_ends_the_others(runs: Any) -> None:
    folder, done = runs
    assert done.returncode != 0 and not (folder / "dying-1.json").exists()
    found = json.loads((folder / "dying-0.json").read_text())["gone"]
    assert found["error"] == "RankError" and "another process ended while rank 0 waited for it" in found["said"]


def test_what_is_no_launched_fabric_for_ddp_is_refused() -> None:
    fabrics = pytest.importorskip("lightning_fabric")
    algorithm, program = SVI(steps=1), pg.Program(conjugate, conjugate_guide)
    with pytest.raises(TypeError, match=r"fabric: expected a lightning_fabric.Fabric.*ppl_gen\[fabric\]"):
        pg.fit(program, X8, algorithm, fabric=2)
    with pytest.raises(ValueError, match="precision='bf16-mixed' is not applied"):
        pg.fit(program, X8, algorithm, fabric=fabrics.Fabric(accelerator="cpu", devices=1, precision="bf16-mixed"))
    with pytest.raises(ValueError, match=r"call fabric.launch\(\)"):
        pg.fit(program, X8, algorithm, fabric=fabrics.Fabric(accelerator="cpu", devices=2, strategy="ddp"))
    with pytest.raises(ValueError, match="device: this process's is cpu"):
        processes_of(fabrics.Fabric(accelerator="cpu", devices=1), torch.device("cuda"))
    one = pg.fit(program, X8, algorithm, fabric=fabrics.Fabric(accelerator="cpu", devices=1))
    assert one.records == pg.fit(program, X8, algorithm).records
