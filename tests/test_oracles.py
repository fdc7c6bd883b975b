"""The recorded oracles hold for the code as it is: their page is written by hand, and may be older."""

import importlib
from pathlib import Path

import pytest
import torch

from ppl_gen.workspace.isolation import isolated


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of fits that are shortened on purpose
def test_no_recorded_oracle_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    oracles = importlib.import_module("oracles")
    checks = []
    for oracle in oracles.ORACLES:
        with isolated(0, dtype=torch.float32 if oracle is oracles.parallel_lines else torch.float64):
            checks += oracle()
    assert len(checks) > 70
    assert not [check.row() for check in checks if not check.passed]
