"""Every example at full settings: it has to assert what its picture claims, and that has to hold."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_asserts_something_at_full_settings(script: Path) -> None:
    claims = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Assert)]
    assert claims, "an example that asserts nothing may show anything"
    for claim in claims:
        assert ast.unparse(claim.test) not in ("quick", "True"), "a claim that always holds is none"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_holds_what_it_claims_at_full_settings(script: Path, tmp_path: Path) -> None:
    settings = {key: value for key, value in os.environ.items() if key != "PPL_GEN_QUICK"}
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env={**settings, "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    assert script.stem == "crabs_report" or (tmp_path / f"{script.stem}.png").stat().st_size > 1000
