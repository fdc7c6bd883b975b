"""A fit that was stopped goes on where its checkpoint stands, and ends at the same bits as one that was not."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from programs import X8, both, both_guide
from pyro.infer.autoguide import AutoLaplaceApproximation
from resumable_runs import RUNS, numbers, same
from torch import nn

import ppl_gen as pg
from ppl_gen.errors import IncompatibleError, NonFiniteError
from ppl_gen.extending import PointPosterior
from ppl_gen.fitting.algorithm import Iterative
from ppl_gen.fitting.run import Outcome
from ppl_gen.fitting.stopping import Patience
from ppl_gen.inference import IWAE, SVI
from ppl_gen.runtime.numbered import Numbered


def interrupting(after: int) -> Callable[[int, Any], None]:
    def stop(step: int, info: Any) -> None:
        if step == after:
            raise KeyboardInterrupt

    return stop


def killing(after: int) -> Callable[[int, Any], None]:
    """As a kill: the run writes nothing more."""

    def stop(step: int, info: Any) -> None:
        if step == after:
            raise SystemExit

    return stop


def all_of(fit: pg.Fit) -> dict[str, Any]:
    """What has to be equal: numbers, history, checks, ending, counts."""
    told = {"status": str(fit.status), "message": fit.message}
    cost = {name: value for name, value in fit.cost.items() if "seconds" not in name}
    notes = {name: note for name, note in fit.notes.items() if name != "resumed"}
    records = {name: torch.tensor(values, dtype=torch.float64) for name, values in fit.records.items()}
    return {**numbers(fit), **records, "checks": fit.checks, "told": told, "cost": cost, "notes": notes}


@pytest.mark.parametrize("ended", [interrupting, killing])
@pytest.mark.parametrize("after", [1, 5])
@pytest.mark.parametrize("name", RUNS)
def test_a_stopped_run_goes_on_bit_for_bit(name: str, after: int, ended: Any, tmp_path: Path) -> None:
    made, algorithm, data = RUNS[name]
    program = made()

    def learned(**settings: Any) -> pg.Fit:
        return pg.fit(program, data, algorithm, seed=3, progress=False, **settings)

    whole = learned()
    try:
        stopped = learned(checkpoint=tmp_path / "run", every=2, callbacks=[ended(after)])
    except SystemExit:
        stopped = None
    assert stopped is None or (stopped.status is pg.Status.INTERRUPTED and stopped.cost["steps"] == after)
    assert stopped is None or not same(numbers(stopped), numbers(whole)), "a run that had arrived would show nothing"
    seen: list[int] = []
    resumed = learned(checkpoint=tmp_path / "run", every=2, callbacks=[lambda step, info: seen.append(step)])
    begun = after + 1 if ended is interrupting else after - (after - 1) % 2  # the last multiple of 2 before it
    assert seen == list(range(begun, 10)) and "resumed" in resumed.notes
    assert same(all_of(whole), all_of(resumed)), (all_of(whole), all_of(resumed))
    again = learned(checkpoint=tmp_path / "run", callbacks=[interrupting(1)])
    assert same(all_of(whole), all_of(again)) and again.status is whole.status, "a finished fit takes no step"


@pytest.mark.parametrize("after", [1, 2, 5])
@pytest.mark.parametrize("name", [name for name, (_, algorithm, _) in RUNS.items() if isinstance(algorithm, SVI)])
def test_captured_steps_go_on_too(name: str, after: int, tmp_path: Path) -> None:
    """Before the step is captured, as it is, and after: what is replayed is captured anew."""
    made, algorithm, data = RUNS[name]
    program = made()

    def learned(**settings: Any) -> pg.Fit:
        return pg.fit(program, data, algorithm, seed=3, progress=False, compile="graph", **settings)

    whole = learned()
    assert whole.cost["path"] == "graph" or "path_reason" in whole.cost
    learned(checkpoint=tmp_path, callbacks=[interrupting(after)])
    assert same(all_of(whole), all_of(learned(checkpoint=tmp_path)))


def _watched(**settings: Any) -> pg.Fit:
    program = pg.Program(both, both_guide)
    algorithm = SVI(steps=200, lr=0.3, batch_size=3, stop_rule=Patience(checks=2))
    return pg.fit(program, X8, algorithm, seed=1, progress=False, validation=X8 + 0.5, validate_every=10, **settings)


@pytest.mark.parametrize("after", [9, 10, 11, 50, 57])
def test_checks_and_early_stopping_go_on(after: int, tmp_path: Path) -> None:
    """Also where the run ends between a step and the look that follows it (10: a check, 50: the stopping rule)."""
    whole = _watched()
    assert whole.status is pg.Status.STOPPED and whole.cost["steps"] == 100 and len(whole.checks["step"]) == 9
    _watched(checkpoint=tmp_path, every=1000, callbacks=[interrupting(after)])
    resumed = _watched(checkpoint=tmp_path)
    assert same(all_of(whole), all_of(resumed))
    assert same(all_of(whole), all_of(_watched(checkpoint=tmp_path, callbacks=[interrupting(1)])))


def _normal(x: torch.Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def test_every_moment_of_a_run_can_be_its_end(tmp_path: Path) -> None:
    """One step at a time, each in a fit of its own: as one fit of all."""
    algorithm = SVI(steps=12, lr=0.1)
    whole = pg.fit(_normal, X8, algorithm, progress=False)
    for step in range(1, 12):
        part = pg.fit(_normal, X8, algorithm, progress=False, checkpoint=tmp_path, callbacks=[interrupting(step)])
        assert part.cost["steps"] == step
    assert same(all_of(whole), all_of(pg.fit(_normal, X8, algorithm, progress=False, checkpoint=tmp_path)))


def test_more_steps_go_further_and_fewer_are_refused(tmp_path: Path) -> None:
    def learned(steps: int, **settings: Any) -> pg.Fit:
        return pg.fit(
            _normal, X8, SVI(steps=steps, lr=0.1), progress=False, validation=X8, validate_every=4, **settings
        )

    learned(10, checkpoint=tmp_path)  # the check at step 10 is due for it is the last
    assert same(all_of(learned(18)), all_of(learned(18, checkpoint=tmp_path)))
    with pytest.raises(ValueError, match="it belongs to a run of 18 steps, and now there are 17"):
        learned(17, checkpoint=tmp_path)


def test_epochs_may_grow(tmp_path: Path) -> None:
    def learned(epochs: int, **settings: Any) -> pg.Fit:
        return pg.fit(_normal, X8, SVI(epochs=epochs, batch_size=3, lr=0.1), progress=False, **settings)

    learned(2, checkpoint=tmp_path)
    assert same(all_of(learned(5)), all_of(learned(5, checkpoint=tmp_path)))


def _scaled(x: torch.Tensor, scale: float) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, scale), obs=x)


def _wide(x: torch.Tensor, scale: float) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 11.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, scale), obs=x)


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "seed": ({"seed": 1}, "seed was 0, is 1"),
    "dtype": ({"dtype": torch.float32}, "dtype was float64, is float32"),
    "data": ({"data": {"x": X8 + 1, "scale": 1.0}}, "other numbers in data: x"),
    "rows": ({"data": {"x": X8[:5], "scale": 1.0}}, r"data: x was \[8\] float64, is \[5\] float64"),
    "constant": ({"data": {"x": X8, "scale": 2.0}}, r"data: scale \(constant\) was 1.0, is 2.0"),
    "lr": ({"algorithm": SVI(steps=8, lr=0.2)}, "algorithm.lr was 0.1, is 0.2"),
    "batch": ({"algorithm": SVI(steps=8, lr=0.1, batch_size=4)}, "algorithm.batch_size was None, is 4"),
    "schedule": (
        {"algorithm": SVI(steps=8, lr=0.1, schedule=lambda o: torch.optim.lr_scheduler.StepLR(o, 3))},
        "algorithm.schedule was None, is a function",
    ),
    "objective": (
        {"algorithm": SVI(IWAE(particles=3), steps=8, lr=0.1)},
        "algorithm.objective: class was .*ELBO, is .*IWAE",
    ),
    "program": ({"program": _wide}, "the source of model changed"),
    "validation": ({"validation": {"x": X8, "scale": 1.0}}, "validation: x is new"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_fit_is_refused_by_what_differs(name: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "program": _scaled,
        "data": {"x": X8, "scale": 1.0},
        "algorithm": SVI(steps=8, lr=0.1),
        "progress": False,
        "checkpoint": tmp_path / "run",
    }
    pg.fit(**settings)
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    changed, said = OTHERS[name]
    with pytest.raises(ValueError, match=f"belongs to another fit: .*{said}"):
        pg.fit(**{**settings, **changed})
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    pg.fit(**settings)


def test_weights_that_are_learned_may_begin_elsewhere(tmp_path: Path) -> None:
    """A script that does not seed its networks is the same fit: what it goes on with is in the checkpoint."""

    def made() -> Any:
        net = nn.Linear(1, 1)

        def model(x: torch.Tensor) -> None:
            pyro.module("net", net)
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(net(torch.ones(len(x), 1)).squeeze(-1), 1.0), obs=x)

        return model

    torch.manual_seed(0)
    whole = pg.fit(made(), X8, SVI(steps=9, lr=0.1), progress=False)
    torch.manual_seed(0)
    pg.fit(made(), X8, SVI(steps=9, lr=0.1), progress=False, checkpoint=tmp_path, callbacks=[interrupting(4)])
    torch.manual_seed(99)
    resumed = pg.fit(made(), X8, SVI(steps=9, lr=0.1), progress=False, checkpoint=tmp_path)
    assert same(all_of(whole), all_of(resumed))


def test_networks_that_are_called_without_being_registered_keep_their_buffers(tmp_path: Path) -> None:
    norm = nn.BatchNorm1d(1, affine=False)

    def model(x: torch.Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc + 0 * norm(x.unsqueeze(-1)).squeeze(-1) + norm.running_var, 1.0), obs=x)

    def learned(**settings: Any) -> pg.Fit:
        return pg.fit(model, X8, SVI(steps=9, lr=0.1, batch_size=3), progress=False, **settings)

    whole = learned()
    learned(checkpoint=tmp_path, callbacks=[interrupting(5)])
    assert same(all_of(whole), all_of(learned(checkpoint=tmp_path)))


def test_a_diverged_run_says_so_again_without_a_step(tmp_path: Path) -> None:
    def bad(x: torch.Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
            pyro.factor("down", -loc - 0.0 * loc.log() * x)  # 0.06 a step, and NaN below 0

    def error(**settings: Any) -> NonFiniteError:
        with pytest.raises(NonFiniteError) as caught:
            pg.fit(bad, X8, SVI(steps=200, lr=0.06, optimiser="sgd"), progress=False, **settings)
        return caught.value

    whole = error()
    assert whole.fit.cost["steps"] == 17
    ended = error(checkpoint=tmp_path / "a", every=3)
    again = error(checkpoint=tmp_path / "a", callbacks=[interrupting(1)])
    after = int(whole.fit.cost["steps"]) - 1
    pg.fit(
        bad,
        X8,
        SVI(steps=200, lr=0.06, optimiser="sgd"),
        progress=False,
        checkpoint=tmp_path / "b",
        callbacks=[interrupting(after)],
    )
    resumed = error(checkpoint=tmp_path / "b")
    for one in (ended, again, resumed):
        assert same(all_of(whole.fit), all_of(one.fit))


@dataclass(frozen=True)
class _Plain(Iterative):
    needs = ()

    def init(self, run: Any) -> Any:
        raise AssertionError("it is refused before it begins")

    def step(self, state: Any, source: Any) -> Any:
        raise NotImplementedError

    def limit(self, run: Any) -> int:
        return 3

    def outcome(self, state: Any, run: Any) -> Outcome:
        return Outcome(PointPosterior({}))


@dataclass(frozen=True)
class _Odd(_Plain):
    """Its state holds what no checkpoint does."""

    def init(self, run: Any) -> Any:
        return None

    def state_dict(self, state: Any) -> dict[str, Any]:
        return {"rule": len}

    def load_state_dict(self, state: Any, saved: Any) -> Any:
        return None


def test_algorithms_that_cannot_be_kept_say_so_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match=r"checkpoint: a run of _Plain cannot be kept .* state_dict\(state\)"):
        pg.fit(_normal, X8, _Plain(), checkpoint=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(IncompatibleError, match=r"_Odd cannot be resumed: .*\['rule'\]: a builtins.builtin_function"):
        pg.fit(_normal, X8, _Odd(), checkpoint=tmp_path / "run")


def _remembering() -> Any:
    seen: list[int] = []

    def model(x: torch.Tensor) -> None:
        seen.append(1)
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0 + len(seen)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    return model


def test_programs_that_remember_in_python_are_refused(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match="changes seen as it runs, which a checkpoint cannot hold"):
        pg.fit(_remembering(), X8, SVI(steps=5), checkpoint=tmp_path / "run")


@pytest.mark.parametrize("every", [0, -3, True, 0.5, "30s", datetime.timedelta(0), datetime.timedelta(seconds=-1)])
def test_an_interval_is_a_number_of_steps_or_a_time(every: Any, tmp_path: Path) -> None:
    with pytest.raises((ValueError, TypeError), match=r"^every: expected "):
        pg.fit(_normal, X8, SVI(steps=5), checkpoint=tmp_path / "run", every=every)
    assert not (tmp_path / "run").exists()


def test_an_interval_of_time(tmp_path: Path) -> None:
    stamps: list[int] = []

    def watch(step: int, info: Any) -> None:
        stamps.append(max(int(file.stem) for file in tmp_path.glob("*.json")))

    pg.fit(_normal, X8, SVI(steps=60), checkpoint=tmp_path, every=datetime.timedelta(microseconds=1), callbacks=[watch])
    assert stamps == list(range(1, 61)), "after every step, where that takes longer"
    folder = tmp_path / "slow"
    pg.fit(_normal, X8, SVI(steps=60), checkpoint=folder, every=datetime.timedelta(hours=1))
    assert sorted(file.name for file in folder.glob("*.json")) == ["000001.json", "000002.json"]


def test_a_folder_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "run", tmp_path):
        with pytest.raises(ValueError, match=r"^checkpoint: .*file"):
            pg.fit(_normal, X8, SVI(steps=5), checkpoint=place)
    with pytest.raises(TypeError, match=r"^checkpoint: expected text or a Path, got int"):
        pg.fit(_normal, X8, SVI(steps=5), checkpoint=3)
    with pytest.raises(ValueError, match=r"^every: .* give checkpoint=folder too"):
        pg.fit(_normal, X8, SVI(steps=5), every=3)


def test_a_damaged_checkpoint_gives_the_one_before_and_a_note(tmp_path: Path) -> None:
    algorithm = SVI(steps=12, lr=0.1)
    whole = pg.fit(_normal, X8, algorithm, progress=False)
    pg.fit(_normal, X8, algorithm, progress=False, checkpoint=tmp_path, every=3, callbacks=[interrupting(7)])
    newest = max(tmp_path.glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:100])
    resumed = pg.fit(_normal, X8, algorithm, progress=False, checkpoint=tmp_path)
    assert "after 6 of 12" in resumed.notes["resumed"] and str(newest) in resumed.notes["checkpoint"]
    assert same(numbers(whole), numbers(resumed))


def test_seconds_are_those_of_all_runs_together(tmp_path: Path) -> None:
    def slow(step: int, info: Any) -> None:
        import time

        time.sleep(0.02)

    algorithm = SVI(steps=20)
    callbacks = [slow, interrupting(15)]
    pg.fit(_normal, X8, algorithm, progress=False, checkpoint=tmp_path, callbacks=callbacks)
    resumed = pg.fit(_normal, X8, algorithm, progress=False, checkpoint=tmp_path)
    assert resumed.cost["seconds"] > 0.3


def test_a_fit_with_checkpoints_is_the_fit_without(tmp_path: Path) -> None:
    """Looking at the program to know it again draws nothing from where its parameters begin."""

    def model(x: torch.Tensor) -> None:
        loc = pyro.param("loc", lambda: torch.randn(()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        pyro.param("idle", lambda: torch.randn(3))

    program = pg.Program(model, guide)
    plain, kept = (
        pg.fit(program, X8, replace(SVI(steps=3), lr=0.1), progress=False, **more)
        for more in ({}, {"checkpoint": tmp_path})
    )
    assert same(all_of(plain), all_of(kept))


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = SVI(steps=12, lr=0.1)
    whole, write, full = pg.fit(_normal, X8, algorithm, progress=False), Numbered.write, [False]

    def fails(self: Any, *args: Any) -> None:
        if full[0]:
            raise OSError(28, "No space left on device")
        write(self, *args)

    def fill(step: int, info: Any) -> None:
        full[0] = step >= 5

    monkeypatch.setattr(Numbered, "write", fails)
    settings: dict[str, Any] = {"progress": False, "checkpoint": tmp_path, "every": 2}
    with pytest.warns(UserWarning, match="nothing could be written after step .*No space left.* stands at step 4"):
        fit = pg.fit(_normal, X8, algorithm, callbacks=[fill], **settings)
    full[0] = False
    assert same(all_of(whole), all_of(fit)) and same(all_of(whole), all_of(pg.fit(_normal, X8, algorithm, **settings)))
    full[0] = True
    with pytest.raises(OSError, match="No space left"):  # before the first step it can still be mended
        pg.fit(_normal, X8, algorithm, **{**settings, "checkpoint": tmp_path / "other"})


def test_what_only_a_question_called_is_not_kept(tmp_path: Path) -> None:
    """The second stage of a Laplace approximation is a network of its own, made anew for every outcome."""
    program = pg.Program(_normal, AutoLaplaceApproximation)

    def learned(**settings: Any) -> pg.Fit:
        algorithm = SVI(steps=9, lr=0.1)
        return pg.fit(program, X8, algorithm, progress=False, validation=X8, validate_every=2, **settings)

    whole = learned()
    learned(checkpoint=tmp_path, callbacks=[interrupting(5)])
    assert same(all_of(whole), all_of(learned(checkpoint=tmp_path)))
    assert same(all_of(whole), all_of(learned(checkpoint=tmp_path)))


OF_PYRO = {
    "Trace_ELBO": pyro.infer.Trace_ELBO(num_particles=2, vectorize_particles=True),
    "TraceGraph_ELBO": pyro.infer.TraceGraph_ELBO(),
    "TraceMeanField_ELBO": pyro.infer.TraceMeanField_ELBO(),
    "TraceEnum_ELBO": pyro.infer.TraceEnum_ELBO(),
    "TraceTMC_ELBO": pyro.infer.TraceTMC_ELBO(),
    "RenyiELBO": pyro.infer.RenyiELBO(alpha=0.5, num_particles=2, vectorize_particles=True),
    "ReweightedWakeSleep": pyro.infer.ReweightedWakeSleep(),
    "EnergyDistance": pyro.infer.EnergyDistance(num_particles=2),
    "a bound method": pyro.infer.TraceEnum_ELBO().differentiable_loss,
}


@pytest.mark.filterwarnings("ignore:.*no sample sites configured for enumeration:UserWarning")
@pytest.mark.parametrize("name", OF_PYRO)
def test_pyros_objectives_keep_state_of_their_own_and_go_on(name: str, tmp_path: Path) -> None:
    """They look at a program when first called, and drew random numbers for it, once more where a run went on."""

    def learned(**settings: Any) -> pg.Fit:
        algorithm = SVI(OF_PYRO[name], steps=9, lr=0.05)
        return pg.fit(pg.Program(both, both_guide), X8, algorithm, progress=False, **settings)

    whole = learned()
    learned(checkpoint=tmp_path, callbacks=[interrupting(4)])
    assert same(all_of(whole), all_of(learned(checkpoint=tmp_path)))
