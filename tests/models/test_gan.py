"""The implicit model of the zoo, and the ring of eight modes that a game has to cover."""

import math

import pytest
import torch
from torch import nn

import ppl_gen as pg
from ppl_gen.inference import IWAE, SVI, Adversarial
from ppl_gen.models.adversarial.gan import gan


def test_rows_start_in_the_units_of_the_data():
    data = torch.randn(500, 2, dtype=torch.float64) * torch.tensor([30.0, 0.002]) + torch.tensor([-400.0, 7.0])
    fit = pg.fit(gan(2, hidden=(8,)), data, SVI(objective=Adversarial(), steps=1), seed=0)
    made = fit.sample(2000)["x"]
    assert made.dtype is torch.float64 and made.shape == (2000, 2)
    # An untrained network puts out less than one standard deviation, on average over rows.
    assert ((made.mean(0) - data.mean(0)).abs() < data.std(0)).all()
    assert ((made.std(0) > 0.02 * data.std(0)) & (made.std(0) < 2 * data.std(0))).all()
    generator = fit.module("generator")
    assert torch.equal(generator.loc, data.mean(0)) and not generator.training


@pytest.mark.parametrize("shape", [(), (1,), (6,), (2, 3)])
def test_any_shape_of_row(shape):
    data = torch.randn(30, *shape)
    fit = pg.fit(gan(math.prod(shape), hidden=()), data, SVI(objective=Adversarial(), steps=2, batch_size=10), seed=0)
    assert fit.sample(4)["x"].shape == (4, *shape)
    assert fit.sample(4)["z"].shape == (4, 16)


def test_a_constant_column_is_made_as_it_is():
    data = torch.stack([torch.randn(30), torch.full((30,), 5.0)], -1)
    fit = pg.fit(gan(2), data, SVI(objective=Adversarial(), steps=3), seed=0)
    assert (fit.sample(50)["x"][:, 1] == 5.0).all()


def test_each_fit_has_a_network_of_its_own():
    recipe, data = gan(2, hidden=(4,)), torch.randn(30, 2)
    algorithm = SVI(objective=Adversarial(), steps=2)
    one, same, other = (pg.fit(recipe, data, algorithm, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.sample(9, seed=5)["x"], same.sample(9, seed=5)["x"])
    assert not torch.equal(one.sample(9, seed=5)["x"], other.sample(9, seed=5)["x"])


def test_it_offers_samples_and_no_density():
    data = torch.randn(30, 2)
    offers = pg.check(gan(2), data).offers
    assert {"samples", "differentiable samples", "data plate"} <= offers and "density" not in offers
    for algorithm in (SVI(), SVI(objective=IWAE())):
        with pytest.raises(pg.IncompatibleError, match="missing: *density"):
            pg.fit(gan(2), data, algorithm)
    fit = pg.fit(gan(2), data, SVI(objective=Adversarial(), steps=1))
    for ask in (fit.evidence, fit.marginal_likelihood):
        with pytest.raises(pg.IncompatibleError, match="no density"):
            ask()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"features": 0}, "features: expected a whole number of at least 1, got 0"),
        ({"features": 2, "latent": 1.5}, "latent: expected a whole number"),
        ({"features": 2, "hidden": (8, 0)}, "hidden: expected a whole number of at least 1, got 0"),
        ({"features": True}, "features"),
    ],
)
def test_sizes_are_whole_numbers(settings, message):
    with pytest.raises(ValueError, match=message):
        gan(**settings)


def test_data_of_another_width_is_refused():
    with pytest.raises(
        ValueError, match=r"features: gan was made for 3 number\(s\) per row, got data of shape \(30, 2\)"
    ):
        pg.fit(gan(3), torch.randn(30, 2), SVI(objective=Adversarial(), steps=1))


# Eight modes on a circle of radius 2 with spread 0.02; a mode counts once a sample comes within 0.2 of it.


def _ring(rows=20_000):
    generator = torch.Generator().manual_seed(0)
    modes = _modes()
    picked = torch.randint(0, 8, (rows,), generator=generator)
    return modes[picked] + 0.02 * torch.randn(rows, 2, generator=generator)


def _modes():
    angle = torch.arange(8) * (math.pi / 4)
    return 2 * torch.stack([angle.cos(), angle.sin()], -1)


def _coverage(fit):
    distance, nearest = torch.cdist(fit.sample(2500)["x"], _modes()).min(-1)
    near = distance < 0.2
    return nearest[near].unique().numel(), float(near.float().mean())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(3))
def test_a_game_under_r1_covers_the_ring_at_its_defaults(seed):
    before, after = (
        pg.modes_covered(
            pg.fit(gan(2), _ring(), SVI(Adversarial(penalty="r1"), steps=steps, batch_size=256), seed=seed).sample(
                2500
            )["x"],
            _modes(),
            within=3 * 0.02,
        )
        for steps in (1, 4000)
    )
    # Measured on 5000 rows with two seeds: 8 of 8, and 0.93 and 0.92 of the samples within three standard deviations.
    assert before[1] < 0.02
    assert after[0] == 8 and after[1] > 0.8


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(4))
def test_a_penalised_wasserstein_game_covers_the_ring(seed):
    critic = nn.Sequential(nn.Linear(2, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1))
    objective = Adversarial("wasserstein", critic=critic, penalty="gradient", critic_steps=5)
    before, after = (
        _coverage(pg.fit(gan(2), _ring(), SVI(objective=objective, steps=steps, batch_size=256), seed=seed))
        for steps in (1, 3000)
    )
    assert before[0] < 8 and before[1] < 0.2  # the discs cover 8 * 0.04 / 4 = 8 % of the circle's area
    assert after[0] == 8 and after[1] > 0.5
