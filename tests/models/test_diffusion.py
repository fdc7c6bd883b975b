"""Denoising diffusion against the algebra of joint Gaussians, and trained on rows whose density is known.

Tolerances: chains of at most 50 products and sums in float64 round to below 1e-13 relative, on values of order 10.
Costs are quadratic in x_t, so three-point Gauss-Hermite quadrature gives their expectations exactly. Monte Carlo means
are held to |z| < 5, a false alarm of 6e-7 each, fewer than ten in all. Trained fits are held to at least twice the
loss that they were measured to have for four seeds.
"""

from __future__ import annotations

import itertools
import math

import pyro.distributions as dist
import pytest
import torch
from diffusion_kit import best_chain, close, exact_elbo, log_density, losses, quadrature, some_linear, z_score
from fixtures import float64_under

import ppl_gen as pg
from ppl_gen.inference import ELBO, IWAE, SVI
from ppl_gen.models import denoising_diffusion
from ppl_gen.models.diffusion.noising import Noising, noise_schedule
from ppl_gen.program.program import Recipe

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")  # chains and guides are short on purpose

Z = 5.0
STILL = {"steps": 1, "lr": 1e-30}  # one step too small to change any weight


float64_and_seed = float64_under(11)


# ------------------------------------------------------------------------------------------------ the noising chain


@pytest.mark.parametrize("kind, steps", [("linear", 50), ("cosine", 20), ("linear", 2), ("cosine", 2)])
def test_closed_forms_of_the_noising_chain_equal_the_algebra_of_its_steps(kind, steps):
    noising = noise_schedule(kind, steps)
    start = torch.tensor([[1.5, -0.4]])
    mean, variance = start, torch.zeros(1)  # of x_{t-1} given x_0, from single steps only
    for t in range(1, steps + 1):
        kept, added = (value / 1.0 for value in noising.step(torch.ones(1, 1), t))
        joint = torch.stack(
            [
                torch.stack([variance, variance * kept[0]]),
                torch.stack([variance * kept[0], variance * kept[0] ** 2 + added**2]),
            ]
        )
        gain = joint[0, 1] / joint[1, 1]
        x = torch.randn(1, 2)
        expected = mean + gain * (x - kept * mean), (joint[0, 0] - gain * joint[1, 0]).clamp(min=0).sqrt()
        for actual, value in zip(noising.posterior(start, x, t), expected, strict=True):
            close(actual, value, 1e-8)
        mean, variance = kept * mean, joint[1, 1]
        marginal = noising.marginal(start, t)
        close(marginal[0], mean, 1e-10)
        close(marginal[1] ** 2, variance, 1e-10)


def test_time_steps_may_differ_by_row():
    noising, start, x = noise_schedule("cosine", 7), torch.randn(7, 3), torch.randn(7, 3)
    t = torch.arange(1, 8)
    rows = noising.step(x, t), noising.marginal(start, t), noising.posterior(start, x, t)
    for i in range(7):
        one, here = start[i : i + 1], x[i : i + 1]
        single = noising.step(here, i + 1), noising.marginal(one, i + 1), noising.posterior(one, here, i + 1)
        for (mean, scale), (expected, width) in zip(rows, single, strict=True):
            assert torch.equal(mean[i], expected[0]) and torch.equal(scale[i], width)


def test_schedules_end_in_noise_and_agree_with_their_papers():
    for kind, steps in itertools.product(("linear", "cosine"), (20, 50, 1000)):
        noising = noise_schedule(kind, steps)
        assert noising.steps == steps and float(noising.kept[-1]) < 1e-4
        assert bool((noising.betas.diff() > 0).all() if kind == "linear" else (noising.betas.diff() >= 0).all())
    # Ho et al. take the line from 1e-4 to 0.02 for the betas themselves: equal up to second order, beta^2 / 2 = 2e-4.
    close(noise_schedule("linear", 1000).betas, torch.linspace(1e-4, 0.02, 1000), 2.1e-4)
    for bad in ((), (0.5, 1.0), (0.0,)):
        with pytest.raises(ValueError, match="betas"):
            Noising(torch.tensor(bad))


# ------------------------------------------------------------------------------------------------- the bound's terms


def test_terms_sum_to_the_bound_which_stays_below_the_density():
    x = torch.randn(6, 2) * torch.tensor([2.0, 0.5]) + torch.tensor([3.0, -1.0])
    for _ in range(5):
        chain = some_linear(steps=6)
        bound = exact_elbo(chain, x)
        close(-quadrature(chain, x), bound, 1e-10)
        assert bool((bound < log_density(chain, x)).all())


@pytest.mark.parametrize("total", [200, 1000])
def test_sampled_time_steps_and_whole_chains_have_the_same_expected_loss(total):
    chain = some_linear(steps=6)
    x = torch.randn(200, 2) + torch.tensor([3.0, -1.0])
    exact = float(-exact_elbo(chain, x).mean())
    sampled = losses(chain, x, ELBO(), 600, total)
    whole = losses(chain, x, ELBO(time_step="all"), 200, total)
    assert z_score(sampled, exact) < Z and z_score(whole, exact) < Z
    for draws in (sampled, whole):
        assert Z * float(draws.std()) / len(draws) ** 0.5 < 0.1, "an error of 0.2 nats would be seen"


@pytest.mark.slow
def test_so_do_they_for_a_network_with_several_particles():
    x = torch.randn(300, 2) * 2.0 + 5.0
    program = denoising_diffusion(2, steps=5, hidden=8, schedule="cosine")(x)
    chain = program.model.__self__
    with torch.no_grad():
        for parameter in chain.reverse.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    sampled = losses(chain, x, ELBO(particles=3), 300, 300)
    whole = losses(chain, x, ELBO(particles=3, time_step="all"), 300, 300)
    spread = (sampled.var() / 300 + whole.var() / 300).sqrt()
    assert float((sampled.mean() - whole.mean()).abs() / spread) < Z
    assert Z * float(spread) < 0.1, "an error of 0.2 nats would be seen"


def test_with_the_exact_score_of_a_gaussian_the_bound_approaches_the_density():
    variance = torch.tensor([0.7, 1.8])
    middle, spread = torch.tensor([3.0, -1.0]), torch.tensor([2.0, 0.5])
    x = middle + spread * variance.sqrt() * torch.tensor([[0.0, 0.0], [1.0, -1.0], [2.0, 0.5], [-1.5, 2.5]])
    truth = dist.Normal(middle, spread * variance.sqrt()).log_prob(x).sum(-1)
    gaps = [float((truth - exact_elbo(best_chain(variance, steps, False), x)).mean()) for steps in (10, 100, 1000)]
    assert gaps[0] > 1e-2 > gaps[1] > 5 * gaps[2] > 0, gaps
    # With the exact widths only the start at Normal(0, I) is off: abar_T = 4e-5 of the variance of x_0.
    assert float((truth - exact_elbo(best_chain(variance, 50, True), x)).abs().max()) < 1e-3


# ------------------------------------------------------------------------------------------------- model and guide


def fixed(chain):
    return Recipe(lambda data: chain.program())


def test_the_untrained_program_is_a_normal_distribution_exactly():
    x = torch.randn(30, 2) @ torch.tensor([[2.0, 1.0], [0.0, 0.5]]) + 4.0
    fit = pg.fit(denoising_diffusion(2, steps=8, hidden=8), x, SVI(**STILL))
    expected = dist.Normal(x.mean(0), x.std(0, correction=0)).log_prob(x).sum(-1)
    for particles in (1, 5):  # every weight is log p(x): no noise at all
        evidence = fit.evidence(particles=particles)
        close(evidence.values, expected, 1e-10)
        assert evidence.mc_stderr < 1e-10 and not evidence.exact
    drawn = fit.sample(20_000, seed=1)
    assert set(drawn) == {"x", *(f"x_{t}" for t in range(1, 9))}
    z = (drawn["x"].mean(0) - x.mean(0)) / (x.std(0) / 20_000**0.5)
    assert float(z.abs().max()) < Z
    close(drawn["x"].std(0) / x.std(0, correction=0), torch.ones(2), Z / 40_000**0.5)
    assert torch.equal(drawn["x"], fit.sample(20_000, seed=1)["x"])


def test_evidence_lies_between_the_bound_and_the_density_and_tightens():
    chain = some_linear(steps=6)
    x = torch.randn(200, 2) * torch.tensor([2.0, 0.5]) + torch.tensor([3.0, -1.0])
    fit = pg.fit(fixed(chain), x, SVI(ELBO(), **STILL))
    truth, bound = float(log_density(chain, x).mean()), float(exact_elbo(chain, x).mean())
    few, many = fit.evidence(particles=5), fit.evidence(particles=2000, seed=1)
    assert bound + 0.05 < few.mean < many.mean < truth + Z * many.mc_stderr
    assert many.mean > truth - 0.02 - Z * many.mc_stderr and few.kind == "importance weighted, 5 particles"
    new = fit.evidence(x + 1.0, particles=2000)
    assert new.mean == pytest.approx(float(log_density(chain, x + 1.0).mean()), abs=0.1)


def test_iwae_runs_both_chains_and_is_tighter_than_the_bound():
    chain = some_linear(steps=6)
    x = torch.randn(100, 2) + torch.tensor([3.0, -1.0])
    elbo, truth = float(exact_elbo(chain, x).mean()), float(log_density(chain, x).mean())
    weighted = losses(chain, x, IWAE(particles=20), 30, 100)
    assert elbo + 0.05 < -float(weighted.mean()) < truth + Z * float(weighted.std()) / 30**0.5
    fit = pg.fit(denoising_diffusion(2, steps=4, hidden=8), x, SVI(IWAE(particles=3), steps=3, batch_size=50), seed=0)
    assert fit.notes["particles"] == "vectorised"


def test_the_whole_chain_trains_the_same_program():
    x = torch.randn(60, 2)
    fit = pg.fit(denoising_diffusion(2, steps=4, hidden=8), x, SVI(ELBO(time_step="all"), steps=3, batch_size=20))
    assert "reparameterised: x_1, x_2, x_3, x_4" in fit.notes["gradients"]
    fit = pg.fit(denoising_diffusion(2, steps=4, hidden=8), x, SVI(ELBO(), steps=3, batch_size=20))
    assert fit.notes["gradients"] == "one of 4 time steps sampled per row"
    assert set(fit.history) == {"program_loss", "chain", "constant"}


# ------------------------------------------------------------------------------------------------------------ training


def test_trained_on_a_correlated_gaussian_its_evidence_nears_the_truth_from_below():
    truth = dist.MultivariateNormal(
        torch.tensor([10.0, 0.0]), torch.tensor([[4.0, 0.85], [0.85, 0.25]])
    )  # correlation 0.85: independent normals lose 0.64 nats
    x, new = truth.sample((1000,)).float(), truth.sample((1000,)).float()
    recipe, near = denoising_diffusion(2, steps=50, hidden=32), 0.1
    best = truth.log_prob(new.double())

    def lost(fit):
        return best - fit.evidence(new, particles=20).values

    assert float(lost(pg.fit(recipe, x, SVI(**STILL))).mean()) > 3 * near
    anneal = SVI(
        steps=800, lr=0.005, schedule=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 800), batch_size=500
    )
    loss = lost(pg.fit(recipe, x, anneal, seed=0))
    assert -Z * float(loss.std()) / len(loss) ** 0.5 < float(loss.mean()) < near


def ring(count):
    """Eight narrow normals on a circle."""
    angle = torch.arange(8) * (math.pi / 4)
    centres = 10.0 + 3.0 * torch.stack([angle.cos(), angle.sin()], 1)
    return centres, centres[torch.randint(8, (count,))] + 0.25 * torch.randn(count, 2)


def energy_distance(a, b):
    """2 E|A - B| - E|A - A'| - E|B - B'|, zero if and only if both have one distribution (Szekely and Rizzo 2013)."""

    def within(rows):
        return torch.cdist(rows, rows).sum() / (len(rows) * (len(rows) - 1))

    return float(2 * torch.cdist(a, b).mean() - within(a) - within(b))


@pytest.mark.slow
def test_trained_on_a_ring_it_finds_every_mode():
    centres, x = ring(1000)
    _, new = ring(1000)
    best = torch.logsumexp(dist.Normal(centres, 0.25).log_prob(new[:, None]).sum(-1), 1) - math.log(8)
    recipe = denoising_diffusion(2, steps=50)

    def judged(fit):
        drawn = fit.sample(1000, seed=1)["x"].double()
        distance, mode = torch.cdist(drawn, centres).min(1)
        near = distance < 4 * 0.25
        least = torch.bincount(mode[near], minlength=8).min() / 125
        lost = float(best.mean()) - fit.evidence(new.float(), particles=20).mean
        return float(near.double().mean()), float(least), energy_distance(drawn, new), lost

    near, least, distance, lost = judged(pg.fit(recipe, x.float(), SVI(**STILL)))
    assert near < 0.5 and least < 0.6 and distance > 0.05 and lost > 2.0, (near, least, distance, lost)
    anneal = SVI(steps=1200, lr=0.003, schedule=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 1200))
    near, least, distance, lost = judged(pg.fit(recipe, x.float(), anneal, seed=0))
    assert near > 0.85 and least > 0.6 and distance < 0.02 and 0 < lost < 0.4, (near, least, distance, lost)


def test_the_same_fit_comes_out_bit_for_bit():
    x = torch.randn(40, 2)
    recipe, algorithm = denoising_diffusion(2, steps=4, hidden=8), SVI(steps=20, batch_size=16, lr=0.01)
    first, again, other = (pg.fit(recipe, x, algorithm, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(first.params[name], again.params[name]) for name in first.params)
    assert first.records == again.records != other.records


@pytest.mark.slow
def test_a_fit_is_found_again_on_disk(tmp_path):
    x, recipe = torch.randn(40, 2), denoising_diffusion(2, steps=4, hidden=8)
    fit = pg.fit(recipe, x, SVI(steps=20, lr=0.01), seed=1)
    loaded = pg.load(fit.save(tmp_path / "fit"), recipe)
    close(loaded.evidence(seed=3).values, fit.evidence(seed=3).values, 1e-10)


# -------------------------------------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    "data, message",
    [
        (torch.randn(5, 3), r"rows of 2 columns, got \(5, 3\)"),
        (torch.randn(5), r"rows of 2 columns, got \(5,\)"),
        (torch.tensor([[1.0, 2.0], [1.0, 3.0]]), r"column\(s\) 0 are constant"),
        ({"y": torch.randn(5, 2)}, "reads the entry 'x'"),
    ],
)
def test_data_that_do_not_suit_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        pg.fit(denoising_diffusion(2, steps=4), data, SVI(steps=1))


def test_arguments_out_of_range_are_refused():
    for bad in ({"features": 0}, {"steps": 1}, {"hidden": 0}, {"layers": 0}, {"schedule": "sigmoid"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            denoising_diffusion(**{"features": 2, **bad})


def test_algorithms_that_need_something_else_refuse_and_say_what_there_is():
    from ppl_gen import inference
    from ppl_gen.models import catalogue

    x, recipe = torch.randn(20, 2), denoising_diffusion(2, steps=4, hidden=8)
    wanting = [(inference.SVI(inference.ContrastiveDivergence(), steps=1), "energy")]
    wanting += [(inference.EM(), "finite local latents"), (inference.NUTS(), "no free parameters")]
    for algorithm, missing in wanting:
        with pytest.raises(pg.IncompatibleError) as caught:
            pg.fit(recipe, x, algorithm)
        message = str(caught.value)
        assert "needs:" in message and "denoising_diffusion offers:" in message and "time steps" in message
        assert missing in message.split("missing:")[1]
        assert "offered by:" in message
    assert "denoising_diffusion" in catalogue.programs_offering("time steps")
