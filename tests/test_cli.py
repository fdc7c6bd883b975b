"""The command line: thin, with exit codes that mean something and errors in one sentence."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import ppl_gen as pg
from ppl_gen.cli import algorithm_of, data_of, main, program_of
from ppl_gen.inference import IWAE, SVI

PROGRAM = """
import pyro, pyro.distributions as dist, torch
import ppl_gen as pg

def model(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

def line(t, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(t)):
        pyro.sample("y", dist.Normal(slope * t, 1.0), obs=y)

def made(width=10.0):
    def wide(x):
        loc = pyro.sample("loc", dist.Normal(0.0, width))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
    return pg.Program(wide)

def maker():
    return pg.Recipe(lambda x: pg.Program(model))

ready = pg.Program(model)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(PROGRAM)
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(3.0, 1.0, 40))
    t = np.linspace(-1, 1, 30)
    np.savetxt(tmp_path / "line.csv", np.stack([t, 2 * t], 1), delimiter=",", header="t,y", comments="")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_fits_and_comparisons_go_on_from_their_folders(folder, capsys):
    fit = ["fit", "mine.py:model", "x.npy", "--algorithm", "SVI:steps=40", "--checkpoint", "run", "--every", "10"]
    code, first, _ = _said(capsys, fit)
    assert code == 0 and len(list((folder / "run").glob("*.json"))) == 2
    before = sorted(file.name for file in (folder / "run").iterdir())
    code, again, _ = _said(capsys, fit)
    assert code == 0 and before == sorted(file.name for file in (folder / "run").iterdir())
    assert first.splitlines()[:-1] == again.splitlines()[:-1], "the same table"
    code, _, err = _said(capsys, [*fit, "--seed", "1"])
    assert code == 1 and "run belongs to another fit: seed was 0, is 1" in err
    for wrong in ("0", "3h", "s", "often", "-5"):
        code, _, err = _said(capsys, [*fit[:-1], wrong])
        assert code == 2 and "--every" in err
    compare = ["compare", "mine.py:model", "x.npy", "--algorithm", "SVI:steps=20", "--folder", "kept"]
    assert [_said(capsys, compare)[0] for _ in range(2)] == [0, 0]
    assert len([place for place in (folder / "kept").iterdir() if place.is_dir()]) == 1


def _said(capsys, arguments):
    code = main(arguments)
    output = capsys.readouterr()
    assert "Traceback" not in output.out + output.err
    return code, output.out, output.err


# What works.


def test_fit_prints_the_verdict_and_saves(folder, capsys) -> None:
    code, out, _ = _said(
        capsys, ["fit", "mine.py:model", "x.npy", "--steps", "300", "--lr", "0.05", "--seed", "4", "--out", "kept"]
    )
    assert code == 0 and "loc" in out and any(word in out for word in ("trust:", "doubtful:", "do not trust:"))
    kept = pg.load(folder / "kept", program=program_of("mine.py:model"))
    assert kept.seed == 4 and abs(float(kept.posterior()["loc"].mean()) - np.load("x.npy").mean()) < 0.2


def test_compare_prints_a_table_and_writes_a_report(folder, capsys) -> None:
    code, out, _ = _said(
        capsys,
        ["compare", "mine.py:line", "line.csv", "--algorithm", "SVI:steps=200,lr=0.05", "--algorithm", "SVI:steps=2"]
        + ["--seeds", "0,1", "--holdout", "0.3", "--out", "r.html"],
    )
    assert code == 0 and "nats per held-out row" in out and str(folder / "r.html") in out
    text = (folder / "r.html").read_text()
    assert "21 rows to train on, 9 held out" in text and "SVI(steps=200, lr=0.05)" in text


def test_compare_saves_a_folder(folder, capsys) -> None:
    code, _, _ = _said(capsys, ["compare", "mine.py:model", "x.npy", "--algorithm", "SVI:steps=5", "--out", "kept"])
    assert code == 0
    names = {p.name for p in (folder / "kept").iterdir()}
    (contents,) = [name for name in names if name.startswith("contents-")]
    assert names == {"table.csv", "rows.csv", "comparison.json", "report.html", contents}
    kept = json.loads((folder / "kept" / "comparison.json").read_text())["fits"][0]["folder"]
    assert kept.startswith(f"{contents}/fits/") and (folder / "kept" / kept / "fit.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)  # two interpreters start
def test_a_program_of_a_file_travels_to_other_processes(folder, capsys) -> None:
    code, out, err = _said(
        capsys,
        [
            "compare",
            "mine.py:model",
            "x.npy",
            "--algorithm",
            "SVI:steps=3",
            "--algorithm",
            "SVI:steps=4",
            "--jobs",
            "2",
        ],
    )
    assert code == 0, err


def test_list_names_everything(capsys) -> None:
    code, out, _ = _said(capsys, ["list"])
    assert code == 0
    for name in ("gaussian_mixture", "SVI", "crabs", "needs density", "offers density", "fashion-mnist"):
        assert name in out


@pytest.mark.parametrize("arguments", [["--help"], ["fit", "--help"], ["compare", "--help"], ["demo", "--help"]])
def test_help(capsys, arguments) -> None:
    code, out, _ = _said(capsys, arguments)
    assert code == 0 and "Usage" in out and "--help" in out


@pytest.mark.slow
def test_demo_compares_four_algorithms(folder, capsys) -> None:
    code, out, _ = _said(capsys, ["demo", "--quick", "--out", "crabs.html"])
    assert code == 0 and all(name in out for name in ("EM", "CAVI", "SVI", "NUTS"))
    assert (folder / "crabs.html").stat().st_size > 100_000


# What does not.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "nothing", "x.npy"], "no program 'nothing'; there is gaussian_mixture"),
        (["fit", "absent.py:model", "x.npy"], "no file absent.py"),
        (["fit", "mine.py:absent", "x.npy"], "with one of: model, line, made, maker, ready"),
        (["fit", "gaussian_mixture:parts=2", "crabs"], "unexpected keyword argument 'parts'"),
        (["fit", "gaussian_mixture:components", "crabs"], "expected option=value, got 'components'"),
        (["fit", "mine.py:model", "absent.npy"], "no file absent.npy"),
        (["fit", "mine.py:model", "shrimps"], "expected crabs"),
        (["fit", "mine.py:model", "bad.csv"], "expected rows of numbers"),
        (["fit", "mine.py:model", "x.npy", "--algorithm", "EMM"], "no algorithm 'EMM'; there is"),
        (["fit", "mine.py:model", "x.npy", "--algorithm", "SVI:speed=3"], "no setting speed; it has: objective, steps"),
        (["fit", "mine.py:model", "x.npy", "--lr", "-1"], "lr: expected a positive number"),
        (["fit", "mine.py:model"], "Missing argument"),
        (["fit", "mine.py:model", "x.npy", "--steps", "0"], "--steps"),
        (["compare", "mine.py:model", "x.npy"], "--algorithm"),
        (["compare", "mine.py:model", "x.npy", "--algorithm", "SVI", "--holdout", "2"], "--holdout"),
        (["compare", "mine.py:model", "x.npy", "--algorithm", "SVI", "--seeds", "a"], "whole numbers such as 0,1,2"),
        (["dance"], "dance"),
    ],
)
def test_misuse_exits_with_2(folder, capsys, arguments, message) -> None:
    (folder / "bad.csv").write_text("1,2\n3\n")
    code, _, err = _said(capsys, arguments)
    assert code == 2 and message in err


def test_a_fit_that_diverges_exits_with_1(folder, capsys) -> None:
    code, _, err = _said(capsys, ["fit", "mine.py:model", "x.npy", "--steps", "200", "--lr", "1e30"])
    assert code == 1 and "not finite" in err


def test_a_comparison_with_a_failure_exits_with_1_and_shows_the_rest(folder, capsys) -> None:
    code, out, err = _said(
        capsys,
        ["compare", "mine.py:model", "x.npy", "--algorithm", "SVI:steps=5", "--algorithm", "SVI:steps=200,lr=1e30"],
    )
    assert code == 1 and "diverged" in err and "not finite" in err and "finished" in out


def test_bad_data_exits_with_1(folder, capsys) -> None:
    np.save(folder / "nan.npy", np.array([1.0, np.nan]))
    code, _, err = _said(capsys, ["fit", "mine.py:model", "nan.npy"])
    assert code == 1 and "NaN" in err


def test_debug_shows_the_traceback(folder) -> None:
    np.save(folder / "nan.npy", np.array([1.0, np.nan]))
    with pytest.raises(ValueError, match="NaN"):
        main(["fit", "mine.py:model", "nan.npy", "--debug"])


def test_the_process_exits_with_the_code(folder) -> None:
    code = "import sys; from ppl_gen.cli import main; print('typer' in sys.modules); sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, "fit", "x", "y"], capture_output=True, text=True)
    assert done.returncode == 2 and "no program 'x'" in done.stderr and "Traceback" not in done.stderr
    assert done.stdout.strip() == "False", "typer is imported when a command runs"


# How words become objects.


def test_programs(folder) -> None:
    assert program_of("gaussian_mixture:components=3,weights=equal").arguments["weights"] == "equal"
    assert (
        isinstance(program_of("mine.py:ready"), pg.Program)
        and isinstance(program_of("mine.py:made"), pg.Program) is False
    )
    assert isinstance(program_of("mine.py:made:width=2.0"), pg.Program)
    assert isinstance(program_of("mine.py:maker"), pg.Recipe), "a function without arguments is a maker"


def test_algorithms() -> None:
    assert algorithm_of("SVI:steps=5,lr=0.1,optimiser=sgd") == SVI(steps=5, lr=0.1, optimiser="sgd")
    assert isinstance(algorithm_of("SVI:objective=IWAE").objective, IWAE)


def test_data(folder) -> None:
    assert torch.equal(data_of("crabs"), pg.load_data("crabs"))
    assert data_of("x.npy").shape == (40,)
    assert data_of("line.csv").shape == (30, 2), "no model asks for the columns by name"
    named = data_of("line.csv", program_of("mine.py:line"))
    assert list(named) == ["t", "y"] and np.allclose(named["y"], 2 * named["t"])
    (folder / "plain.csv").write_text("1\n2\n\n3\n")
    assert data_of("plain.csv").tolist() == [1.0, 2.0, 3.0]
