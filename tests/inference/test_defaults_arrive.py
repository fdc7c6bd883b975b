"""SVI where the user left open how it moves: it begins at quasi-Newton paths, and arrives; what is given is kept."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from posteriordb_programs import POSTERIORS
from programs import X8, both, both_guide
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from test_laplace import LINEAR, exact_linear, linear
from torch.distributions import LowRankMultivariateNormal, MultivariateNormal, kl_divergence

import ppl_gen as pg
from ppl_gen.inference import ELBO, IWAE, NUTS, SVI, Laplace, Pathfinder, Plateau
from ppl_gen.inference.guides.frames import _FullRank, _LowRank, _MeanField
from ppl_gen.inference.whitened import WhitenedAdam

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")

KIDS = POSTERIORS["kidiq-kidscore_momhsiq"]


def stopped(program, data, algorithm, after, **settings):
    """The fit after so many steps."""

    def stop(step, info):
        if step == after:
            raise KeyboardInterrupt

    return pg.fit(program, data, algorithm, seed=0, callbacks=[stop], **settings)


def errors(posterior, fit) -> list[float]:
    draws = {name: value[None] for name, value in fit.posterior(draws=4000, seed=1).items()}
    draws = draws if posterior.program.relabel is None else dict(posterior.program.relabel(draws))
    reference = posterior.reference
    return [
        abs(float(value.mean()) - reference[name]["mean"]) / reference[name]["sd"]
        for name, value in posterior.draws(draws).items()
    ]


@pytest.mark.parametrize(
    "name", [n if n.startswith("kidiq") else pytest.param(n, marks=pytest.mark.slow) for n in POSTERIORS]
)
def test_full_rank_arrives_or_says_no(name: str) -> None:
    """Means within 0.3 sd of the reference and k-hat below 0.7; at the rate of old, thousands of sd away on two."""
    posterior = POSTERIORS[name]
    program = replace(posterior.program, guide=AutoMultivariateNormal)
    fit = pg.fit(program, posterior.data, SVI(), seed=0)
    frame = fit.diagnose(draws=1000)
    arrived = max(errors(posterior, fit)) < 0.3 and frame.attrs["pareto_k"] < 0.7
    assert arrived or not fit.verdict.trusted
    assert arrived or name.startswith("eight"), "tau near 0 makes a funnel there"
    assert "Pathfinder" in fit.notes["guide starts"] and "0.05 sd a step" in fit.notes["optimiser"]


def test_the_rate_of_old_does_not_arrive() -> None:
    program = replace(KIDS.program, guide=AutoMultivariateNormal)
    assert max(errors(KIDS, pg.fit(program, KIDS.data, SVI(lr=1e-3, steps=500), seed=0))) > 100


_OTHERS = (AutoMultivariateNormal, AutoDiagonalNormal, AutoLowRankMultivariateNormal)
_SLOW = [pytest.param(guide, marks=pytest.mark.slow) for guide in _OTHERS]


@pytest.mark.parametrize("guide", [None, *_SLOW])
def test_every_normal_guide_finds_its_optimum(guide) -> None:
    """The best mean field of a normal has its means and the sd of each number given the others.

    The mean of 500 iterates with noise of about 1 sd, of which half count: 5 standard errors are 0.3 sd.
    """
    fit = pg.fit(pg.Program(linear, guide), LINEAR, SVI(), seed=0)
    mean, covariance = exact_linear(**LINEAR)
    draws = fit.posterior(draws=20_000, seed=1)["b"]
    sd = covariance.diagonal().sqrt()
    assert float(((draws.mean(0) - mean) / sd).abs().max()) < 0.3
    full = guide in (AutoMultivariateNormal, AutoLowRankMultivariateNormal)
    expected = sd if full else torch.linalg.inv(covariance).diagonal().rsqrt()
    assert float((draws.std(0) / expected).log().abs().max()) < 0.25
    assert fit.status is pg.Status.CONVERGED and 500 <= fit.cost["steps"] <= 2000


def test_it_begins_there_and_not_where_pyro_does() -> None:
    mean, covariance = exact_linear(**LINEAR)
    program = pg.Program(linear, AutoMultivariateNormal)
    far = pg.fit(program, LINEAR, SVI(steps=1), seed=0).params["AutoMultivariateNormal.loc"]
    near = stopped(program, LINEAR, SVI(), 1).params["AutoMultivariateNormal.loc"]
    sd = covariance.diagonal().sqrt()
    assert float(((far - mean) / sd).abs().max()) > 3 > 0.5 > float(((near - mean) / sd).abs().max())


@pytest.mark.parametrize(
    ("guide", "settings"),
    [
        (None, {"lr": 0.01}),
        (None, {"optimiser": "sgd"}),
        (None, {"optimiser": partial(torch.optim.Adam, lr=0.01)}),
        (None, {"clip_norm": 1.0}),
        (None, {"batch_size": 20}),
        (None, {"objective": IWAE(particles=2)}),
        (None, {"objective": ELBO(beta=2.0)}),
        (partial(AutoNormal, init_scale=0.5), {}),
    ],
)
def test_what_the_user_chose_is_kept(guide, settings) -> None:
    fit = stopped(pg.Program(linear, guide), LINEAR, SVI(**settings), 3)
    assert not {"guide starts", "optimiser"} & set(fit.notes) and "learning_rate" not in fit.records


def test_own_guides_move_as_ever() -> None:
    fit = stopped(pg.Program(both, both_guide), X8, SVI(), 3)
    assert not {"guide starts", "optimiser"} & set(fit.notes)


def test_steps_and_rules_are_kept() -> None:
    assert pg.fit(linear, LINEAR, SVI(steps=700), seed=0).cost["steps"] == 700
    rule = Plateau(window=30, tolerance=10.0)
    fit = pg.fit(linear, LINEAR, SVI(stop_rule=rule), seed=0)
    assert fit.cost["steps"] == 100 and "10" in fit.message


def test_a_short_run_looks_for_nothing() -> None:
    fits = [pg.fit(linear, LINEAR, SVI(steps=steps), seed=0) for steps in (99, 100)]
    assert ["guide starts" in fit.notes for fit in fits] == [False, True]


@pytest.mark.parametrize("after", [3, 60])
def test_a_stopped_run_goes_on_bit_for_bit(after, tmp_path) -> None:
    whole = pg.fit(linear, LINEAR, SVI(steps=120), seed=0)
    part = stopped(linear, LINEAR, SVI(steps=120), after, checkpoint=tmp_path / "run", every=2)
    resumed = pg.fit(linear, LINEAR, SVI(steps=120), seed=0, checkpoint=tmp_path / "run", every=2)
    assert part.cost["steps"] == after and "resumed" in resumed.notes
    assert whole.records == resumed.records and whole.records["learning_rate"][-1] < 0.05
    assert all(torch.equal(whole.params[name], resumed.params[name]) for name in whole.params)
    assert not all(torch.equal(whole.params[name], part.params[name]) for name in whole.params)


def test_programs_with_parameters_of_their_own_move_as_ever() -> None:
    def model(x, y):
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        b = pyro.sample("b", dist.Normal(x.new_zeros(3), 2.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ b, scale), obs=y)

    assert "guide starts" not in stopped(model, LINEAR, SVI(), 3).notes


def test_a_start_that_cannot_be_had_is_noted() -> None:
    """The density is infinite everywhere but where Pyro's guide happens to begin."""

    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        pyro.factor("far", torch.where(loc.abs() < 0.9, 0.0 * loc, loc * float("-inf")).sum())

    try:
        fit = stopped(model, torch.zeros(5), SVI(), 3)
    except pg.NonFiniteError as error:
        fit = error.fit
    assert fit.notes["guide starts"].startswith("as Pyro has it")


@pytest.mark.parametrize("first", [Laplace(), Pathfinder(paths=2)])
@pytest.mark.parametrize("settings", [{}, {"lr": 1e-4}])
def test_a_guide_begins_at_a_quick_fit(first, settings) -> None:
    start = pg.fit(linear, LINEAR, first, seed=0)
    fit = pg.fit(linear, LINEAR, SVI(steps=2, **settings), start=start)
    mean, covariance = exact_linear(**LINEAR)
    sd = covariance.diagonal().sqrt()
    assert float(((fit.params["AutoNormal.locs.b"] - mean) / sd).abs().max()) < 0.4
    assert set(fit.params) == {"AutoNormal.locs.b", "AutoNormal.scales.b"}
    assert fit.notes["guide starts"] == "at the normal of the fit to start from"
    assert ("optimiser" in fit.notes) == (not settings)


def test_chains_begin_at_a_quick_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    start = pg.fit(linear, LINEAR, Laplace(), seed=0)
    seen = []
    original = pg.fitting.run.Run.starting_values
    monkeypatch.setattr(pg.fitting.run.Run, "starting_values", lambda run: seen.append(original(run)) or seen[-1])
    pg.fit(linear, LINEAR, NUTS(draws=5, warmup=5, chains=1), start=start)
    assert torch.allclose(seen[0]["b"], exact_linear(**LINEAR)[0], atol=1e-6)


# ------------------------------------------------------------------------------------------------- the pieces
def _normal(size: int) -> MultivariateNormal:
    generator = torch.Generator().manual_seed(size)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    loc = torch.randn(size, generator=generator, dtype=torch.float64)
    return MultivariateNormal(loc, root @ root.T + torch.eye(size, dtype=torch.float64))


def test_at_zeros_the_guide_is_nearest_to_the_normal() -> None:
    """Full rank is the normal itself, the mean field has no slope left in KL(q || p), low rank lies between them."""
    p = _normal(4)

    def full(values):
        return MultivariateNormal(values["loc"], scale_tril=values["scale"][:, None] * values["scale_tril"])

    def field(values):
        return MultivariateNormal(values["loc"], scale_tril=torch.diag(values["scale"]))

    def low(values):
        s = values["scale"]
        return LowRankMultivariateNormal(values["loc"], values["cov_factor"] * s[:, None], s * s)

    def distance(frame, made):
        free = [value.requires_grad_() for value in frame.zeros()]
        q = made(frame.values(free))
        kl = kl_divergence(MultivariateNormal(q.loc, q.covariance_matrix), p)
        return float(kl.detach()), torch.autograd.grad(kl, free)

    mean_field = _MeanField(p.loc, p.scale_tril, [("loc", "scale")], [p.loc.shape])
    least, slopes = distance(mean_field, field)
    assert least > 0.5 and all(float(slope.abs().max()) < 1e-9 for slope in slopes)
    assert distance(_FullRank(p.loc, p.scale_tril), full)[0] < 1e-12
    assert distance(_LowRank(p.loc, p.scale_tril, 2), low)[0] < 0.7 * least


def test_adam_on_free_numbers_is_adam() -> None:
    """With f the identity: torch's Adam at the same rates, and the mean by its weights, which sum to 1."""
    target = torch.tensor([3.0, -1.0])
    ours, theirs = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    whitened = WhitenedAdam([ours], lambda free: [free[0] * 1.0], [torch.zeros(2)])
    plain = torch.optim.Adam([theirs], lr=0.05, eps=1e-12)
    mean, weights = torch.zeros(2), torch.zeros(0)
    for step in range(1, 251):
        plain.param_groups[0]["lr"] = whitened.rate
        for value, optimiser in ((ours, whitened), (theirs, plain)):
            value.grad = 2 * (value.detach() - target)
            optimiser.step()
        assert torch.allclose(ours, theirs, atol=1e-6)
        share = 4 / (step + 3)
        weights = torch.cat([weights * (1 - share), torch.tensor([share])])
        mean = (1 - share) * mean + share * theirs.detach()
    assert float(weights.sum()) == pytest.approx(1.0) and whitened.rate == pytest.approx(0.05 * (100 / 251) ** 0.5)
    assert torch.allclose(whitened.averaged()[0], mean, atol=1e-5)
    again = WhitenedAdam([torch.zeros(2)], lambda free: [free[0] * 1.0], [torch.zeros(2)])
    again.load_state_dict(whitened.state_dict())
    assert torch.equal(again.averaged()[0], whitened.averaged()[0]) and again.rate == whitened.rate
