"""Other ways to draw from a diffusion model, on rows that are normal, where all of them have a closed form.

The chain back has the exact means of normal rows (`best_chain`), so its own law is known: variances carried from x_T
down to x_0. Means of draws are held to |z| < 5, a false alarm of 6e-7 each; weighed chains have a variance of at most
four times that of independent draws (z-scores of up to 3.1 were measured).
"""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from fixtures import float64_under
from torch import nn

import ppl_gen as pg
from ppl_gen.inference import SVI
from ppl_gen.models import ddim_sample, denoising_diffusion, guided_sample, ppca
from ppl_gen.models.diffusion.chain import Diffusion
from ppl_gen.models.diffusion.noising import noise_schedule
from ppl_gen.program.program import Recipe

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")  # chains and guides are short on purpose

Z = 5.0
STILL = {"steps": 1, "lr": 1e-30}  # one step too small to change any weight
MIDDLE, SPREAD, VARIANCE = torch.tensor([[3.0, -1.0], [2.0, 0.5], [0.7, 1.8]], dtype=torch.float64)

float64_and_seed = float64_under(11)


class Linear(nn.Module):
    """A chain back whose means are x_t times a slope."""

    def __init__(self, slope, scale):
        super().__init__()
        self.slope, self.scale = nn.Parameter(slope), scale

    def forward(self, x, t):
        return self.slope[t - 1] * x, self.scale[t - 1].expand_as(x)


def best(steps):
    """A fit whose rows are Normal(0, VARIANCE) in standard units, up to its start; and the variance that they have."""
    noising, variance = noise_schedule("linear", steps), VARIANCE
    carried = noising.kept[:, None] * variance + noising.noise[:, None]  # variance of x_t, t = 0..T
    slope = (1 - noising.betas).sqrt()[:, None] * carried[:-1] / carried[1:]
    scale = (noising.betas[:, None] * carried[:-1] / carried[1:]).sqrt()
    chain = Diffusion(noising, Linear(slope, scale), MIDDLE, SPREAD)
    own = torch.ones(2, dtype=torch.float64)
    for t in range(steps, 0, -1):
        own = slope[t - 1] ** 2 * own + scale[t - 1] ** 2
    rows = MIDDLE + SPREAD * torch.randn(4, 2)
    return pg.fit(Recipe(lambda data: chain.program()), rows, SVI(**STILL), seed=0), chain, own


def start(rows, seed):
    torch.manual_seed(seed)
    return torch.randn(rows, 2)


# -------------------------------------------------------------------------------------------------- fewer steps
def test_without_noise_it_is_the_map_that_carries_one_normal_to_the_other():
    """The flow of probability between normals scales x_T by the ratio of the deviations (Song et al. 2021)."""
    fit, chain, _ = best(300)
    ends = chain.noising.kept[-1] * VARIANCE + chain.noising.noise[-1]
    expected = MIDDLE + SPREAD * (VARIANCE / ends).sqrt() * start(50, 3)
    errors = [float((ddim_sample(fit, 50, steps=steps, seed=3) - expected).abs().max()) for steps in (10, 50, 300)]
    assert errors[0] > 0.5 > 3 * errors[1] > 12 * errors[2] and errors[2] < 0.05, errors  # as 1 / steps


def test_with_all_steps_and_all_noise_it_draws_from_the_posterior_at_the_predicted_start():
    fit, chain, _ = best(6)
    state = start(20, 3)
    with torch.no_grad():
        for t in range(6, 0, -1):
            mean, width = chain.noising.posterior(chain.start_in(state, t), state, t)
            state = mean + width * torch.randn_like(state) if t > 1 else mean
    torch.testing.assert_close(ddim_sample(fit, 20, eta=1.0, seed=3), MIDDLE + SPREAD * state, rtol=0, atol=1e-8)


def test_the_predicted_start_is_the_mean_given_the_noisy_row():
    _, chain, _ = best(10)
    state = torch.randn(5, 2)
    for t in (1, 4, 10):
        kept, noise = chain.noising.kept[t], chain.noising.noise[t]
        exact = kept.sqrt() * VARIANCE / (kept * VARIANCE + noise) * state
        torch.testing.assert_close(chain.start_in(state, t).detach(), exact, rtol=0, atol=1e-8)


# -------------------------------------------------------------------------------------------------- guidance
AT, WIDTH = 5.0, 1.0  # of the density that guides: the first column is Normal(AT, WIDTH^2)


def judged(x):
    return dist.Normal(AT, WIDTH).log_prob(x[:, 0])


def product(variance):
    """Mean and variance of the first column of p(x) r(x) / Z."""
    own = SPREAD[0] ** 2 * variance[0]
    both = 1 / (1 / own + 1 / WIDTH**2)
    return both * (MIDDLE[0] / own + AT / WIDTH**2), both


def off(rows, variance):
    """z-scores of the mean, and of the variance, of the first column."""
    mean, spread = product(variance)
    x = rows[:, 0]
    return float((x.mean() - mean) / (spread / len(x)) ** 0.5), float((x.var() / spread - 1) / (2 / len(x)) ** 0.5)


@pytest.mark.parametrize("steps", [10, 50])
def test_weighed_chains_are_draws_of_the_product_at_any_number_of_steps(steps):
    fit, _, own = best(steps)
    rows = guided_sample(fit, judged, 10_000, seed=1)
    found, alone = off(rows, own), off(guided_sample(fit, judged, 10_000, correct=False, seed=1), own)
    assert max(map(abs, found)) < 2 * Z, found
    assert max(map(abs, alone)) > 4 * Z, "the steps alone miss it, and this would be seen"
    second = (rows[:, 1] - MIDDLE[1]) / (SPREAD[1] * own[1].sqrt())
    assert abs(float(second.mean())) * 100 < 2 * Z, "the other column is left alone"


def test_a_guide_that_knows_the_noise_is_right_in_small_steps_without_weights():
    fit, chain, own = best(300)

    def told(x, t):  # E[r(x_0) | x_t]: what is unknown of x_0 widens r
        kept, noise = chain.noising.kept[t], chain.noising.noise[t]
        state = (x[:, 0] - MIDDLE[0]) / SPREAD[0]
        carried = kept * VARIANCE[0] + noise
        guess = MIDDLE[0] + SPREAD[0] * kept.sqrt() * VARIANCE[0] / carried * state
        left = SPREAD[0] ** 2 * VARIANCE[0] * noise / carried
        return dist.Normal(AT, (WIDTH**2 + left).sqrt()).log_prob(guess)

    found = off(guided_sample(fit, told, 4000, noisy=True, correct=False, seed=1), own)
    assert max(map(abs, found)) < Z + 2, found  # steps of 1/300 are off by less than two standard errors (measured)


def test_a_guide_that_says_nothing_changes_nothing():
    fit, _, own = best(20)
    rows = guided_sample(fit, lambda x: torch.zeros(len(x)), 4000, seed=1)
    z = (rows.mean(0) - MIDDLE) / (SPREAD * own.sqrt()) * 4000**0.5
    assert float(z.abs().max()) < Z


def test_few_chains_that_carry_the_weight_are_told_of():
    fit, _, _ = best(5)
    with pytest.warns(UserWarning, match="chains carried the weight"):
        guided_sample(fit, lambda x: dist.Normal(60.0, 0.01).log_prob(x[:, 0]), 1000, seed=1)


def test_without_weights_a_density_without_a_gradient_is_refused_as_it_would_move_nothing():
    fit, _, own = best(50)

    def cut(x):
        return judged(x.detach())

    with pytest.raises(ValueError, match="log_density: no gradient reaches the rows.*correct=True"):
        guided_sample(fit, cut, 200, correct=False, seed=1)
    found = off(guided_sample(fit, cut, 20_000, seed=1), own)
    assert max(map(abs, found)) < 8 * Z, "chains that are only weighed are right, and few of them count"
    assert guided_sample(fit, lambda x: torch.zeros(len(x)), 5, correct=False, seed=1).shape == (5, 2)


def test_steps_that_overshoot_are_told_of():
    fit, _, _ = best(10)
    with pytest.warns(UserWarning, match="standard deviations from the mean of the data: log_density is so steep"):
        rows = guided_sample(fit, lambda x: dist.Normal(AT, 0.01).log_prob(x[:, 0]), 100, correct=False, seed=1)
    assert float(rows.abs().max()) > 100.0


# -------------------------------------------------------------------------------------------------- mistakes
@pytest.fixture(scope="module")
def small():
    return pg.fit(denoising_diffusion(steps=4, hidden=4), torch.randn(20, 2), SVI(steps=1), seed=0)


def test_arguments_out_of_range_are_refused(small):
    for bad in ({"n": 0}, {"steps": 5}, {"steps": 0}, {"eta": 1.5}, {"eta": -0.1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ddim_sample(small, **{"n": 2, **bad})
    with pytest.raises(TypeError, match="log_density: expected a function"):
        guided_sample(small, 3.0, 2)
    with pytest.raises(ValueError, match=r"log_density: expected one number for each of 4 rows, got shape \(4, 2\)"):
        guided_sample(small, lambda x: x, 4)
    with pytest.raises(ValueError, match="log_density: expected finite numbers"):
        guided_sample(small, lambda x: x[:, 0].log(), 50)


def test_a_density_that_is_none_of_each_row_by_itself_is_refused() -> None:
    """Each was sampled from without a word, and none of them is p(x) r(x)."""
    small = pg.fit(denoising_diffusion(steps=4, hidden=4), torch.randn(40, 2), SVI(steps=2), seed=0)
    centres = torch.arange(6.0)
    wrong = {
        "other rows change it": lambda x: x[:, 0] - x[:, 0].mean(),
        "other numbers when it is asked again": lambda x: nn.functional.dropout(x, 0.5).sum(1),
    }
    for why, judged in wrong.items():
        for correct in (True, False):
            with pytest.raises(ValueError, match=f"log_density: expected log r of each row by itself, and.*{why}"):
                guided_sample(small, judged, 6, correct=correct)
    with pytest.raises(ValueError, match="log_density: .*the place of a row changes it.*take correct=False"):
        guided_sample(small, lambda x: -((x[:, 0] - centres) ** 2), 6)
    assert guided_sample(small, lambda x: -((x[:, 0] - centres) ** 2), 6, correct=False).shape == (6, 2)
    assert guided_sample(small, lambda x: -(x[:, 0] ** 2), 1).shape == (1, 2)
    normed = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).train()
    first = guided_sample(small, lambda x: normed(x).log_softmax(-1)[:, 1], 6, seed=1)
    assert normed.training and int(normed[1].num_batches_tracked) == 0
    assert torch.equal(first, guided_sample(small, lambda x: normed.eval()(x).log_softmax(-1)[:, 1], 6, seed=1))


def test_fits_of_other_programs_are_refused():
    fit = pg.fit(ppca(2, 1), torch.randn(20, 2), SVI(steps=1), seed=0)
    for act in (lambda: ddim_sample(fit, 2), lambda: guided_sample(fit, judged, 2)):
        with pytest.raises(pg.IncompatibleError, match="needs a fit of denoising_diffusion, got one of 'ppca'"):
            act()
