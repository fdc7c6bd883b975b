"""Chains by nutpie: which sampler runs and why, seeds and threads, interrupts, errors, checkpoints.

Posteriors against closed forms and the reference draws of posteriordb are in `test_nuts.py` and `test_posteriordb.py`.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from resumable_runs import same

import ppl_gen as pg
from ppl_gen.inference import NUTS
from ppl_gen.inference.mcmc import nutpie_chains, potential, samplers
from ppl_gen.inference.unconstrained import Unconstrained

pytestmark = [
    pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning"),  # chains are short on purpose
    pytest.mark.skipif(importlib.util.find_spec("nutpie") is None, reason="nutpie is not installed"),
]

X = torch.tensor([0.3, -1.2, 0.8, 2.1, -0.4, 1.7, 0.1, 0.9], dtype=torch.float64)
CHAINS = NUTS(draws=40, warmup=40, chains=3, processes=2)


def model(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, scale), obs=x)


def by_branches(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0 if float(loc.detach()) > 0 else 1.5), obs=x)


def learned(algorithm=CHAINS, program=model, **settings):
    return pg.fit(program, X, algorithm, seed=2, progress=False, **settings)


@pytest.fixture
def without_nutpie(monkeypatch):
    """As on a machine where it is not installed."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "nutpie" else found(name, *rest)
    )
    monkeypatch.delitem(sys.modules, "nutpie._lib", raising=False)
    nutpie_chains._extension.cache_clear()
    yield
    nutpie_chains._extension.cache_clear()


def test_what_ran_is_in_the_cost() -> None:
    fit = learned()
    assert fit.cost["sampler"] == "nutpie" and fit.cost["path"] == "numpy" and fit.cost["capture_seconds"] > 0
    assert "sampler_reason" not in fit.cost and "path_reason" not in fit.cost
    program = learned(program=by_branches)
    assert program.cost["sampler"] == "pyro" and program.cost["path"] == "eager"
    assert program.cost["sampler_reason"] == "nutpie needs a captured potential"
    assert "read into Python" in program.cost["path_reason"]
    dense = learned(replace(CHAINS, full_mass=True))
    assert dense.cost["sampler"] == "pyro" and dense.cost["sampler_reason"] == "nutpie has no dense mass matrix"
    eager = learned(replace(CHAINS, draws=5, warmup=5), compile=False)
    assert eager.cost["path"] == "eager" and eager.cost["sampler_reason"].startswith("compile=False")
    assert learned(compile="graph").cost["path"] == "graph"


def test_without_nutpie_pyros_kernel_serves(without_nutpie) -> None:
    fit = learned(replace(CHAINS, draws=5, warmup=5))
    assert fit.cost["sampler"] == "pyro" and "pip install 'ppl_gen[nutpie]'" in fit.cost["sampler_reason"]
    for asked in ({"sampler": "nutpie"}, {"mass": "low_rank"}):
        with pytest.raises(pg.errors.MissingExtraError, match=r"pip install 'ppl_gen\[nutpie\]'"):
            learned(replace(CHAINS, **asked))


@pytest.mark.parametrize("asked", [{"sampler": "nutpie"}, {"mass": "low_rank"}])
def test_asked_for_where_it_cannot_be(asked) -> None:
    with pytest.raises(pg.IncompatibleError, match="'by_branches' cannot be recorded"):
        learned(replace(CHAINS, **asked), by_branches)
    with pytest.raises(pg.IncompatibleError, match="compile=False"):
        learned(replace(CHAINS, **asked), compile=False)


def test_paths_give_one_posterior() -> None:
    """The three replays differ in their last bits, after which chains part: the first draws agree."""
    graph, arrays = (learned(compile=path).learned.draws["loc"] for path in ("graph", "auto"))
    assert torch.allclose(graph[:, :1], arrays[:, :1], atol=1e-6) or torch.allclose(
        graph.mean(), arrays.mean(), atol=0.5
    )


def test_compiled_where_much_is_drawn(monkeypatch) -> None:
    tried = []

    def compiled(tape, inputs):
        tried.append(len(tape.calls))
        raise potential.CannotCompileError("no compiler")

    monkeypatch.setattr(potential, "compiled", compiled)
    assert "path_reason" not in learned().cost and not tried
    fit = learned(compile="inductor")
    assert tried and fit.cost["path"] == "numpy" and fit.cost["path_reason"] == "no compiler"
    tape = potential.Tape(1, (None,) * 200, (), None, (), numbers=70_000)
    assert not potential._worth_compiling("auto", tape, 10_000, "numpy")
    assert potential._worth_compiling("auto", tape, 1_000_000, "numpy")
    assert potential._worth_compiling("auto", tape, 200_000, "graph")


@pytest.mark.slow
def test_the_compiled_potential_gives_the_posterior() -> None:
    """Means of 4 x 500 draws of a posterior of 8 rows: standard errors of 0.02 sd and less, ESS of 1000."""
    nuts = NUTS(draws=500, warmup=300, chains=4)
    fits = [learned(nuts, compile=path) for path in ("inductor", "graph")]
    assert [fit.cost["path"] for fit in fits] == ["inductor", "graph"]
    one, two = (fit.learned.draws["loc"] for fit in fits)
    assert abs(float(one.mean() - two.mean())) < 5.5 * 2**0.5 * float(one.std()) / 1000**0.5


def interrupt_at(step):
    def callback(done, info):
        if done >= step:
            raise KeyboardInterrupt

    return callback


def test_interrupts_keep_what_was_drawn() -> None:
    """A chain that cannot end in time, so that the interrupt finds it under way."""
    long = NUTS(draws=200_000, warmup=40, chains=2, processes=2)
    fit = learned(long, callbacks=[interrupt_at(200)], compile="graph")
    chains, draws = fit.learned.draws["loc"].shape
    assert fit.status is pg.Status.INTERRUPTED and chains >= 1 and 0 < draws < 200_000
    whole = learned(NUTS(draws=draws, warmup=40, chains=2), compile="graph")
    # Which chains were kept depends on how far each had come: those that were agree with the whole run.
    found = [any(torch.equal(one, other) for other in whole.learned.draws["loc"]) for one in fit.learned.draws["loc"]]
    assert all(found) and bool(fit.learned.stats["n_steps"].gt(0).all())
    assert fit.learned.stats["lp"].isfinite().all()


def test_an_interrupt_before_the_first_draw_is_passed_on() -> None:
    with pytest.raises(KeyboardInterrupt):
        learned(NUTS(draws=10, warmup=200_000, chains=2), callbacks=[interrupt_at(20)], compile="graph")


def test_callbacks_hear_of_every_iteration() -> None:
    seen = []
    learned(replace(CHAINS, thin=2), callbacks=[lambda step, info: seen.append(step)])
    assert seen == list(range(1, 3 * 120 + 1))


def test_an_error_of_the_density_is_passed_on(monkeypatch) -> None:
    """As it was raised, and once: nutpie's thread would print a panic of its own."""
    calls = []

    def logp(self, chain):
        def function(u):
            calls.append(u)
            if len(calls) > 30:
                raise ZeroDivisionError("of the user's")
            return -0.5 * float(u @ u), -u

        return function

    monkeypatch.setattr(potential.Potential, "logp", logp)
    with pytest.raises(ZeroDivisionError, match="of the user's"):
        learned()


def test_a_singular_matrix_is_a_divergence(monkeypatch) -> None:
    def logp(self, chain):
        def function(u):
            if u[0] > 3.0:
                raise RuntimeError("linalg.cholesky: the input is not positive-definite")
            return -0.5 * float(u @ u) / 9.0, -u / 9.0

        return function

    monkeypatch.setattr(potential.Potential, "logp", logp)
    fit = learned(NUTS(draws=100, warmup=100, chains=2))
    assert fit.cost["divergences"] > 0 and float(fit.learned.draws["loc"].max()) <= 3.0


def test_matrices_that_cannot_be_factorised_in_a_program() -> None:
    """The covariance of two rows leaves the positive-definite ones where |r| > 1: a wall that chains run into."""

    def correlated(x):
        r = pyro.sample("r", dist.Normal(0.0, 0.2))
        covariance = torch.stack([torch.stack([torch.ones_like(r), r]), torch.stack([r, torch.ones_like(r)])])
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.MultivariateNormal(x.new_zeros(2), covariance, validate_args=False), obs=x)

    program = pg.Program(correlated, start=lambda: {"r": torch.tensor(0.5)})
    nuts = NUTS(draws=200, warmup=200, chains=2, jitter=0.1, sampler="nutpie")
    fit = pg.fit(program, torch.stack([X, X + 0.01], -1), nuts, seed=0)
    assert float(fit.learned.draws["r"].abs().max()) < 1.0


def test_a_number_that_the_density_does_not_depend_on(monkeypatch) -> None:
    """nutpie refuses gradients that are zero. Here one is, between two walls: the draws are uniform.

    A uniform sd of 1 / sqrt(12); with an ESS above 200 of 800 draws its standard error is below 0.011, and 5.5 of these
    are 0.06.
    """

    def logp(self, chain):
        return lambda u: (-0.5 * float(u[0] ** 2) if 0.0 < u[1] < 1.0 else float("nan"), np.array([-u[0], 0.0]))

    monkeypatch.setattr(potential.Potential, "logp", logp)
    monkeypatch.setattr(Unconstrained, "values", lambda self, u: (u[0], u[1]))
    monkeypatch.setattr(
        "ppl_gen.inference.mcmc.nuts.beginnings", lambda *rest: ([torch.tensor([1.0, 0.5])] * 2, [1, 2])
    )
    flat = learned(NUTS(draws=400, warmup=200, chains=2)).learned.draws["scale"]
    assert abs(float(flat.std()) - 12**-0.5) < 0.06 and abs(float(flat.mean()) - 0.5) < 0.12


def test_thinning_and_more_draws_keep_the_draws() -> None:
    every, thinned = learned(CHAINS), learned(replace(CHAINS, draws=20, thin=2))
    assert torch.equal(thinned.learned.draws["loc"], every.learned.draws["loc"][:, 1::2])
    assert torch.equal(thinned.learned.stats["lp"], every.learned.stats["lp"][:, 1::2])
    more = learned(replace(CHAINS, draws=60))
    assert torch.equal(more.learned.draws["loc"][:, :40], every.learned.draws["loc"])


@pytest.mark.parametrize("mass", ["low_rank", "diagonal"])
def test_mass_matrices(mass) -> None:
    """Two numbers of correlation 0.99: the diagonal matrix leaves a condition number of 199, and long trajectories."""

    def ridge(x):
        covariance = x.new_tensor([[1.0, 0.99], [0.99, 1.0]])
        pyro.sample("u", dist.MultivariateNormal(x.new_zeros(2), covariance))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    fit = pg.fit(ridge, X, NUTS(draws=200, warmup=300, chains=2, mass=mass), seed=0)
    assert fit.cost["sampler"] == "nutpie"
    steps = float(fit.learned.stats["n_steps"].double().mean())
    assert steps < 8 if mass == "low_rank" else steps > 10


def all_of(fit):
    cost = {name: value for name, value in fit.cost.items() if name not in ("seconds", "capture_seconds")}
    return {"draws": dict(fit.learned.draws), "stats": dict(fit.learned.stats), "cost": cost, "told": fit.message}


def test_checkpoints_keep_whole_chains(tmp_path, monkeypatch) -> None:
    """One that was under way is drawn again from its beginning, to the same bits."""
    one = replace(CHAINS, processes=1)
    whole = all_of(learned(one))

    def stop(step, info):
        if step > 80:  # the first chain has ended
            raise SystemExit

    with pytest.raises(SystemExit):
        learned(one, checkpoint=tmp_path, callbacks=[stop])
    begun = []
    start = nutpie_chains._Running.start
    monkeypatch.setattr(nutpie_chains._Running, "start", lambda self, logp: begun.append(self) or start(self, logp))
    resumed = learned(one, checkpoint=tmp_path)
    assert resumed.notes["resumed"].startswith("went on after 80,") and len(begun) < 3
    assert same(whole, all_of(resumed))
    begun.clear()
    assert same(whole, all_of(learned(one, checkpoint=tmp_path))) and not begun
    more = replace(one, draws=60)
    assert same(all_of(learned(more)), all_of(learned(more, checkpoint=tmp_path)))
    with pytest.raises(ValueError, match="belongs to chains of 60 draws"):
        learned(one, checkpoint=tmp_path)


def test_a_run_goes_on_by_the_sampler_it_began_with(tmp_path, monkeypatch, without_nutpie) -> None:
    algorithm = replace(CHAINS, processes=1, draws=5, warmup=5)
    first = learned(algorithm, checkpoint=tmp_path)
    assert first.cost["sampler"] == "pyro"
    monkeypatch.setattr(samplers, "installed", lambda: True)
    assert learned(replace(algorithm, draws=8), checkpoint=tmp_path).cost["sampler"] == "pyro"


def test_a_run_begun_by_nutpie_needs_it(tmp_path, monkeypatch) -> None:
    learned(checkpoint=tmp_path)
    monkeypatch.setattr(samplers, "installed", lambda: False)
    with pytest.raises(pg.errors.MissingExtraError, match="its chains are drawn by nutpie"):
        learned(checkpoint=tmp_path)


CALLED = ("LogpFunc", "ExpandFunc", "PyMcModel")  # by functions in C
CANARY = """
import sys
from ppl_gen.inference.mcmc import nutpie_chains
lib = nutpie_chains._extension()
heavy = sorted({name.split(".")[0] for name in sys.modules} & {"arviz", "pyarrow", "zarr", "pandas"})
assert not heavy, heavy
import nutpie
assert nutpie._lib is lib, "loaded once, whichever comes first"
"""


def test_canary_of_nutpies_extension() -> None:
    """It is loaded without its package: fast, and beside any ArviZ."""
    lib = nutpie_chains._extension()
    for name in ("PyNutsSettings", "PyVariable", "PyModel", "PySampler", "ProgressType", "PyStorage", *CALLED):
        assert hasattr(lib, name)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", CANARY], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr


def test_a_fit_leaves_generators_and_threads_alone() -> None:
    before, threads, state = torch.get_rng_state(), torch.get_num_threads(), np.random.get_state()[1].copy()
    learned()
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads
    assert np.array_equal(np.random.get_state()[1], state)
