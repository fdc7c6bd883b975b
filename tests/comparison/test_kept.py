"""A comparison in a folder makes no finished row again, and goes on with those that were under way."""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyro
import pyro.distributions as dist
import pytest
import torch
from killed_runs import ended

import ppl_gen as pg
from ppl_gen.errors import IncompatibleError
from ppl_gen.fitting.algorithm import Iterative
from ppl_gen.inference import CAVI, EM, NUTS, SVI
from ppl_gen.inference.mcmc import nutpie_chains
from ppl_gen.inference.mcmc.kernel import _Kernel
from ppl_gen.models import gaussian_mixture

X = torch.cat([torch.linspace(-3.0, -1.0, 12), torch.linspace(1.0, 2.0, 13)])
ALGORITHMS = {
    "SVI": SVI(steps=30, lr=0.05, batch_size=7),
    "EM, short": EM(steps=4),
    "CAVI": CAVI(steps=5),
    "NUTS": NUTS(draws=8, warmup=8, chains=2, processes=1),
}


def compared(folder: Path | None, algorithms: Any = None, *, seeds: Any = (0,), data: Any = X, **settings: Any) -> Any:
    program = gaussian_mixture(components=2)
    chosen = ALGORITHMS if algorithms is None else algorithms
    return pg.compare(program, data, chosen, seeds=seeds, draws=20, progress=False, folder=folder, **settings)


def same(one: Any, other: Any) -> None:
    """All that a comparison says, and its fits."""
    seconds = ["seconds"]
    pandas.testing.assert_frame_equal(one.table().drop(columns=seconds), other.table().drop(columns=seconds), rtol=0)
    pandas.testing.assert_frame_equal(one.posteriors(), other.posteriors(), check_exact=True)
    assert one.messages == other.messages
    for a, b in zip(one.lines, other.lines, strict=True):
        assert (a.verdict, a.undiagnosed, a.fit is None) == (b.verdict, b.undiagnosed, b.fit is None)
        if a.summary is not None:
            pandas.testing.assert_frame_equal(a.summary, b.summary, check_exact=True)
            assert str(a.summary.attrs) == str(b.summary.attrs)
        if a.evidence is not None:
            assert str(a.evidence.__dict__) == str(b.evidence.__dict__) and torch.equal(
                a.evidence.values, b.evidence.values
            )
        if a.fit is not None:
            assert all(torch.equal(v, b.fit.state.unconstrained[k]) for k, v in a.fit.state.unconstrained.items())
            draws = a.fit.posterior(draws=3), b.fit.posterior(draws=3)
            assert all(torch.equal(value, draws[1][name]) for name, value in draws[0].items())


def no_steps(patch: pytest.MonkeyPatch) -> None:
    """A step of any algorithm is an error, and so is a judgement."""
    for kind in (SVI, EM, CAVI):
        patch.setattr(kind, "step", lambda *_: pytest.fail("a step"))
    patch.setattr(_Kernel, "sample", lambda *_: pytest.fail("an iteration"))
    patch.setattr(nutpie_chains._Running, "start", lambda *_: pytest.fail("a chain"))
    patch.setattr(pg.Fit, "evidence", lambda *_, **__: pytest.fail("evidence"))
    patch.setattr(pg.Fit, "diagnose", lambda *_, **__: pytest.fail("a diagnosis"))


@pytest.mark.slow
def test_finished_rows_are_not_made_again_and_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compared(tmp_path)
    assert first.facts["rows kept"].startswith("0 of 4")
    with monkeypatch.context() as patch:
        no_steps(patch)
        again = compared(tmp_path)
    assert again.facts["rows kept"].startswith("4 of 4")
    same(first, again)


def test_algorithms_and_seeds_may_be_added(tmp_path: Path) -> None:
    few, many = {"EM": EM(steps=3)}, {"EM": EM(steps=3), "longer": EM(steps=4)}
    compared(tmp_path, few)
    more = compared(tmp_path, many, seeds=(0, 1))
    assert more.facts["rows kept"].startswith("1 of 4")
    same(compared(None, many, seeds=(0, 1)), more)
    assert compared(tmp_path, few).facts["rows kept"].startswith("1 of 1")


@pytest.mark.slow
def test_a_row_that_was_under_way_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    algorithms = {"EM": EM(steps=3), "SVI": ALGORITHMS["SVI"], "longer": EM(steps=4)}
    whole, step, made = compared(None, algorithms), SVI.step, []

    def stopping(self: Any, state: Any, source: Any) -> Any:
        found = step(self, state, source)
        made.append(state.count)
        if len(made) == 17:
            signal.raise_signal(signal.SIGINT)
        return found

    monkeypatch.setattr(SVI, "step", stopping)
    part = compared(tmp_path, algorithms)
    assert [line.status for line in part.lines] == ["finished", "interrupted", "interrupted"]
    rest = compared(tmp_path, algorithms)
    assert made == list(range(1, 31)), "each step once"
    assert rest.facts["rows kept"].startswith("1 of 3")
    same(whole, rest)


@pytest.mark.slow
def test_rows_in_other_processes_are_kept_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    algorithms = {"EM": EM(steps=3), "longer": EM(steps=4)}
    first = compared(tmp_path, algorithms, n_jobs=2)
    with monkeypatch.context() as patch:
        no_steps(patch)
        again = compared(tmp_path, algorithms)
    assert again.facts["rows kept"].startswith("2 of 2")
    same(first, again)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"data": X + 1.0}, "other numbers in training rows: "),
        ({"holdout": 0.4}, r"training rows: .* was \[20\] float32, is \[15\] float32"),
        ({"particles": 7}, "particles was 100, is 7"),
        ({"algorithms": {"EM": EM(steps=6)}}, "'EM': algorithm.steps was 5, is 6"),
        ({"algorithms": {"EM": CAVI()}}, "'EM': algorithm was EM, is CAVI"),
    ],
    ids=["data", "holdout", "particles", "settings", "algorithm"],
)
def test_another_comparison_is_refused_by_what_differs(changed: Any, said: str, tmp_path: Path) -> None:
    settings = {"algorithms": {"EM": EM(steps=5)}}
    compared(tmp_path, **settings)
    with pytest.raises(ValueError, match=f"^folder: .* belongs to another comparison: .*{said}"):
        compared(tmp_path, **{**settings, **changed})
    assert compared(tmp_path, **settings).facts["rows kept"].startswith("1 of 1")


def test_another_program_is_refused(tmp_path: Path) -> None:
    compared(tmp_path, {"EM": EM(steps=3)})
    with pytest.raises(ValueError, match=r"gaussian_mixture\(components\) was 2, is 3"):
        pg.compare(gaussian_mixture(components=3), X, {"EM": EM(steps=3)}, draws=20, progress=False, folder=tmp_path)


def test_what_failed_is_tried_again_and_what_does_not_fit_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def model(x: torch.Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    algorithms = {"SVI": SVI(steps=5), "CAVI": CAVI()}

    def statuses() -> list[str]:
        result = pg.compare(model, X, algorithms, draws=20, progress=False, folder=tmp_path)
        return [*(line.status for line in result.lines), result.facts["rows kept"][:6]]

    with monkeypatch.context() as patch:
        patch.setattr(SVI, "init", lambda *_: 1 / 0)
        assert statuses() == ["failed", "incompatible", "0 of 2"]
    assert statuses() == ["finished", "incompatible", "1 of 2"]
    assert statuses() == ["finished", "incompatible", "2 of 2"]


def test_a_diverged_row_is_kept_with_its_fit(tmp_path: Path) -> None:
    def falling(x: torch.Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
            pyro.factor("down", -loc - 0.0 * loc.log() * x)

    algorithms = {"SVI": SVI(steps=60, lr=0.06, optimiser="sgd")}
    one, two = (pg.compare(falling, X, algorithms, draws=20, progress=False, folder=tmp_path) for _ in range(2))
    assert two.facts["rows kept"].startswith("1 of 1")
    for result in (one, two):
        assert result.lines[0].status == "diverged" and result.lines[0].fit.cost["steps"] == 17
    assert torch.equal(one.lines[0].fit.params["loc"], two.lines[0].fit.params["loc"])


@dataclass(frozen=True)
class _Plain(Iterative):
    needs = ()

    def init(self, run: Any) -> Any:
        raise AssertionError

    step = limit = outcome = init


def test_algorithms_that_cannot_be_kept_are_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match="folder: 'mine' cannot be kept and gone on with, as _Plain does not"):
        compared(tmp_path / "kept", {"mine": _Plain()})
    assert not (tmp_path / "kept").exists()


def test_crafted_rows_are_refused_in_words(tmp_path: Path) -> None:
    from ppl_gen.runtime.numbered import Numbered

    compared(tmp_path, {"EM": EM(steps=3)})
    cell = next(folder for folder in tmp_path.iterdir() if folder.is_dir())
    Numbered(cell).write({"kind": "row of a comparison"}, {"label": np.float64(3.0)})
    with pytest.raises(ValueError, match="holds no row of 'EM', seed 0"):
        compared(tmp_path, {"EM": EM(steps=3)})
    with pytest.raises(ValueError, match="^folder: .*holds 'notes.txt'"):
        (tmp_path / "notes.txt").write_text("x")
        compared(tmp_path, {"EM": EM(steps=3)})


KILLED = """
algorithms = {"short": SVI(steps=40, lr=0.05), "EM": EM(steps=2), "long": SVI(steps=1500, lr=0.05), "last": EM(steps=3)}
result = pg.compare(gaussian_mixture(components=2), ROWS.double(), algorithms, draws=20, folder=FOLDER)
print(result.table().drop(columns=["seconds"]).to_json(double_precision=15))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes under /proc")
def test_a_comparison_killed_again_and_again_ends_as_one_that_was_not(tmp_path: Path) -> None:
    text = KILLED.replace("FOLDER", repr(str(tmp_path)))
    for seconds in (0.3, 1.0, 2.5, 4.0):
        killed = ended(text, [(seconds, signal.SIGKILL)])
        assert killed.code == -signal.SIGKILL and killed.orphans == 0
    rest, whole = (ended(one, [], patience=300.0).out for one in (text, KILLED.replace("FOLDER", "None")))
    assert rest[1] == whole[1] and rest[1].startswith("{") and rest[-1] == whole[-1] == "AS BEFORE"
