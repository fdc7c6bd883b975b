"""A fit on disk: all of it comes back, damage is noticed, and a failed save loses nothing."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import both, both_guide, conjugate, generator, regression, sine_rows
from pyro.infer.autoguide import AutoMultivariateNormal
from torch.utils._python_dispatch import TorchDispatchMode

import ppl_gen as pg
from ppl_gen.diagnostics.excerpt import ROWS
from ppl_gen.fits import loading
from ppl_gen.fits import saving as storage
from ppl_gen.fitting.posteriors.chains import ChainPosterior
from ppl_gen.inference import CAVI, EM, NUTS, SVI, Adversarial
from ppl_gen.models import gaussian_mixture
from ppl_gen.runtime import atomic

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")  # chains and guides are short on purpose

X = torch.linspace(-1.0, 2.0, 12)


def fitted(kind: str) -> tuple[pg.Fit, Any]:
    """A small fit of each kind of posterior, and the program that made it."""
    mixture = gaussian_mixture(components=2)
    if kind == "network":
        program, _ = regression()
        return pg.fit(program, sine_rows(), SVI(steps=20, batch_size=10), seed=2), program
    if kind == "guide":
        program = pg.Program(both, both_guide)
        return pg.fit(program, X, SVI(steps=20), seed=2), program
    if kind == "autoguide":
        program = pg.Program(conjugate, AutoMultivariateNormal)
        return pg.fit(program, X, SVI(steps=20), seed=2), program
    if kind == "point":
        return pg.fit(mixture, X, EM(steps=5), seed=2), mixture
    if kind == "coordinates":
        return pg.fit(mixture, X, CAVI(steps=5), seed=2), mixture
    if kind == "chains":
        return pg.fit(conjugate, X, NUTS(draws=30, warmup=20, chains=2, processes=1), seed=2), conjugate
    program, _ = generator()
    algorithm = SVI(objective=Adversarial("non-saturating"), steps=3)
    return pg.fit(program, torch.randn(20, 1), algorithm, seed=2), program


KINDS = ["network", "guide", "autoguide", "point", "coordinates", "chains", "implicit"]


@pytest.mark.filterwarnings("ignore:.*was not registered in the param store:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_everything_comes_back(kind: str, tmp_path: Path) -> None:
    fit, program = fitted(kind)
    fit.save(tmp_path / "kept")
    back = pg.load(tmp_path / "kept", program=program)
    assert back.params.keys() == fit.params.keys()
    assert all(torch.equal(back.params[name], fit.params[name]) for name in fit.params)
    assert back.history.equals(fit.history), "the history is exact"
    assert (back.status, back.message, back.seed, back.algorithm) == (fit.status, fit.message, fit.seed, fit.algorithm)
    for name, value in fit.predict(draws=5).items():
        assert torch.equal(back.predict(draws=5)[name], value), "the same seed gives the same draws"
    if fit.point or fit.learned.kind != "point":
        ours, theirs = fit.posterior(draws=5), back.posterior(draws=5)
        assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    if "density" in fit.info.offers:
        assert back.evidence(draws=5, particles=5).mean == fit.evidence(draws=5, particles=5).mean


def test_without_its_program_draws_history_and_diagnosis_remain(tmp_path: Path) -> None:
    fit, _ = fitted("chains")
    fit.save(tmp_path / "kept")
    back = pg.load(tmp_path / "kept")
    frame, kept = fit.diagnose(), back.diagnose()
    assert list(kept.index) == list(frame.index) and kept.attrs["verdict"] == frame.attrs["verdict"]
    assert abs(kept["mean"] - frame["mean"]).max() < 1e-12
    tree, ours = back.to_arviz(), fit.to_arviz()
    assert tree.posterior["theta"].equals(ours.posterior["theta"])
    with pytest.raises(AttributeError, match="needs the program"):
        back.predict()


def test_another_program_is_refused(tmp_path: Path) -> None:
    fit, _ = fitted("guide")
    fit.save(tmp_path / "kept")
    with pytest.raises(ValueError, match="do not belong"):
        pg.load(tmp_path / "kept", program=conjugate)


def files_of(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    fit = fitted("guide")[0]
    fit.diagnose()
    return fit.save(tmp_path_factory.mktemp("kept") / "fit")


def test_every_flipped_bit_is_noticed(kept: Path) -> None:
    chance = random.Random(0)
    files = files_of(kept)
    assert len(files) == 4
    program = pg.Program(both, both_guide)
    for _ in range(100):
        file = chance.choice(files)
        good = file.read_bytes()
        place = chance.randrange(len(good))
        file.write_bytes(good[:place] + bytes([good[place] ^ (1 << chance.randrange(8))]) + good[place + 1 :])
        with pytest.raises(ValueError, match="damaged|missing"):
            pg.load(kept, program=program)
        file.write_bytes(good)
    pg.load(kept, program=program)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_every_truncated_file_is_noticed(kept: Path, share: float) -> None:
    for file in files_of(kept):
        good = file.read_bytes()
        file.write_bytes(good[: int(share * len(good))])
        with pytest.raises(ValueError, match="damaged"):
            pg.load(kept)
        file.unlink()
        with pytest.raises(ValueError, match="missing"):
            pg.load(kept)
        file.write_bytes(good)


def test_a_failed_save_leaves_the_old_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, program = fitted("guide")
    first.save(tmp_path / "kept")
    second = pg.fit(program, X, SVI(steps=21), seed=3)

    def full_disk(*args: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(storage, "_write_draws", full_disk)
    with pytest.raises(OSError, match="no space"):
        second.save(tmp_path / "kept")
    monkeypatch.undo()
    assert pg.load(tmp_path / "kept", program=program).seed == 2
    assert [path.name for path in tmp_path.iterdir()] == ["kept"], "nothing half-written lies about"
    second.save(tmp_path / "kept")
    assert pg.load(tmp_path / "kept", program=program).seed == 3


def test_a_folder_of_somebody_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    fit, _ = fitted("guide")
    with pytest.raises(ValueError, match="not a saved fit"):
        fit.save(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def test_a_pickle_is_not_run(kept: Path, tmp_path: Path) -> None:
    import pickle

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "executed",))

    (file,) = kept.glob("*/tensors.safetensors")
    good = file.read_bytes()
    file.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ValueError, match="damaged"):
        pg.load(kept, program=pg.Program(both, both_guide))
    file.write_bytes(good)
    assert not (tmp_path / "executed").exists()
    assert "pickle" not in Path(storage.__file__).read_text().replace("no pickle", "")


def test_another_format_is_refused(kept: Path) -> None:
    import hashlib

    file = kept / "fit.json"
    good = file.read_text()
    text = json.loads(good)["fit"].replace('"format": 2', '"format": 99')
    file.write_text(json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "fit": text}))
    with pytest.raises(ValueError, match="format 99"):
        pg.load(kept)
    file.write_text(good)


def test_data_too_large_to_keep_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "MAX_DATA", 10)
    fit, program = fitted("coordinates")
    fit.save(tmp_path / "kept")
    with pytest.raises(ValueError, match="pass them as data="):
        pg.load(tmp_path / "kept", program=program)
    back = pg.load(tmp_path / "kept", program=program, data=X)
    assert all(torch.equal(back.params[name], fit.params[name]) for name in fit.params)


def test_a_program_of_other_sites_is_refused_even_without_parameters(tmp_path: Path) -> None:
    fit, _ = fitted("chains")
    fit.save(tmp_path / "kept")

    def conjugate_of_laplace(x: torch.Tensor) -> None:
        theta = pyro.sample("theta", dist.Laplace(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(theta, 1.0), obs=x)

    with pytest.raises(ValueError, match="is not the program of this fit.*Laplace"):
        pg.load(tmp_path / "kept", program=conjugate_of_laplace)


def test_what_only_a_recipe_reads_is_kept_and_what_cannot_be_kept_is_asked_for(tmp_path: Path) -> None:
    def build(data: Any) -> pg.Program:
        classes = int(data["label"].max()) + 1

        def model(x: torch.Tensor, scale: list[float]) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(pyro.param("loc", torch.zeros(classes)).sum(), scale[0]), obs=x)

        return pg.Program(model)

    data = {"x": X, "label": torch.arange(12) % 3}
    recipe = pg.Recipe(build)
    fit = pg.fit(recipe, {**data, "scale": pg.constant([2.0])}, SVI(steps=3))
    fit.save(tmp_path / "list")
    with pytest.raises(ValueError, match="hold scale, which cannot be saved with the fit; pass them as data="):
        pg.load(tmp_path / "list", program=recipe)
    back = pg.load(tmp_path / "list", program=recipe, data={**data, "scale": pg.constant([2.0])})
    assert torch.equal(back.params["loc"], fit.params["loc"])
    pg.fit(recipe, {**data, "scale": pg.constant(torch.tensor([2.0]))}, SVI(steps=3)).save(tmp_path / "tensor")
    assert torch.equal(pg.load(tmp_path / "tensor", program=recipe).params["loc"], fit.params["loc"])


def test_rows_redrawn_for_every_batch_are_asked_for(tmp_path: Path) -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Bernoulli(pyro.param("p", torch.tensor(0.4))), obs=x)

    rows = pg.data.Rows({"x": torch.rand(9)}, on_batch=lambda batch: {"x": torch.bernoulli(batch["x"])})
    fit = pg.fit(model, rows, SVI(steps=3))
    fit.save(tmp_path / "kept")
    with pytest.raises(ValueError, match="redrawn for every batch"):
        pg.load(tmp_path / "kept", program=model)
    assert pg.load(tmp_path / "kept", program=model, data=rows).evidence().mean == fit.evidence().mean


def test_an_exchange_that_fails_leaves_the_old_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, program = fitted("guide")
    first.save(tmp_path / "kept")
    before = files_of(tmp_path)

    def fails(source: Any, target: Any) -> None:
        raise OSError("stale handle")

    monkeypatch.setattr(atomic.os, "replace", fails)
    with pytest.raises(OSError, match="stale"):
        pg.fit(program, X, SVI(steps=5), seed=9).save(tmp_path / "kept")
    monkeypatch.undo()
    assert pg.load(tmp_path / "kept", program=program).seed == 2
    assert files_of(tmp_path) == before


def test_an_interrupt_after_the_exchange_keeps_the_new_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, program = fitted("guide")
    first.save(tmp_path / "kept")
    replace = os.replace

    def interrupted(source: Any, target: Any) -> None:
        replace(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pg.fit(program, X, SVI(steps=5), seed=9).save(tmp_path / "kept")
    monkeypatch.undo()
    assert pg.load(tmp_path / "kept", program=program).seed == 9


def kills(folder: Path, *how: str) -> tuple[list[str], list[str]]:
    """What was found after each kill, and the names in the folder after one more save; see `killed_saves`."""
    script = Path(__file__).parents[1] / "killed_saves.py"
    done = subprocess.run([sys.executable, script, folder, *how], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    return answer["answers"], answer["left"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills copies of a process")
def test_a_kill_at_any_step_of_an_exchange_leaves_the_old_contents_or_the_new(tmp_path: Path) -> None:
    script = f"""
import importlib.util, json, os, signal, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("atomic", {atomic.__file__!r})  # by itself: nothing else is loaded
atomic = importlib.util.module_from_spec(spec)
spec.loader.exec_module(atomic)
path, left = Path({str(tmp_path / "kept")!r}), 0

def kill(event="", args=("",)):
    global left
    if event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "open") and {str(tmp_path)!r} in str(args[0]):
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

def save(text):
    def write(folder):
        (folder / "text").write_text(text)
        return folder.name
    atomic.atomically(path, "at", "note", write)

save("old")
sys.addaudithook(kill)
found, code = [], 1
while code:
    steps = len(found) + 1
    child = os.fork()
    if not child:
        left = steps
        save("new")
        os._exit(0)
    code = os.waitpid(child, 0)[1]
    found.append((path / (path / "at").read_text() / "text").read_text())
    if found[-1] != "old":
        save("old")
for file in path.iterdir():
    os.utime(file, (0.0, 0.0))  # long ago: a claim of a minute is not swept
save("old")
print(json.dumps([found, sorted(file.name for file in path.iterdir())]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    found, left = json.loads(done.stdout)
    assert len(found) > 15 and set(found) == {"old", "new"}, found
    assert found == sorted(found, reverse=True), "one exchange: all old before it, all new after"
    assert len(left) == 2, left


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills copies of a process")
def test_a_kill_at_any_step_of_a_save_leaves_the_old_fit_or_the_new_one(tmp_path: Path) -> None:
    answers, left = kills(tmp_path, "placed")
    assert len(answers) > 15 and set(answers) == {"old", "new"}, answers
    assert answers == sorted(answers, reverse=True), "one exchange: all old before it, all new after"
    assert len(left) == 2, f"what the dead left is swept by the next save: {left}"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills copies of a process")
def test_a_kill_at_any_moment_of_a_save_leaves_the_old_fit_or_the_new_one(tmp_path: Path) -> None:
    answers, left = kills(tmp_path, "random", "100")
    assert len(answers) == 100 and set(answers) == {"old", "new"}, answers
    assert len(left) == 2, left


def test_contents_of_others_are_swept_only_when_nobody_writes_them(tmp_path: Path) -> None:
    def owned(number: int, **owner: Any) -> Path:
        folder = tmp_path / "kept" / f"contents-{number:012x}"
        folder.mkdir(parents=True)
        (folder / ".writing.json").write_text(json.dumps(owner))
        return folder

    host, now = socket.gethostname(), time.time()
    living = [
        owned(1, host=host, process=os.getppid(), time=now),
        owned(2, host="another", process=1, time=now),  # whose processes cannot be seen from here
    ]
    dead = [owned(3, host=host, process=2**22 + 1, time=now), owned(4, host="another", process=1, time=now - 1e6)]
    fit, program = fitted("guide")
    fit.save(tmp_path / "kept")
    assert all(folder.exists() for folder in living) and not any(folder.exists() for folder in dead)
    assert pg.load(tmp_path / "kept", program=program).seed == 2


def test_a_folder_is_replaced_while_it_is_read(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit, program = fitted("guide")
    fit.save(tmp_path / "kept")
    checked, calls = loading._checked_contents, []

    def replaced_meanwhile(*args: Any) -> Path:
        if not calls:
            calls.append(1)
            pg.fit(program, X, SVI(steps=5), seed=9).save(tmp_path / "kept")
        return checked(*args)

    monkeypatch.setattr(loading, "_checked_contents", replaced_meanwhile)
    assert pg.load(tmp_path / "kept", program=program).seed == 9


def test_notes_beside_a_fit_stay(tmp_path: Path) -> None:
    fit, _ = fitted("guide")
    fit.save(tmp_path / "kept")
    (tmp_path / "kept" / "notes.txt").write_text("the good one")
    fit.save(tmp_path / "kept")
    assert (tmp_path / "kept" / "notes.txt").read_text() == "the good one"


def test_a_saved_fit_is_as_readable_as_any_other_folder(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    fitted("guide")[0].save(tmp_path / "kept")
    assert (tmp_path / "kept").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_posterior_of_a_class_of_ones_own_is_not_saved_in_silence(tmp_path: Path) -> None:
    class Own(ChainPosterior):
        pass

    fit, _ = fitted("chains")
    with pytest.warns(UserWarning, match="the posterior of this fit is a Own, which is code and is not saved"):
        replace(fit, learned=Own(fit.learned.draws, {})).save(tmp_path / "kept")


class Drawn(TorchDispatchMode):
    """How many normal numbers were drawn at once, at most."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "normal" in str(func):
            self.most = max(self.most, result.numel())
        return result


def test_to_save_a_fit_its_program_runs_on_few_rows(tmp_path: Path) -> None:
    def model(x: torch.Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))  # drawn for every row that the program runs on
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("slope", torch.tensor(0.5)) * x, 0.7))

    x = torch.linspace(-1.0, 1.0, 5000)
    fit = pg.fit(pg.Program(model, guide), x, SVI(steps=3, batch_size=50), seed=0)
    with Drawn() as drawn:
        kept = pg.load(fit.save(tmp_path / "fit")).to_arviz()
    assert 0 < drawn.most <= 1000 < len(x)  # to learn what a draw costs takes 1000
    assert torch.equal(torch.as_tensor(kept.observed_data["x"].values), x[:ROWS])
    assert "5000" in kept.attrs["rows"]
