"""Diffusion of images, schedules that are learned, and the plain error of the noise.

Tolerances: closed forms in float64 round to below 1e-10. Monte Carlo means are held to |z| < 5, a false alarm of 6e-7
each. Finite differences of step 1e-5 in float64 are right to about 1e-8.
"""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from diffusion_kit import best_chain, close, losses, quadrature, some_linear, z_score
from fixtures import float64_under

import ppl_gen as pg
from ppl_gen.inference import ELBO, IWAE, SVI, SimpleDiffusion
from ppl_gen.models import binomial_diffusion, ddim_sample, denoising_diffusion
from ppl_gen.models.diffusion.chain import Diffusion
from ppl_gen.models.diffusion.learned_noising import LearnedNoising
from ppl_gen.models.diffusion.noising import noise_schedule
from ppl_gen.nn.unet import UNet

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")  # chains and guides are short on purpose

Z = 5.0
STILL = {"steps": 1, "lr": 1e-30}  # one step too small to change any weight

float64_and_seed = float64_under(11)


def pictures(count):
    """Two channels of four units' spread and none of the first rows; odd sizes, so that halving loses a line."""
    return (
        torch.tensor([5.0, -1.0])[:, None, None] + torch.randn(count, 2, 5, 6) * torch.tensor([4.0, 0.5])[:, None, None]
    )


# ------------------------------------------------------------------------------------------------ images
def test_the_untrained_program_of_images_is_a_normal_distribution_exactly():
    x = pictures(20)
    fit = pg.fit(denoising_diffusion(steps=4, hidden=4, layers=2), x, SVI(**STILL))
    middle, spread = (f(x.transpose(0, 1).flatten(1), 1) for f in (torch.mean, lambda v, d: v.std(d, correction=0)))
    expected = dist.Normal(middle[:, None, None], spread[:, None, None]).log_prob(x).sum((1, 2, 3))
    for particles in (1, 3):
        close(fit.evidence(particles=particles).values, expected, 1e-9)
    drawn = fit.sample(2000, seed=1)["x"]
    assert drawn.shape == (2000, 2, 5, 6)
    z = (drawn.mean((0, 2, 3)) - middle) / (spread / (2000 * 30) ** 0.5)
    assert float(z.abs().max()) < Z
    assert ddim_sample(fit, 3, steps=2).shape == (3, 2, 5, 6)


def test_images_train_by_every_way_that_vectors_do():
    x = pictures(12)
    for objective in (ELBO(), ELBO(time_step="all"), IWAE(particles=2), SimpleDiffusion()):
        fit = pg.fit(denoising_diffusion(steps=3, hidden=4, layers=2), x, SVI(objective, steps=3, batch_size=6), seed=0)
        assert fit.status == "finished" and fit.sample(2)["x"].shape == (2, 2, 5, 6)


def test_steps_that_differ_by_row_and_rows_with_dimensions_before_them():
    network = UNet((2, 5, 6), 4, 2, clock=3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x, clock = torch.randn(3, 4, 2, 5, 6), torch.randn(4, 3)
    whole = network(x, clock)
    for i, j in ((0, 0), (2, 3)):
        close(whole[i, j], network(x[i, j : j + 1], clock[j])[0], 1e-10)


@pytest.mark.slow
def test_trained_on_striped_pictures_its_evidence_beats_independent_pixels():
    """Rows of one colour each: given one pixel of a row, its five others are known up to 0.1."""
    x = (torch.randn(600, 1, 4, 1) + 0.1 * torch.randn(600, 1, 4, 6)).float()
    recipe = denoising_diffusion(steps=30, hidden=8, layers=2)
    exact = dist.MultivariateNormal(torch.zeros(6), torch.ones(6, 6) + 0.01 * torch.eye(6))
    truth = float(exact.log_prob(x.double()).sum((1, 2)).mean())
    still = pg.fit(recipe, x, SVI(**STILL)).evidence(particles=5).mean
    found = pg.fit(recipe, x, SVI(steps=1000, lr=3e-3, batch_size=100), seed=0).evidence(particles=5).mean
    print(still, found, truth)
    assert still < truth - 30 and still + 0.5 * (truth - still) < found < truth + 1


@pytest.mark.parametrize(
    "data, message",
    [
        (torch.randn(5, 4, 4), r"features: expected columns, or images .* got rows of shape \(4, 4\)"),
        (torch.randn(5, 1, 3, 8), "layers: 3 levels halve an image 2 times, and 3 x 8 is too small"),
        (torch.ones(5, 1, 8, 8), r"channel\(s\) 0 are constant"),
    ],
)
def test_images_that_do_not_suit_are_refused(data, message):
    for made in (denoising_diffusion, binomial_diffusion):
        if "constant" not in message or made is denoising_diffusion:
            with pytest.raises(ValueError, match=message):
                pg.fit(made(steps=4), data, SVI(steps=1))
    with pytest.raises(ValueError, match=r"takes rows of shape \(1, 8, 8\), got"):
        pg.fit(denoising_diffusion((1, 8, 8), steps=4), torch.randn(5, 64), SVI(steps=1))


# ------------------------------------------------------------------------------------------------ learned schedules
def test_a_learned_schedule_begins_at_the_fixed_one_and_has_the_gradient_of_the_bound():
    fixed = some_linear(steps=4)
    learned = Diffusion(LearnedNoising(fixed.noising), fixed.reverse, fixed.middle, fixed.spread)
    x = torch.randn(3, 2) + torch.tensor([3.0, -1.0])
    close(quadrature(learned, x), quadrature(fixed, x), 1e-8)
    logits = learned.noising.logits

    def bound():  # as `quadrature` of the tests of vectors, with its gradient
        noising, start, total = learned.noising.current(), learned.standard(x), learned.constant(x)
        nodes, weights = torch.tensor([-1.0, 0.0, 1.0]) * 3**0.5, torch.tensor([1.0, 4.0, 1.0]) / 6
        for t in range(1, 5):
            mean, scale = noising.marginal(start, t)
            for i in range(3):
                for j in range(3):
                    state = mean + scale * nodes[torch.tensor([i, j])]
                    total = total + weights[i] * weights[j] * learned.cost(t, start, state)
        return total.sum()

    (slope,) = torch.autograd.grad(bound(), logits)
    for place in range(4):
        ends = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                logits[place] += step
                ends.append(float(bound()))
                logits[place] -= step
        assert abs(float(slope[place]) - (ends[0] - ends[1]) / 2e-5) < 1e-5 * max(1.0, abs(float(slope[place])))


@pytest.mark.slow
def test_a_learned_schedule_tightens_the_bound_of_few_steps():
    angle = 2 * torch.pi * torch.rand(500)
    x = torch.stack([angle.cos(), angle.sin()], 1) + 0.1 * torch.randn(500, 2)
    found = {}
    for schedule in ("linear", "learned"):
        recipe = denoising_diffusion(steps=8, hidden=32, schedule=schedule)
        fit = pg.fit(recipe, x.float(), SVI(steps=600, lr=5e-3, batch_size=250), seed=0)
        found[schedule] = fit.evidence(particles=1, seed=1).mean
        if schedule == "learned":
            betas = fit.module("noising").current().betas.detach()
            start = noise_schedule("linear", 8).betas
            assert float((betas - start).abs().max()) > 0.02, "the schedule has moved"
            assert fit.sample(5)["x"].shape == (5, 2) and "noising$$$logits" in fit.params
    assert found["learned"] > found["linear"] + 0.1, found  # measured: -1.52 and -1.75


# ------------------------------------------------------------------------------------------------ the plain error
def test_with_the_exact_means_the_plain_error_is_what_no_prediction_can_know():
    variance = torch.tensor([0.7, 1.8])
    chain = best_chain(variance, 20, False)
    x = chain.middle + chain.spread * variance.sqrt() * torch.randn(4000, 2)
    kept, noise = chain.noising.kept[1:, None], chain.noising.noise[1:, None]
    exact = float((kept * variance / (kept * variance + noise)).sum(1).mean())  # Var(noise | x_t), summed over columns
    drawn = losses(chain, x, SimpleDiffusion(), 50, 4000)
    close(drawn.mean(), torch.tensor(exact), 0.02)  # of the 4000 rows drawn: error 2 / 4000^0.5 * 0.5
    assert z_score(drawn, exact) < 3 * Z and exact > 0.2


def test_the_error_moves_the_network_and_the_bound_the_widths():
    x = torch.randn(40, 2)
    program = denoising_diffusion(2, steps=5, hidden=8)(x)
    chain, t = program.model.__self__, torch.arange(40) % 5 + 1
    with torch.no_grad():
        for parameter in chain.reverse.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    network, place = list(chain.reverse.network.parameters()), chain.reverse.place
    error, term = chain.error(t, x)
    assert all(g is None for g in torch.autograd.grad(term.sum(), network, retain_graph=True, allow_unused=True))
    assert torch.autograd.grad(error.sum(), place, retain_graph=True, allow_unused=True) == (None,)
    assert bool((torch.autograd.grad(term.sum(), place)[0] != 0).all())
    fit = pg.fit(denoising_diffusion(2, steps=5, hidden=8), x, SVI(SimpleDiffusion(), steps=20, lr=0.01), seed=0)
    assert set(fit.history) == {"program_loss", "bound"} and "no bound" in fit.notes["loss"]
    assert float((fit.params["denoiser$$$place"] - 1).abs().max()) > 1e-3


def test_what_cannot_be_learned_by_the_plain_error_refuses():
    x = torch.randn(20, 2)
    for recipe, data in (
        (denoising_diffusion(2, steps=4, hidden=8, schedule="learned"), x),
        (binomial_diffusion(2, steps=4, hidden=8), (x > 0).double()),
    ):
        with pytest.raises(pg.IncompatibleError, match="missing: *noise prediction"):
            pg.fit(recipe, data, SVI(SimpleDiffusion(), steps=1))
