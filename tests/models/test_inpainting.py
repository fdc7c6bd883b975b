"""Rows completed by a diffusion model, against the conditional of a normal distribution that it generates exactly.

Two numbers in standard units with correlation 0.9, one of them seen at 1: the other is Normal(0.9, 0.19). Means of n
draws are held to |z| < 5 (false alarms of 6e-7 each), beside a bias that was measured for three seeds and is bounded by
twice that. The chain back has the exact means and, in 200 steps, all but the exact widths.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from fixtures import float64_under
from torch import nn

import ppl_gen as pg
from ppl_gen.inference import SVI
from ppl_gen.models import binomial_diffusion, denoising_diffusion, inpaint, ppca
from ppl_gen.models.diffusion.chain import Diffusion
from ppl_gen.models.diffusion.noising import noise_schedule
from ppl_gen.program.program import Recipe

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")  # chains and guides are short on purpose

Z = 5.0
STILL = {"steps": 1, "lr": 1e-30}  # one step too small to change any weight
RHO = 0.9
MIDDLE, SPREAD = torch.tensor([[3.0, -1.0], [2.0, 0.5]], dtype=torch.float64)

float64_and_seed = float64_under(11)


class Exact(nn.Module):
    """E[x_{t-1} | x_t] of rows that are Normal(0, covariance), and the diagonal of its covariance."""

    def __init__(self, noising, covariance):
        super().__init__()
        eye = torch.eye(len(covariance))
        at = noising.kept[:, None, None] * covariance + noising.noise[:, None, None] * eye
        kept = (1 - noising.betas).sqrt()[:, None, None]
        gain = kept * at[:-1] @ torch.linalg.inv(at[1:])
        self.gain = nn.Parameter(gain)
        self.scale = (at[:-1] - kept * gain @ at[:-1]).diagonal(dim1=-2, dim2=-1).sqrt()

    def forward(self, x, t):
        # One step for all rows, or one for each, whose gains then are as many matrices.
        mean = (self.gain[t - 1] @ x.unsqueeze(-1)).squeeze(-1)
        return mean, self.scale[t - 1].expand_as(x)


def exact_fit(steps, covariance, middle=MIDDLE, spread=SPREAD):
    noising = noise_schedule("linear", steps)
    chain = Diffusion(noising, Exact(noising, covariance), middle, spread)
    rows = middle + spread * torch.randn(4, len(covariance))
    return pg.fit(Recipe(lambda data: chain.program()), rows, SVI(**STILL), seed=0)


@pytest.fixture(scope="module")
def pair():
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.random.fork_rng():
            return exact_fit(200, torch.tensor([[1.0, RHO], [RHO, 1.0]]))
    finally:
        torch.set_default_dtype(default)


def asked(rows):
    """The first number seen at one standard deviation, the second hidden under nonsense."""
    x = torch.stack([MIDDLE[0] + SPREAD[0], torch.tensor(1e6)]).expand(rows, 2)
    return x, torch.tensor([True, False]).expand(rows, 2)


def off(drawn):
    """How far mean and variance of the second number, in standard units, are from 0.9 and 0.19; their standard errors."""
    y = (drawn[..., 1].flatten() - MIDDLE[1]) / SPREAD[1]
    return float(y.mean() - RHO), float(y.var() - (1 - RHO**2)), (0.19 / len(y)) ** 0.5, 0.19 * (2 / len(y)) ** 0.5


@pytest.mark.slow
def test_plain_replacement_listens_too_little_and_both_ways_out_mend_it(pair):
    x, seen = asked(2000)  # measured with 200 steps: -0.29 and 0.12, -0.01 and 0.00; particles -0.24, -0.05
    plain = off(inpaint(pair, x, seen, resamples=1, seed=1))
    more = off(inpaint(pair, x, seen, resamples=10, seed=1))
    jumps = off(inpaint(pair, x, seen, resamples=10, jump=5, seed=1))
    few, many = (off(inpaint(pair, x[:500], seen[:500], particles=n, seed=1)) for n in (5, 200))
    assert plain[0] < -0.2 and plain[1] > 0.08, "the bias that the documentation states"
    assert abs(more[0]) < 0.05 + Z * more[2] and abs(more[1]) < 0.03 + Z * more[3], more
    assert abs(jumps[0]) < 0.5 * abs(plain[0]) and abs(many[0]) < 0.5 * abs(few[0]), (jumps, few, many)


def test_predict_completes_what_a_mask_hides_and_leaves_what_is_seen():
    fit = pg.fit(denoising_diffusion(steps=5, hidden=8), torch.randn(20, 3), SVI(steps=3), seed=0)
    x, seen = torch.randn(6, 3), torch.rand(6, 3) < 0.5
    nonsense = torch.where(seen, x, torch.nan)
    made = fit.predict({"x": x, "mask": seen}, draws=4)
    assert set(made) == {"x"} and made["x"].shape == (4, 6, 3)
    assert bool((made["x"][:, seen] == x[seen]).all()), "what is seen stays, to the bit"
    assert bool((made["x"][:, ~seen].std(0) > 0).all()), "what is hidden is drawn"
    assert torch.equal(fit.predict({"x": nonsense, "mask": seen}, draws=4)["x"], made["x"])
    whole = torch.ones_like(seen)
    assert torch.equal(fit.predict({"x": x, "mask": whole}, draws=1)["x"][0], x)
    assert torch.equal(inpaint(fit, x[:1], seen[:1]), fit.predict({"x": x[:1], "mask": seen[:1]}, draws=1)["x"])


def test_rows_of_which_nothing_is_seen_are_rows_of_the_program(pair):
    x, seen = asked(2000)
    free = inpaint(pair, x, torch.zeros_like(seen), resamples=2, seed=1)[0]
    units = (free - MIDDLE) / SPREAD
    assert float((units.mean(0) * 2000**0.5).abs().max()) < Z
    correlation = float(torch.corrcoef(units.T)[0, 1])
    assert abs(correlation - RHO) < Z * (1 - RHO**2) / 2000**0.5 + 0.01  # the widths are exact up to O(1 / T)


def test_images_and_bits_are_completed_too():
    bits = (torch.rand(12, 1, 4, 4) < 0.5).double()
    seen = torch.rand(12, 1, 4, 4) < 0.5
    for recipe, x in (
        (denoising_diffusion(steps=3, hidden=4, layers=2), bits + 0.1 * torch.randn(12, 1, 4, 4)),
        (binomial_diffusion(steps=3, hidden=4, layers=2), bits),
    ):
        fit = pg.fit(recipe, x, SVI(steps=1), seed=0)
        for made in (fit.predict({"x": x, "mask": seen}, draws=2)["x"], inpaint(fit, x, seen, draws=2, particles=3)):
            assert made.shape == (2, *x.shape) and bool((made[:, seen] == x[seen]).all())
            assert recipe.name == "denoising_diffusion" or bool(((made == 0) | (made == 1)).all())


@pytest.mark.parametrize(
    "mask, message",
    [
        (torch.ones(6, 3), r"'mask': expected booleans, True where x is observed, got torch.float"),
        (torch.ones(6, dtype=torch.bool), r"'mask': expected the shape of x, \(6, 3\), got \(6,\)"),
        (torch.ones(5, 3, dtype=torch.bool), r"'mask': expected the shape of x, \(6, 3\), got \(5, 3\)"),
    ],
)
def test_masks_that_do_not_suit_are_refused(mask, message):
    fit, x = pg.fit(denoising_diffusion(steps=3, hidden=4), torch.randn(20, 3), SVI(steps=1)), torch.randn(6, 3)
    for act in (lambda: fit.predict({"x": x, "mask": mask}, draws=1), lambda: inpaint(fit, x, mask)):
        with pytest.raises(ValueError, match=message):
            act()


def test_a_mask_is_refused_where_only_whole_rows_will_do():
    recipe, rows = denoising_diffusion(steps=3, hidden=4), torch.randn(20, 3)
    fit = pg.fit(recipe, rows, SVI(steps=1))
    data = {"x": rows, "mask": torch.rand(20, 3) < 0.5}
    for act in (
        lambda: pg.fit(recipe, data, SVI(steps=1)),
        lambda: fit.evidence(data),
        lambda: fit.posterior(data, draws=1),
        lambda: pg.prior_predictive(recipe, data, draws=1),
    ):
        with pytest.raises(pg.IncompatibleError, match="'mask' looks like a mask.*fit.predict of a diffusion model"):
            act()
    with pytest.raises(ValueError, match="no site or input named .'mask'"):
        fit.sample(20, given={"mask": data["mask"]})
    with pytest.raises(ValueError, match="leave resamples and jump out"):
        inpaint(fit, data["x"], data["mask"], particles=3, resamples=2)
    with pytest.raises(pg.IncompatibleError, match="inpaint needs a fit of denoising_diffusion or binomial_diffusion"):
        inpaint(pg.fit(ppca(3, 1), rows, SVI(steps=1)), data["x"], data["mask"])


def test_a_program_of_ones_own_says_how_its_rows_are_completed():
    def model(x):
        pyro.param("unused", torch.zeros(()))
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).expand([2]).to_event(1), obs=x)

    def imputes(values, seen, x):
        return {"x": torch.where(seen, x, values["loc"])}

    rows = torch.randn(20, 2) + 3.0
    fit = pg.fit(pg.Program(model, imputes=imputes), rows, SVI(steps=50), seed=0)
    seen = torch.tensor([[True, False]]).expand(20, 2)
    made = fit.predict({"x": rows, "mask": seen}, draws=5)["x"]
    assert bool((made[..., 0] == rows[:, 0]).all()) and bool((made[..., 1] == made[:, :1, 1]).all())
    assert len(made[:, 0, 1].unique()) == 5, "one draw of the globals for each"


def test_a_fit_says_that_its_completions_are_approximate():
    rows = torch.randn(20, 3)
    fit = pg.fit(denoising_diffusion(steps=3, hidden=4), rows, SVI(steps=1), seed=0)
    assert "approximate" in fit.notes["completion"] and "particles" in fit.notes["completion"]
    assert "completion" not in pg.fit(ppca(3, 1), rows, SVI(steps=1), seed=0).notes
    seen = torch.rand(20, 3) < 0.5
    assert torch.equal(inpaint(fit, {"x": rows}, seen), inpaint(fit, rows, seen))
    with pytest.raises(TypeError, match="notes: expected a mapping"):
        pg.Program(lambda x: None, notes="approximate")
