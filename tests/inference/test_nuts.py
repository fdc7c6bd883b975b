"""NUTS: closed-form posteriors, the density it moves in, reproducibility, interrupts, and what it refuses.

Draws are correlated, so errors are compared with sd / sqrt(ESS). A bound of 5.5 standard errors fails by chance with
probability 4e-8 per number; fewer than fifty numbers are compared in this file: 2e-6.
"""

from __future__ import annotations

import math
import subprocess
import sys
import threading
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.ops.stats import effective_sample_size
from torch import nn

import ppl_gen as pg
from ppl_gen.capture.replay import record_checked
from ppl_gen.data.batching import as_dataset
from ppl_gen.inference import EM, NUTS
from ppl_gen.inference.mcmc.kernel import Metric
from ppl_gen.inference.unconstrained import Unconstrained, starting_point
from ppl_gen.program.dry_run import dry_run
from ppl_gen.workspace.isolation import isolated

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")  # chains and guides are short on purpose

SIGMAS = 5.5


def assert_moments(draws, mean, sd):
    """Draws (chains x draws) against the exact mean and sd."""
    size = float(effective_sample_size(draws))
    assert size > 100
    assert abs(float(draws.mean()) - mean) < SIGMAS * sd / math.sqrt(size)
    # The sd of n normal draws has standard error sd / sqrt(2 n); skewed posteriors have up to twice that.
    assert abs(float(draws.std()) - sd) < 2 * SIGMAS * sd / math.sqrt(2 * size)


COUNTS = torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0], dtype=torch.float64)
KINDS = torch.tensor([0, 1, 1, 2, 2, 2, 2, 1])
VALUES = torch.tensor([0.3, -1.2, 0.8, 2.1, -0.4, 1.7, 0.1, 0.9], dtype=torch.float64)


def conjugate(counts, kinds, values):
    """Three independent conjugate pairs: a real, a positive and a simplex site."""
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    shares = pyro.sample("shares", dist.Dirichlet(values.new_ones(3)))
    with pyro.plate("data", len(values)):
        pyro.sample("values", dist.Normal(loc, 1.5), obs=values)
        pyro.sample("counts", dist.Poisson(rate), obs=counts)
        pyro.sample("kinds", dist.Categorical(shares), obs=kinds)


DATA = {"counts": COUNTS, "kinds": KINDS, "values": VALUES}


def density(model, data):
    """The unconstrained density of a program, built as NUTS builds it; call under `isolated`."""
    batch = as_dataset(data, model, dtype=torch.float64).batch()
    return Unconstrained(model, batch, dry_run(pg.Program(model), batch))


@pytest.fixture
def double():
    with isolated(0, dtype=torch.float64):
        yield


BOTH = pytest.mark.parametrize("sampler", ["nutpie", "pyro"])


@BOTH
def test_closed_form_posteriors(sampler) -> None:
    fit = pg.fit(conjugate, DATA, NUTS(draws=300, warmup=150, chains=2, processes=1, sampler=sampler), seed=0)
    assert fit.cost["sampler"] == sampler
    draws = fit.learned.draws
    assert draws["loc"].shape == (2, 300) and draws["shares"].shape == (2, 300, 3)
    precision = 1 / 4 + len(VALUES) / 1.5**2
    assert_moments(draws["loc"], float(VALUES.sum()) / 1.5**2 / precision, precision**-0.5)
    shape, rate = 2 + float(COUNTS.sum()), 1 + len(COUNTS)
    assert_moments(draws["rate"], shape / rate, shape**0.5 / rate)
    total = 3 + len(KINDS)
    for k in range(3):
        share = (1 + int((KINDS == k).sum())) / total
        assert_moments(draws["shares"][..., k], share, math.sqrt(share * (1 - share) / (total + 1)))
    assert fit.status == pg.Status.FINISHED and fit.cost["divergences"] == 0
    prior = 2.0
    assert abs(float(draws["loc"].std()) - prior) > 2 * SIGMAS * prior / math.sqrt(2 * 600), "the prior would fail"


@BOTH
def test_statistics_of_each_draw(sampler, double: None) -> None:
    nuts = NUTS(draws=60, warmup=60, chains=2, processes=1, max_tree_depth=5, sampler=sampler)
    fit = pg.fit(conjugate, DATA, nuts, seed=1)
    stats, draws = fit.learned.stats, fit.learned.draws
    assert all(value.shape == (2, 60) for value in stats.values())
    function = density(conjugate, DATA)
    for chain, draw in [(0, 0), (1, 31), (0, 59)]:
        parts = function.parts_of({name: value[chain, draw] for name, value in draws.items()})
        u = torch.cat([parts[name].reshape(-1) for name in function.sites])
        assert float(stats["lp"][chain, draw]) == pytest.approx(-float(function.potential(u)), abs=1e-9)
    # lp is the density at the end of a trajectory, energy the total at its start: lp before, and a kinetic part >= 0.
    assert bool((stats["energy"][:, 1:] >= -stats["lp"][:, :-1] - 1e-9).all())
    assert bool(((stats["acceptance_rate"] >= 0) & (stats["acceptance_rate"] <= 1)).all())
    assert 0.6 < float(stats["acceptance_rate"].mean()) < 1, "the step size was adapted"
    assert bool((stats["n_steps"] < 2 ** stats["tree_depth"]).all())
    assert bool((stats["n_steps"] >= 2 ** (stats["tree_depth"] - 1)).all())
    assert int(stats["tree_depth"].max()) <= 5
    assert torch.equal(stats["reached_max_treedepth"], stats["n_steps"] == 31)
    assert stats["step_size"].unique(dim=1).shape[1] == 1, "frozen after warm-up"
    assert fit.cost["gradient_evaluations"] > int(stats["n_steps"].sum())
    assert fit.cost["steps"] == 2 * 120


def test_density_is_the_hand_written_one_with_its_jacobian(double: None) -> None:
    function = density(conjugate, DATA)
    assert {name: tuple(shape) for name, shape in function.sites.items()} == {"loc": (), "rate": (), "shares": (2,)}
    u = torch.tensor([0.3, -0.7, 0.2, -1.1])
    rate = u[1].exp()
    stick = torch.distributions.biject_to(constraints.simplex)
    shares = stick(u[2:])
    by_hand = (
        dist.Normal(0.0, 2.0).log_prob(u[0])
        + dist.Gamma(2.0, 1.0).log_prob(rate)
        + u[1]
        + dist.Dirichlet(torch.ones(3)).log_prob(shares)
        + stick.log_abs_det_jacobian(u[2:], shares)
        + dist.Normal(u[0], 1.5).log_prob(VALUES).sum()
        + dist.Poisson(rate).log_prob(COUNTS).sum()
        + shares[KINDS].log().sum()
    )
    assert float(function.potential(u)) == pytest.approx(-float(by_hand), abs=1e-12)
    loc, site_rate, site_shares = function.values(u)
    assert float(loc) == float(u[0]) and float(site_rate) == float(rate) and torch.equal(site_shares, shares)
    assert torch.autograd.gradcheck(function.potential, u.requires_grad_())


def mixture(x):
    weight = pyro.sample("weight", dist.Beta(2.0, 2.0))
    loc = pyro.sample("loc", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(weight)).long()
        pyro.sample("x", dist.Normal(loc[z], 0.5), obs=x)


def test_discrete_sites_are_summed_out(double: None) -> None:
    function = density(mixture, VALUES)
    u = torch.tensor([0.4, -0.5, 1.5])
    weight = u[0].sigmoid()
    parts = dist.Normal(u[1:], 0.5).log_prob(VALUES[:, None]) + torch.stack([1 - weight, weight]).log()
    by_hand = (
        parts.logsumexp(-1).sum()
        + dist.Normal(0.0, 3.0).log_prob(u[1:]).sum()
        + dist.Beta(2.0, 2.0).log_prob(weight)
        + (weight * (1 - weight)).log()
    )
    assert float(function.potential(u)) == pytest.approx(-float(by_hand), abs=1e-12)
    replay = record_checked(function.potential_and_gradient, [u, -u]).load()
    assert float(replay(2 * u)[0]) == pytest.approx(float(function.potential(2 * u)), abs=1e-12)


def test_support_may_depend_on_another_site(double: None) -> None:
    def model(x):
        top = pyro.sample("top", dist.LogNormal(0.0, 1.0))
        inner = pyro.sample("inner", dist.Uniform(0.0, top))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(inner, 1.0), obs=x)

    function = density(model, VALUES)
    for u in (torch.tensor([0.2, -0.4]), torch.tensor([1.5, 0.9])):
        top, inner = function.values(u)
        assert 0 < float(inner) < float(top) == pytest.approx(float(u[0].exp()))
    # Given top, inner / top is uniform before the data: its logit has density s (1 - s), whatever top is.
    share = torch.tensor(0.9).sigmoid()
    log_prior = dist.LogNormal(0.0, 1.0).log_prob(u[0].exp()) + u[0] + (share * (1 - share)).log()
    likelihood = dist.Normal(share * u[0].exp(), 1.0).log_prob(VALUES).sum()
    assert float(function.potential(u)) == pytest.approx(-float(log_prior + likelihood), abs=1e-12)


def same(first, second):
    return all(torch.equal(first.learned.draws[name], second.learned.draws[name]) for name in first.learned.draws)


def by_branches(x):
    """A density that no recording serves."""
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    scale = 1.0 if float(loc.detach()) > 0 else 1.5
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, scale), obs=x)


@pytest.mark.parametrize(
    ("model", "sampler"),
    [(conjugate, "nutpie"), pytest.param(conjugate, "pyro", marks=pytest.mark.slow), (by_branches, "auto")],
    ids=["nutpie", "pyro", "not recorded"],
)
def test_draws_do_not_depend_on_the_number_of_processes(model, sampler) -> None:
    data = DATA if model is conjugate else VALUES
    threads = torch.get_num_threads()
    chains = NUTS(draws=30, warmup=30, chains=3, sampler=sampler)
    one, two = (pg.fit(model, data, replace(chains, processes=n), seed=4) for n in (1, 2))
    other, fewer = (pg.fit(model, data, replace(chains, chains=2, processes=1), seed=s) for s in (5, 4))
    assert same(one, two)
    assert torch.equal(fewer.learned.draws["loc"], one.learned.draws["loc"][:2]), "nor on the number of chains"
    assert not torch.equal(other.learned.draws["loc"], fewer.learned.draws["loc"])
    assert "processes" not in two.notes
    assert ("potential" in one.notes) == (model is by_branches)
    first, second = one.learned.draws["loc"][:2]
    assert not torch.equal(first, second), "every chain has its own seed"
    assert torch.get_num_threads() == threads


def test_what_cannot_be_pickled_runs_here_and_says_so() -> None:
    lock = threading.Lock()

    def model(x):
        with lock:
            by_branches(x)

    here = pg.fit(model, VALUES, NUTS(draws=20, warmup=20, chains=2, processes=2), seed=4)
    assert "one after another" in here.notes["processes"] and "pickle" in here.notes["processes"]
    assert same(here, pg.fit(by_branches, VALUES, NUTS(draws=20, warmup=20, chains=2, processes=1), seed=4))


SCRIPT = """
import pyro, torch
import pyro.distributions as dist
import ppl_gen as pg
from ppl_gen.inference import NUTS

print("started")
width = 2.0

def model(x):
    loc = pyro.sample("loc", dist.Normal(0.0, width))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

def branching(x):
    loc = pyro.sample("loc", dist.Normal(0.0, width))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0 if float(loc.detach()) > 0 else width), obs=x)

for program in (model, branching):
    fit = pg.fit(program, torch.ones(5), NUTS(draws=20, warmup=20, chains=2, processes=2), seed=0)
    print(fit.learned.draws["loc"].shape, sorted(fit.notes))
"""


@pytest.mark.slow
def test_a_script_needs_no_main_guard(tmp_path) -> None:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    lines = ["started", "torch.Size([2, 20]) []", "torch.Size([2, 20]) ['potential']"]
    assert done.stdout.split("\n")[:-1] == lines, "the script ran once, not once per worker"


def interrupt_at(fraction, total):
    """A callback that interrupts once so many iterations of all chains are done."""

    def callback(step, info):
        if step >= fraction * total:
            raise KeyboardInterrupt

    return callback


@pytest.mark.slow
def test_interrupt_keeps_what_was_drawn() -> None:
    nuts = NUTS(draws=100, warmup=50, chains=2, processes=1, sampler="pyro")
    fit = pg.fit(conjugate, DATA, nuts, seed=2, callbacks=[interrupt_at(0.9, 300)])
    whole = pg.fit(conjugate, DATA, nuts, seed=2)
    assert fit.status == pg.Status.INTERRUPTED and "interrupted" in fit.message
    # At 270 of 300 iterations chain 0 is done and chain 1 has 70 draws: two chains of 70 are more than one of 100.
    assert fit.learned.draws["loc"].shape == (2, 70)
    assert torch.equal(fit.learned.draws["loc"], whole.learned.draws["loc"][:, :70])
    early = pg.fit(conjugate, DATA, nuts, seed=2, callbacks=[interrupt_at(0.4, 300)])
    assert early.learned.draws["loc"].shape == (1, 70)


def test_interrupt_before_the_first_draw_is_passed_on() -> None:
    with pytest.raises(KeyboardInterrupt):
        pg.fit(conjugate, DATA, NUTS(draws=10, warmup=50, chains=2, processes=1), callbacks=[interrupt_at(0.1, 120)])


@pytest.mark.slow
def test_interrupt_of_workers_keeps_what_was_drawn() -> None:
    nuts = NUTS(draws=3000, warmup=20, chains=2, processes=2, sampler="pyro")
    fit = pg.fit(conjugate, DATA, nuts, seed=2, callbacks=[interrupt_at(0.02, 6040)])
    chains, draws = fit.learned.draws["loc"].shape
    assert fit.status == pg.Status.INTERRUPTED and chains in (1, 2) and 0 < draws < 3000
    assert bool(fit.learned.draws["rate"].gt(0).all())
    again = pg.fit(conjugate, DATA, NUTS(draws=20, warmup=20, chains=2, processes=2, sampler="pyro"), seed=2)
    assert again.status == pg.Status.FINISHED, "new workers start after the old ones were stopped"


def test_progress_counts_iterations_of_all_chains() -> None:
    seen = []
    nuts = NUTS(draws=20, warmup=10, chains=2, processes=1, thin=2)
    pg.fit(conjugate, DATA, nuts, callbacks=[lambda step, info: seen.append((step, info["divergences"]))])
    assert [step for step, _ in seen] == list(range(1, 101))


def test_thinning_keeps_every_second_draw() -> None:
    settings = {"warmup": 30, "chains": 1, "processes": 1}
    all_of_them = pg.fit(conjugate, DATA, NUTS(draws=40, **settings), seed=3)
    thinned = pg.fit(conjugate, DATA, NUTS(draws=20, thin=2, **settings), seed=3)
    assert torch.equal(thinned.learned.draws["rate"], all_of_them.learned.draws["rate"][:, 1::2])
    assert torch.equal(thinned.learned.stats["lp"], all_of_them.learned.stats["lp"][:, 1::2])


def test_starts_lie_within_the_jitter_of_the_programs_values(double: None) -> None:
    function = density(conjugate, DATA)
    start = {"rate": torch.tensor(50.0), "shares": torch.tensor([0.2, 0.3, 0.5])}
    parts = function.parts_of({**start, "unknown": torch.tensor(1.0)})
    points = torch.stack([starting_point(function, parts, 0.1) for _ in range(20)])
    assert float((points[:, 1] - math.log(50.0)).abs().max()) <= 0.1 and float(points[:, 1].std()) > 0.02
    assert float((points[:, 2:] - parts["shares"]).abs().max()) <= 0.1
    assert float(points[:, 0].abs().max()) <= 2.0 and float(points[:, 0].std()) > 0.5
    wide = torch.stack([starting_point(function, parts, None) for _ in range(20)])
    assert float((wide[:, 1] - math.log(50.0)).abs().max()) <= 2.0 and float(wide[:, 1].std()) > 0.5
    across = torch.stack([starting_point(function, parts, None, point) for point in wide])
    assert bool((across.sign() == -wide.sign()).all()) and bool(((across.abs() >= 1) & (across.abs() <= 2)).all())
    exact = starting_point(function, parts, 0.0)
    assert torch.allclose(function.values(exact)[2], start["shares"], atol=1e-12)
    assert "loc" not in function.parts_of({"loc": torch.tensor(float("inf"))})
    assert torch.equal(function.parts_of({"shares": start["shares"][None]})["shares"], parts["shares"])
    with pytest.raises(ValueError, match=r"start: site 'shares' has shape \(3,\)"):
        function.parts_of({"shares": torch.ones(2) / 2})


def test_the_given_values_themselves_are_tried_at_last(double: None) -> None:
    def narrow(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.factor("window", torch.where((loc - 0.3).abs() < 1e-9, 0.0, -math.inf))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    function = density(narrow, VALUES)
    for opposite in (None, torch.tensor([0.3])):
        assert float(starting_point(function, {"loc": torch.tensor([0.3])}, None, opposite)) == pytest.approx(
            0.3, abs=1e-9
        )


def test_continues_from_a_fit_that_found_points() -> None:
    recipe = pg.Program(mixture, relabel=ordered, start=lambda: {"loc": torch.tensor([-1.0, 1.0])})
    em = pg.fit(recipe, VALUES, EM(prior=True, steps=50), seed=0)
    nuts = NUTS(draws=1, warmup=1, chains=4, jitter=0.0, target_accept=0.999, max_tree_depth=1, processes=1)
    fit = pg.fit(recipe, VALUES, nuts, seed=0, start=em)
    assert em.point is not None
    assert float((fit.learned.draws["loc"] - em.point["loc"]).abs().max()) < 1.5, "one short step from where EM ended"


def two_modes(x):
    t = pyro.sample("t", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(t**2, 1.0), obs=x)


@pytest.mark.parametrize("start", [None, lambda: {"t": torch.tensor(2.0)}], ids=["no start", "start in one mode"])
@pytest.mark.parametrize("seed", [0, 1])
def test_chains_do_not_agree_on_one_of_two_modes(start, seed) -> None:
    """x near 4, so that t is near 2 or -2, with a barrier of 8 rows * 4^2 / 2 = 64 nats: no chain crosses it."""
    x = 4.0 + VALUES - VALUES.mean()
    program = pg.Program(two_modes, start=start)
    fit = pg.fit(program, x, NUTS(draws=60, warmup=60, chains=4, processes=1), seed=seed)
    means = fit.learned.draws["t"].mean(1)
    assert bool((means.abs() - 2.0).abs().max() < 0.2)
    assert bool((means > 0).any()) and bool((means < 0).any()), "both modes are seen"
    assert fit.diagnose()["r_hat"].max() > 1.1 and "starts" not in fit.notes
    assert fit.diagnose().attrs["verdict"].startswith("do not trust")


def narrow(x):
    """A density that is zero beyond 0.03 of t = 30."""
    t = pyro.sample("t", dist.Normal(0.0, 30.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Uniform(t - 0.03, t + 0.03, validate_args=False), obs=0.0 * x + 30.0)


def test_chains_that_begin_together_say_so() -> None:
    near = pg.Program(two_modes, start=lambda: {"t": torch.tensor(2.0)})
    only = pg.Program(narrow, start=lambda: {"t": torch.tensor(30.0)})
    mixed = pg.Program(mixture, start=lambda: {"loc": torch.tensor([-1.0, 1.0])})
    ended = pg.fit(mixed, VALUES, EM(prior=True, steps=20), seed=0)
    few = {"draws": 5, "warmup": 5, "processes": 1}
    for program, jitter, start in [(near, 0.1, None), (mixed, 0.1, ended), (only, None, None)]:
        note = pg.fit(program, VALUES, NUTS(chains=4, jitter=jitter, **few), seed=0, start=start).notes["starts"]
        assert "all 4 chains" in note and "could not disagree" in note
        assert ("leave out jitter" in note) == (jitter is not None)
        alone = pg.fit(program, VALUES, NUTS(chains=1, jitter=jitter, **few), seed=0, start=start)
        assert "starts" not in alone.notes, "a single chain has a verdict of its own"
    assert "in weight, loc" in pg.fit(mixed, VALUES, NUTS(chains=2, jitter=0.1, **few), start=ended).notes["starts"]


def test_no_starting_point_names_the_sites() -> None:
    def model(x):
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Uniform(100.0 + scale, 200.0, validate_args=False), obs=x)

    with pytest.raises(ValueError, match=r"no starting point.*100 tries(.|\n)*site 'x': log density -inf(.|\n)*start="):
        pg.fit(model, VALUES, NUTS(draws=5, warmup=5, chains=1))


def ordered(draws):
    order = draws["loc"].argsort(-1)
    swapped = order[..., 0] == 1
    return {
        "loc": draws["loc"].gather(-1, order),
        "weight": torch.where(swapped, 1 - draws["weight"], draws["weight"]),
    }


def test_relabelling_comes_after_the_run() -> None:
    nuts = NUTS(draws=20, warmup=30, chains=4, processes=1)
    plain, sorted_ = (pg.fit(pg.Program(mixture, relabel=relabel), VALUES, nuts, seed=0) for relabel in (None, ordered))
    loc = plain.learned.draws["loc"]
    assert bool((loc[..., 0] > loc[..., 1]).any()), "without it some chains have the labels swapped"
    assert torch.equal(sorted_.learned.draws["loc"], loc.sort(-1).values)
    with pytest.raises(ValueError, match=r"relabel: expected 'loc' of shape \(80, 2\)"):
        pg.fit(pg.Program(mixture, relabel=lambda draws: {**draws, "loc": draws["loc"][0]}), VALUES, nuts, seed=0)


def parameters(x):
    scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, scale), obs=x)


def only_discrete(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def counted(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Poisson(2.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def hidden_randomness(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc + torch.randn(()), 1.0), obs=x)


def moving_support(x):
    z = pyro.sample("z", dist.Bernoulli(0.5))
    loc = pyro.sample("loc", dist.Uniform(0.0, 1.0 + z))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def handed(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample=torch.arange(3)) as rows:
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x[rows])


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (parameters, "no free parameters"),
        (only_discrete, "none: z are finite"),
        (counted, "differentiable latents"),
        (hidden_randomness, "differs between two evaluations"),
        (moving_support, "the support of loc depends on a discrete"),
        (handed, "is handed 3 of its 8 rows"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_refuses_programs_that_do_not_fit(model, reason) -> None:
    with pytest.raises(pg.IncompatibleError, match=reason):
        pg.fit(model, VALUES, NUTS(draws=5, warmup=5, chains=1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draws": 0}, "draws: expected a whole number of at least 1"),
        ({"chains": 1.5}, "chains: expected a whole number"),
        ({"warmup": True}, "warmup: expected a whole number"),
        ({"processes": 0}, "processes: expected a whole number"),
        ({"target_accept": 1.0}, "target_accept: expected a number between 0 and 1"),
        ({"jitter": -0.1}, "jitter: expected a number of at least 0"),
        ({"sampler": "stan"}, "sampler: expected one of 'auto', 'nutpie', 'pyro', got 'stan'"),
        ({"mass": "full"}, "mass: expected one of 'auto', 'dense', 'low_rank', 'diagonal', got 'full'"),
        ({"mass": "low_rank", "full_mass": True}, "mass: expected 'dense', as full_mass=True, got 'low_rank'"),
        ({"sampler": "nutpie", "full_mass": True}, "mass: nutpie has no mass matrix 'dense'"),
        ({"sampler": "pyro", "mass": "low_rank"}, "mass: pyro has no mass matrix 'low_rank'"),
    ],
)
def test_refuses_settings_out_of_range(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        NUTS(**settings)


def test_divergences_are_counted_and_reported() -> None:
    def walled(x):
        """A density that ends in walls no gradient announces: trajectories run into them."""
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Uniform(loc, loc + 1.0, validate_args=False), obs=x)

    fit = pg.fit(walled, VALUES[:1], NUTS(draws=60, warmup=60, chains=2, processes=1), seed=0)
    count = int(fit.learned.stats["diverging"].sum())
    assert count > 10 and fit.cost["divergences"] == count and f"{count} divergences" in fit.message
    loc = fit.learned.draws["loc"]
    assert bool(((loc > float(VALUES[0]) - 1) & (loc < float(VALUES[0]))).all()), "no draw lies behind a wall"
    assert "diverged" in fit.diagnose().attrs["verdict"]


def test_a_posterior_of_small_scale_costs_no_more() -> None:
    """Two sds, 0.001 and 1. Pyro's own mass matrix is regularised by 0.001 I and needs four times the trajectory."""

    def scaled(small):
        def model(x):
            pyro.sample("loc", dist.Normal(x.new_zeros(2), x.new_tensor([small, 1.0])).to_event(1))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

        return model

    nuts = NUTS(draws=60, warmup=200, chains=1, processes=1)
    steps = [
        float(pg.fit(scaled(small), VALUES, nuts, seed=0).learned.stats["n_steps"].double().mean())
        for small in (1e-3, 1.0)
    ]
    assert steps[0] < 1.5 * steps[1] < 12


@pytest.mark.parametrize("full", [True, False])
def test_mass_matrix_scales_with_the_posterior_and_survives_a_stuck_chain(full, double) -> None:
    torch.manual_seed(0)
    scales = torch.tensor([1e-4, 1.0, 30.0])
    draws = torch.randn(40, 3) @ torch.tensor([[1.0, 0.9, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 1.0]])

    def estimated(rows):
        metric = Metric()
        metric.configure({("u",): (3, 3) if full else (3,)}, options={"dtype": torch.float64})
        for row in rows:
            metric.update({"u": row}, None)
        metric.end_adaptation()
        return metric.inverse_mass_matrix[("u",)]

    plain, scaled = estimated(draws), estimated(draws * scales)
    outer = torch.outer(scales, scales) if full else scales**2
    assert torch.allclose(scaled, plain * outer, rtol=1e-9)
    covariance = draws.T.cov() if full else draws.var(0)
    # n / (n + 5) of the covariance and 5 / (n + 5) of its diagonal times (3 / 40)^2.
    own = covariance.diagonal().diag() if full else covariance
    assert torch.allclose(plain, (40 * covariance + 5 * (3 / 40) ** 2 * own) / 45, rtol=1e-9)
    stuck = estimated(draws[:1].expand(40, 3))
    least = torch.linalg.eigvalsh(stuck).min() if full else stuck.min()
    assert float(least) > 0 and bool(stuck.isfinite().all())


def test_networks_without_trainable_weights_may_stand_in_the_program() -> None:
    torch.manual_seed(0)
    network = nn.Linear(1, 1).requires_grad_(False)

    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(network(loc.reshape(1)), 1.0), obs=x)

    one, two = (pg.fit(model, VALUES, NUTS(draws=20, warmup=20, chains=2, processes=n), seed=1) for n in (1, 2))
    assert same(one, two) and network.weight.dtype is torch.float32
    slope, offset = (float(value) for value in (network.weight, network.bias))
    mean = slope * float((VALUES - offset).sum()) / (1 + len(VALUES) * slope**2)
    # 40 draws, mixing well: standard error of about sd / 5.
    assert abs(float(one.learned.draws["loc"].mean()) - mean) < 6 / 5


def test_eight_schools_through_fit_and_arviz() -> None:
    """0.25 sd of mu (3.31) is five standard errors at an effective sample size of 400."""

    def eight_schools(sigma, y=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("data", len(sigma)):
            offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * offset, sigma), obs=y)

    data = {
        "sigma": torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18]),
        "y": torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12]),
    }
    fit = pg.fit(eight_schools, data, NUTS(draws=300, warmup=200, chains=2, processes=1), seed=1)
    assert float(effective_sample_size(fit.learned.draws["mu"])) > 400
    tree = fit.to_arviz(draws=20)
    assert abs(float(tree.posterior["mu"].mean()) - 4.41) < 0.25 * 3.31
    assert tree.posterior["offset"].shape == (2, 300, 8)
    assert {"diverging", "energy", "lp", "acceptance_rate", "tree_depth", "step_size"} <= set(
        tree.sample_stats.data_vars
    )
    assert fit.data.dtype is torch.float64, "the algorithm's own dtype, where neither data nor user asks for one"
