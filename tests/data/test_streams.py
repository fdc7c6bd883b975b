"""Streams: the fit of the same batches at hand, at constant memory; what needs all rows is refused."""

from __future__ import annotations

import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import ppl_gen as pg
from ppl_gen.data.batches import Batches
from ppl_gen.data.batching import as_dataset
from ppl_gen.errors import IncompatibleError, NonFiniteError
from ppl_gen.inference import EM, NUTS, SVI
from ppl_gen.models import gaussian_mixture, vae

X = torch.randn(60, 2, generator=torch.Generator().manual_seed(0)) + 3.0


def model(x):
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 10.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


def halves():
    yield from X.split(30)


class Lines(IterableDataset):
    def __iter__(self):
        return iter(X)


SOURCES = {
    "function of a generator": halves,
    "list": list(X.split(30)),
    "loader of lines": DataLoader(Lines(), batch_size=30),
    "loader of columns": DataLoader(TensorDataset(X), batch_size=30),
    "mappings": [{"x": part} for part in X.split(30)],
    "arrays": [part.numpy() for part in X.split(30)],
}


class InTurn(Batches):
    """The same batches of rows that are at hand, in the order of a stream."""

    def _shuffled(self):
        return torch.arange(60)


class SVIInTurn(SVI):
    def source(self, run):
        return InTurn(run.data, self.batch_size, run.seed)


@pytest.mark.parametrize("kind", SOURCES)
def test_the_fit_is_that_of_the_same_batches_at_hand(kind) -> None:
    settings = {"steps": 41, "lr": 0.05}
    streamed = pg.fit(model, pg.stream(SOURCES[kind], rows=60), SVI(**settings))
    wanted = pg.fit(model, X, SVIInTurn(batch_size=30, **settings))
    for name, value in wanted.params.items():
        if kind.startswith("loader"):  # takes a number of torch's generator at each pass
            assert torch.allclose(value, streamed.params[name], atol=1.0)
        else:
            assert torch.equal(value, streamed.params[name])
    assert streamed.history["program_loss"].shape == (41,)


def test_a_stream_finds_the_posterior_and_answers_about_rows(tmp_path) -> None:
    """Conjugate: mean 60 xbar / (60 + 1/100), sd 1 / sqrt(60.01); 4 standard errors of 1000 draws beside SVI's error."""
    rows = pg.stream(DataLoader(TensorDataset(X), batch_size=20, shuffle=True), rows=60)
    fit = pg.fit(model, rows, SVI(steps=3000, lr=0.005))
    loc = fit.posterior(draws=1000)["loc"]
    exact, sd = X.sum(0) / 60.01, 60.01**-0.5
    assert bool(((loc.mean(0) - exact).abs() < 0.5 * sd).all()) and bool((loc.std(0) / sd - 1).abs().max() < 0.25)
    assert fit.predict(X[:3], draws=2)["x"].shape == (2, 3, 2) and fit.sample(5)["x"].shape == (5, 2)
    assert fit.evidence(X[:7]).rows == 7
    with pytest.warns(match="not held against the density, which takes all 60 rows, which come as a stream"):
        fit.diagnose()
    fit.save(tmp_path / "fit")
    with pytest.raises(ValueError, match="came as a stream"):
        pg.load(tmp_path / "fit", program=model)
    again = pg.load(tmp_path / "fit", program=model, data=rows)
    assert torch.equal(again.params["AutoNormal.locs.loc"], fit.params["AutoNormal.locs.loc"])


def test_rows_that_stand_for_themselves_are_judged_by_those_at_hand() -> None:
    rows = pg.stream(halves, rows=60)
    fit = pg.fit(vae(latent=1, hidden=(4,), likelihood="normal", scale=1.0), rows, SVI(steps=30))
    with pytest.warns(pg.FitWarning, match="of 30 rows"):
        assert not fit.verdict.trusted
    assert fit.posterior(X[:4], draws=3)["z"].shape == (3, 4, 1)


@pytest.mark.parametrize(
    "ask",
    [
        lambda rows: pg.fit(model, rows, NUTS(draws=2, warmup=2)),
        lambda rows: pg.fit(gaussian_mixture(components=2), rows, EM()),
        lambda rows: pg.fit(model, rows, SVI(steps=2)).evidence(),
        lambda rows: pg.fit(model, rows, SVI(steps=2)).predict(),
    ],
)
def test_what_needs_all_rows_refuses_a_stream(ask) -> None:
    with pytest.raises(IncompatibleError, match="a stream hands out batches"):
        ask(pg.stream(halves, rows=60))


def test_batches_are_the_streams_own() -> None:
    with pytest.raises(ValueError, match="batch_size: the batches of a stream are as they come"):
        pg.fit(model, pg.stream(halves, rows=60), SVI(steps=2, batch_size=10))
    with pytest.raises(ValueError, match="stratify: the order of a stream is its own"):
        pg.fit(model, pg.stream(halves, rows=60), SVI(steps=2, stratify="x"))


def test_the_number_of_rows_is_checked_at_the_end_of_a_pass() -> None:
    with pytest.raises(ValueError, match="one pass over the stream held 60, and rows=600.*give rows=60"):
        pg.fit(model, pg.stream(halves, rows=600), SVI(steps=5))
    assert pg.fit(model, pg.stream(halves, rows=60), SVI(epochs=3)).cost["steps"] == 6
    loader = DataLoader(TensorDataset(X), batch_size=25, drop_last=True)
    assert pg.fit(model, pg.stream(loader, rows=60), SVI(steps=5)).cost["steps"] == 5


@pytest.mark.parametrize(
    "given, error, message",
    [
        (lambda: pg.stream(halves(), rows=60), TypeError, "can be walked through once.*lambda"),
        (lambda: pg.stream(X, rows=60), TypeError, "expected an iterable of batches, or a function of one"),
        (lambda: pg.stream(halves, rows=0), ValueError, "rows"),
        (lambda: pg.fit(model, pg.stream([], rows=60), SVI(steps=2)), ValueError, "the stream holds none"),
        (lambda: pg.fit(model, pg.stream(halves, rows=20), SVI(steps=2)), ValueError, "the first batch alone has 30"),
        (lambda: pg.fit(model, DataLoader(Lines()), SVI(steps=2)), TypeError, r"pg\.stream\(loader, rows"),
        (lambda: pg.compare(model, pg.stream(halves, rows=60), {"a": SVI()}), ValueError, "give test="),
        (lambda: pg.compare(model, pg.stream(halves, rows=60), {"a": SVI()}, holdout=0), ValueError, "pass an array"),
    ],
)
def test_mistakes_are_named(given, error, message) -> None:
    with pytest.raises(error, match=message):
        given()


def test_a_number_that_is_not_finite_ends_the_fit_which_is_kept() -> None:
    def later():
        yield X[:30]
        yield torch.cat([X[30:59], torch.full((1, 2), torch.nan)])

    with pytest.raises(NonFiniteError, match="a batch of the stream, at step 2.*NaN") as found:
        pg.fit(model, pg.stream(later, rows=60), SVI(steps=10))
    assert found.value.fit.cost["steps"] == 1


def test_a_source_goes_on_where_it_stood() -> None:
    loader = DataLoader(TensorDataset(X), batch_size=7, shuffle=True)
    rows = as_dataset(pg.stream(loader, rows=60), model)
    torch.manual_seed(3)
    source, other = Batches(rows, None, 0), Batches(rows, None, 0)
    for _ in range(13):
        source.next()
    kept, generator = source.state_dict(), torch.get_rng_state()
    wanted = [source.next().args[0] for _ in range(20)]
    torch.manual_seed(99)
    other.load_state_dict(kept)
    torch.set_rng_state(generator)
    assert all(torch.equal(value, other.next().args[0]) for value in wanted)


def test_a_checkpoint_of_a_stream_goes_on_to_the_same_bits(tmp_path) -> None:
    def build():
        return pg.stream(DataLoader(TensorDataset(X), batch_size=20, shuffle=True), rows=60)

    whole = pg.fit(model, build(), SVI(steps=20, lr=0.05), checkpoint=tmp_path / "whole", every=1000)
    pg.fit(model, build(), SVI(steps=11, lr=0.05), checkpoint=tmp_path / "part", every=1000)
    parted = pg.fit(model, build(), SVI(steps=20, lr=0.05), checkpoint=tmp_path / "part", every=1000)
    assert all(torch.equal(value, parted.params[name]) for name, value in whole.params.items())


def test_a_comparison_judges_rows_at_hand() -> None:
    before = torch.get_rng_state()
    result = pg.compare(model, pg.stream(halves, rows=60), {"a": SVI(steps=5)}, test=X[:10])
    assert result.table()["status"].tolist() == ["finished"] and result.lines[0].evidence.rows == 10
    assert "a stream of 60 rows" in result.facts["training data"]
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.slow
def test_a_comparison_in_processes_walks_the_stream_in_each() -> None:
    algorithms = {"a": SVI(steps=5), "b": SVI(steps=9)}
    one, two = (pg.compare(model, pg.stream(halves, rows=60), algorithms, test=X[:10], n_jobs=n) for n in (1, 2))
    for mine, other in zip(one.lines, two.lines, strict=True):
        assert torch.equal(mine.evidence.values, other.evidence.values) and other.fit.data.rows == 60


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident set under /proc")
def test_memory_does_not_grow_with_the_stream() -> None:
    """Two passes of 2 GiB each, 8 MiB at a time."""
    code = """
import torch, ppl_gen as pg
from ppl_gen.data.batches import Batches
from ppl_gen.data.batching import as_dataset
def takes(x): pass
def read():
    for _ in range(256): yield torch.zeros(2048, 1024)
def resident(): return int([l for l in open("/proc/self/status") if l.startswith("VmHWM")][0].split()[1]) // 1024
source = Batches(as_dataset(pg.stream(read, rows=256 * 2048), takes), None, 0)
source.next()
before = resident()
for _ in range(2 * source.per_epoch): source.next()
print(resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64, "MiB; a few batches"
