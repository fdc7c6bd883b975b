"""Bars: what they say of time, of chains, and of the fits of a comparison."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

import ppl_gen as pg
from ppl_gen.comparison.processes import _BEGUN, _mark, _running
from ppl_gen.inference import NUTS, SVI
from ppl_gen.inference.mcmc.report import Report
from ppl_gen.runtime.progress import Part, ProgressBar, called, rate

X = torch.linspace(-1.0, 1.0, 20)

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")


def model(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def test_a_bar_shows_time_and_rate(capsys):
    with ProgressBar(True, "EM") as shown:
        shown(5, 10, "loss 1.5")
        task = shown.bar.tasks[0]
        assert (task.completed, task.total, task.fields["text"]) == (5, 10, "loss 1.5")
        shown(10, 10, "loss 1.0")
    said = capsys.readouterr().err
    assert "EM" in said and "10/10" in said and "0:00:0" in said and "loss 1.0" in said


def test_a_bar_stays_on_one_line_of_a_narrow_screen(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with ProgressBar(True, "SVI, seed 1 (2 of 6)") as shown:
        shown(250, 500, "program_loss 1.437  reconstruction 1.396  kl 0.04046")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1 and len(lines[0]) <= 80
    assert "250/500" in lines[0] and lines[0].rstrip().endswith("…")


def test_rates_are_of_steps_or_of_seconds():
    assert [rate(s) for s in (0.0, 0.5, 9.96, 12345.6)] == ["", "2.0 s each", "10.0/s", "12,346/s"]


def test_a_bar_bears_the_name_of_the_cell(capsys):
    with called("first, seed 0 (1 of 2)"), ProgressBar(True, "EM") as shown:
        assert shown.bar.tasks[0].description == "first, seed 0 (1 of 2)"
    with ProgressBar(True, "EM") as shown:
        assert shown.bar.tasks[0].description == "EM"
    pg.compare(model, X, {"a": SVI(steps=3), "b": SVI(steps=3)}, progress=True)
    said = capsys.readouterr().err
    assert "a, seed 0 (1 of 2)" in said and "b, seed 0 (2 of 2)" in said


def test_a_phase_that_begins_has_a_bar_from_nought(capsys):
    with ProgressBar(True, "NUTS") as shown:
        shown.parts([Part("chain 1 warm-up", 9, 10), Part("chain 2 warm-up", 3, 10)])
        shown.parts([Part("chain 1 sampling", 2, 50), Part("chain 2 warm-up", 8, 10)])
        _, first, second = shown.bar.tasks
        assert (first.description, first.completed, first.total) == ("  chain 1 sampling", 2, 50)
        assert (second.description, second.completed, second.total) == ("  chain 2 warm-up", 8, 10)
    capsys.readouterr()


def test_chains_show_warm_up_apart_from_sampling(capsys, monkeypatch):
    seen = []
    part = Report._part
    monkeypatch.setattr(Report, "_part", lambda *given: seen.append(part(*given)) or seen[-1])
    monkeypatch.setattr(
        "ppl_gen.inference.mcmc.report.time.monotonic", iter(range(10**6)).__next__
    )  # every look is shown
    pg.fit(model, X, NUTS(draws=6, warmup=4, chains=2, processes=1, thin=2, sampler="pyro"), progress=True)
    first = [p for p in seen if p.label.startswith("chain 1")]
    assert {(p.label, p.total) for p in first} == {("chain 1 warm-up", 4), ("chain 1 sampling", 12)}
    assert first[-1] == Part("chain 1 sampling", 12, 12) and seen[-1] == Part("chain 2 sampling", 12, 12)
    assert "chain 2 sampling" in capsys.readouterr().err


def test_fits_under_way_are_those_begun_and_not_done(tmp_path):
    jobs, done = [("a", SVI(), 0), ("b", SVI(), 0), ("c", SVI(), 1)], {}
    names = _running(tmp_path, jobs, done)
    assert names() == ""
    for i in (0, 2):
        _mark(tmp_path, _BEGUN, i).touch()
    assert names() == "a, seed 0; c, seed 1"
    done[0] = None
    assert names() == "c, seed 1"


@pytest.mark.slow
@pytest.mark.timeout(600)  # two interpreters start
def test_a_comparison_in_processes_shows_what_runs(capsys):
    result = pg.compare(model, X, {"a": SVI(steps=2000), "b": SVI(steps=2000)}, n_jobs=2, progress=True)
    assert result.table()["status"].tolist() == ["finished"] * 2
    assert "2/2" in capsys.readouterr().err
