"""Weighted moments with their errors, rows' latents against closed forms, and rows that a mixture narrowed onto."""

from __future__ import annotations

import time

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from verdict_kit import as_written, falling, rows
from verdict_locals import collapsed_fit, drawn, linear, posterior
from verdict_shapes import normal_mean, onto_one_row, two_clusters

import ppl_gen as pg
from ppl_gen.diagnostics.lone_rows import lone_rows
from ppl_gen.diagnostics.moments import Moments, compared
from ppl_gen.diagnostics.row_weights import MAX_ROWS, weigh_rows
from ppl_gen.diagnostics.row_weights import _moments as moments_of_rows
from ppl_gen.diagnostics.verdicts import verdict_point, verdict_variational
from ppl_gen.inference import EM, SVI
from ppl_gen.models import gaussian_mixture


def test_errors_of_weighted_moments_are_their_scatter():
    """Normal draws weighted towards Normal(0.5, 1): shift -0.5, ratio 1; 400 repeats give a scatter to 3.5 %."""
    u = np.random.default_rng(0).normal(size=(1000, 400))
    shift, ratio, shift_error, ratio_error = compared(u, np.exp(0.5 * u))
    for found, truth, error in ((shift, -0.5, shift_error), (np.log(ratio), 0.0, ratio_error)):
        # Five standard errors of a mean over repeats, and a bias of order 1 / draws.
        assert abs(found.mean() - truth) < 5 * found.std() / 20 + 5e-3
        assert 0.82 < error.mean() / found.std() < 1.18  # five times 3.5 %


def test_equal_weights_leave_no_error():
    found = compared(np.random.default_rng(0).normal(size=(100, 3)), np.ones((100, 1)))
    assert np.allclose(found[0], 0) and np.allclose(found[1], 1)
    assert np.allclose(found[2:], 0)


def test_a_row_is_off_if_any_of_its_numbers_is():
    shift = np.array([0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 2.0])
    found = Moments(shift, np.ones(7), list("abcdefg"), np.array([0, 0, 1, 1, 2, 2, -1]))
    assert found.rows_beyond(0.35, 1.35) == pytest.approx(1 / 3)
    assert found.count_rows == 3
    assert found.shared().names == ["g"] and len(found.of_rows().names) == 6


def test_collapsed_rows_show_the_closed_form():
    """Guide Normal(0, 1) against the posterior of each row; 1000 draws, of which about 700 count, in 200 rows."""
    fit = collapsed_fit(1, 500, 1.0)(0)
    with fit.bound():
        found = weigh_rows(fit, 1000)
    assert found.moments is not None and found.moments.count_rows == len(found.k) == MAX_ROWS
    turn, tril = posterior(1)
    rows = torch.as_tensor(found.moments.rows)
    truth = (-(drawn(1, 500)(0)[rows] @ turn.T) / tril[0, 0]).flatten().numpy()
    near = np.abs(truth) < 2  # beyond, too few draws are left
    error = np.asarray(found.moments.shift_error)[near]
    # 200 rows at 5 standard errors: a false alarm in 1e-4 if normal; the errors are themselves known to a tenth
    assert (np.abs(found.moments.shift[near] - truth[near]) < 6 * error + 0.02).all()
    assert np.median(found.moments.ratio) == pytest.approx(1 / float(tril[0, 0]), rel=0.1)
    assert np.mean(found.k < 0.7) > 0.9  # k-hat alone would trust it


def test_a_draw_without_a_finite_place_hides_its_own_number_only():
    """A draw at the edge of its support has no place on the unconstrained scale."""
    u = torch.randn(1000, 3, 2, generator=torch.Generator().manual_seed(0))
    tilted = torch.softmax(u[:, :, 1], 0).double().numpy()
    u[7, 1, 0] = torch.inf
    found = moments_of_rows({"z": u}, tilted, np.array([4, 5, 6]))
    assert list(found.names) == ["z[4, 0]", "z[4, 1]", "z[5, 1]", "z[6, 0]", "z[6, 1]"]
    assert found.rows_beyond(0.35, 1.35) == 1.0, "weights exp(u) move each second number by one sd"
    assert np.isfinite(found.shift).all() and np.isfinite(found.shift_error).all()


def test_nearly_equal_weights_are_no_fault():
    assert verdict_variational(1.25, None, 0.7, effective=(3941, 4000)).trusted
    assert not verdict_variational(1.25, None, 0.7, effective=(3000, 4000)).trusted
    shares = np.full(100, 0.98)
    assert verdict_variational(None, np.full(100, 1.2), 0.7, effective_rows=shares).trusted
    assert not verdict_variational(None, np.full(100, 1.2), 0.7, effective_rows=shares - 0.2).trusted


def test_what_few_draws_cannot_exclude_is_doubted():
    """A shift of 0.3 is passed where it is known to 0.05, not where it is known to 0.15."""
    one = ["t"]
    known = Moments(np.array([0.3]), np.array([1.0]), one, None, np.array([0.05]))
    unsure = Moments(np.array([0.3]), np.array([1.0]), one, None, np.array([0.15]))
    assert verdict_variational(0.1, None, 0.7, weighted=known).trusted
    assert not verdict_variational(0.1, None, 0.7, weighted=unsure).trusted


def three_hundred(shift: float, scale: float) -> pg.Fit:
    """The exact posterior of 300 means of normal rows, but for the first of them."""
    size, x = 300, rows(0, 30 * 300).reshape(30, 300)
    first = torch.zeros(size).index_fill(0, torch.tensor(0), 1.0)

    def program(x):
        u = pyro.sample("u", dist.Normal(0.0, 10.0).expand([size]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(u, 1.0).to_event(1), obs=x)

    def guide(x):
        variance = 1 / (1 / 100 + len(x))
        loc = pyro.param("loc", variance * x.sum(0) + shift * variance**0.5 * first)
        pyro.sample("u", dist.Normal(loc, variance**0.5 * (1 + (scale - 1) * first)).to_event(1))

    return as_written(program, guide, lambda _: x)(0)


@pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")
def test_one_of_many_numbers_that_is_far_off_is_seen():
    assert three_hundred(0.0, 1.0).verdict.trusted
    for fit in (three_hundred(1.5, 1.0), three_hundred(0.0, 3.0)):
        assert fit.verdict.grade == "do not trust" and "of u[0] is" in fit.verdict.reason
    some = Moments(np.linspace(-0.5, 0.5, 300) * (np.arange(300) % 16 == 0), np.ones(300), ["t"] * 300)
    assert verdict_variational(0.1, None, 0.7, weighted=some).trusted, "a few beyond 0.35 sd, as chance has it"


def test_a_component_with_a_row_to_itself_is_not_trusted():
    fit = onto_one_row(0)
    assert lone_rows(fit) == [40]
    assert fit.verdict.grade == "do not trust" and "row 40 alone" in fit.verdict.reason
    assert lone_rows(two_clusters(0)) == []
    assert not verdict_point(True, lone=[3]).trusted


def test_a_prior_keeps_components_from_narrowing():
    x = torch.cat([torch.randn(40, generator=torch.Generator().manual_seed(0)), torch.tensor([25.0])]).double()
    assert lone_rows(pg.fit(gaussian_mixture(components=2), x, EM(prior=True), seed=0)) == []


@pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")  # fits of a few steps
@pytest.mark.slow
@pytest.mark.parametrize("rows, steps", [(1_000_000, 100), (50, 2000)])
def test_judging_costs_less_than_fitting(rows, steps):
    """Processor time of this process, beside a fit that runs the program itself at each step, as judging does.

    The first fit and diagnosis pay for what is loaded and compiled once.
    """
    data = 1.0 + torch.randn(rows, generator=torch.Generator().manual_seed(0))
    pg.fit(pg.Program(normal_mean, AutoNormal), data[:50], SVI(steps=50), seed=0).diagnose()
    begun = time.process_time()
    fit = pg.fit(pg.Program(normal_mean, AutoNormal), data, SVI(steps=steps, lr=0.02), seed=0, compile=False)
    fitted = time.process_time()
    fit.diagnose()
    assert time.process_time() - fitted < fitted - begun


@pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")  # fits of a few steps
@pytest.mark.slow
def test_normals_by_row_are_judged_row_by_row_however_many():
    """An autoguide of 100 000 rows, too many for short chains: trained it is trusted, as it begins it is not."""
    data = drawn(1, 100_000)(0)
    steps = 400
    trained = SVI(steps=steps, lr=0.1, schedule=falling(steps))
    assert pg.fit(pg.Program(linear(1), AutoNormal), data, trained, seed=0).verdict.trusted
    assert not pg.fit(pg.Program(linear(1), AutoNormal), data, SVI(steps=10), seed=0).verdict.trusted


@pytest.mark.parametrize("error", [KeyError, AttributeError, ZeroDivisionError, ValueError])
def test_a_program_that_takes_one_draw_at_a_time_is_judged_without_chains(error):
    """Whatever a program raises where all draws go through it at once."""

    def program(x):
        t = pyro.sample("t", dist.Normal(0.0, 10.0))
        if torch._C._functorch.is_functorch_wrapped_tensor(t):
            raise error("one at a time")
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(t, 1.0), obs=x)

    def guide(x):
        variance = 1 / (1 / 100 + len(x))
        pyro.sample("t", dist.Normal(pyro.param("loc", variance * x.sum()), variance**0.5))

    said = as_written(program, guide, rows)(0).verdict
    assert said.trusted and "no short chains were run" in said.reason and "one at a time" in said.reason
