"""The game of an energy and a program: its entropy against exact ones, its equilibrium against the data's normal."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import ppl_gen as pg
from ppl_gen.inference import EBGAN, SVI
from ppl_gen.inference.objectives.ebgan import _seen_by, last_linear, smoothed_entropy, squared_cosine
from ppl_gen.models import gan


class Quadratic(nn.Module):
    """E(x) = (x - b)^2 / 2 v: the normals, up to their constants."""

    def __init__(self):
        super().__init__()
        self.b, self.log_v = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return 0.5 * (x - self.b).square() * (-self.log_v).exp()


def _affine(x):
    loc = pyro.param("loc", torch.tensor(0.5))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Delta(loc + scale * z), obs=x)


def _rows(rows=1000, loc=2.0, scale=1.5):
    rows = torch.randn(rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return loc + scale * (rows - rows.mean()) / rows.std(correction=0)


def _falling(steps):
    return lambda optimiser: torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.02, total_iters=steps)


def _played(steps, **settings):
    objective = EBGAN(energy=Quadratic(), noise=0.5, **settings)
    algorithm = SVI(objective, steps=steps, batch_size=200, lr=2e-2, optimiser="adam", schedule=_falling(max(steps, 2)))
    return pg.fit(_affine, _rows(), algorithm, seed=0)


@pytest.mark.slow
def test_the_equilibrium_is_the_normal_of_the_data():
    found = {}
    for steps in (1, 1500):
        fit = _played(steps)
        energy = fit.module("energy").requires_grad_(False)
        # The noise is half of the data's standard deviation, so that g has to give the rest of the variance.
        smoothed = math.sqrt(float(fit.params["scale"]) ** 2 + 0.75**2)
        found[steps] = torch.tensor(
            [float(energy.b), float((0.5 * energy.log_v).exp()), float(fit.params["loc"]), smoothed]
        )
    wanted = torch.tensor([2.0, 1.5, 2.0, 1.5])
    # Entropy is underestimated by some (sd / noise) / B = 1 % of a nat, and the players end within their last steps,
    # below 0.02 / 50, of where they circle: 0.1 is far beyond both.
    assert float((found[1500] - wanted).abs().max()) < 0.1
    assert float((found[1] - wanted).abs().max()) > 0.4


@pytest.mark.slow
def test_without_its_entropy_the_program_goes_to_a_point_and_the_energy_is_not_that_of_the_data():
    fit = _played(1500, entropy=0.0)
    assert float(fit.params["scale"]) < 0.5 < 1.29  # with entropy: sqrt(1.5^2 - 0.75^2)
    assert float(fit.history["spread"][-50:].mean()) < 0.4


def test_the_entropy_is_a_lower_bound_that_is_near_where_rows_have_neighbours():
    generator, values = torch.Generator().manual_seed(0), {}
    for noise in (0.5, 0.01):
        exact = 0.5 * math.log(2 * math.pi * math.e * (1 + noise**2))
        drawn = []
        for _ in range(200):
            centres = torch.randn(100, 1, generator=generator, dtype=torch.float64)
            x = centres + noise * torch.randn(100, 1, generator=generator, dtype=torch.float64)
            drawn.append(torch.stack(smoothed_entropy(x, centres, torch.tensor(noise, dtype=torch.float64))))
        values[noise] = (torch.stack(drawn).mean(0), exact)
    (near, rows), exact = values[0.5]
    # Of a single normal of sd 1 with 100 rows: below the exact entropy by less than (sd / noise) / B = 0.02, give or take
    # the error of 200 batches, 0.7 / sqrt(200 * 100) = 0.005.
    assert exact - 0.04 < float(near) < exact + 0.02 and float(rows) > 20
    (far, alone), exact = values[0.01]
    assert float(far) < exact - 0.1, "rows far apart on the scale of the noise: the bound is loose"
    assert float(alone) < 5
    one = torch.zeros(8, 3)
    value, rows = smoothed_entropy(one, one, torch.tensor(2.0))
    assert abs(float(value) - 1.5 * math.log(2 * math.pi * 4.0)) < 1e-5 and float(rows) == pytest.approx(8.0)
    apart = 1e3 * torch.arange(8.0)[:, None]
    value, rows = smoothed_entropy(apart, apart, torch.tensor(1.0))
    # log B above that of one normal, at its centre.
    assert abs(float(value) - (0.5 * math.log(2 * math.pi) + math.log(8))) < 1e-5 and float(rows) == pytest.approx(1.0)


def test_the_gradient_of_the_entropy_is_that_of_the_exact_one():
    """d/ds of 1/2 log(s^2 + noise^2) is s / (s^2 + noise^2)."""
    generator, noise, slopes = torch.Generator().manual_seed(0), torch.tensor(0.5, dtype=torch.float64), []
    for _ in range(300):
        scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        centres = scale * torch.randn(200, 1, generator=generator, dtype=torch.float64)
        x = centres + noise * torch.randn(200, 1, generator=generator, dtype=torch.float64)
        smoothed_entropy(x, centres, noise)[0].backward()
        slopes.append(float(scale.grad))
    mean, error = torch.tensor(slopes).mean(), torch.tensor(slopes).std() / 300**0.5
    # The bound's own error is of the order of (sd / noise) / B = 0.01 of a nat.
    assert abs(float(mean) - 0.8) < 0.02 + 4 * float(error)


def test_the_default_energy_learns_two_modes_and_is_lower_there():
    generator = torch.Generator().manual_seed(0)
    x = torch.where(torch.arange(1000) % 2 == 0, -2.0, 2.0)[:, None] + 0.3 * torch.randn(1000, 1, generator=generator)
    fits = [
        pg.fit(gan(latent=2, hidden=(32, 32)), x, SVI(EBGAN(damping=0.01), steps=steps, batch_size=128), seed=0)
        for steps in (1, 800)
    ]
    shares = [(fit.sample(1000)["x"].abs() - 2.0).abs().lt(1.0).float().mean() for fit in fits]
    assert float(shares[0]) < 0.4 < 0.75 < float(shares[1])
    right = float((fits[1].sample(1000)["x"] > 0).float().mean())
    assert 0.2 < right < 0.8, "both modes"
    energy = fits[1].module("energy").requires_grad_(False)
    low, between = (float(energy(torch.full((1, 1), at))) for at in (2.0, 0.0))
    assert low < between - 0.5
    assert fits[1].notes["energy"].startswith("a small network on standardised rows (default)")


def test_the_squared_cosine_is_the_mean_over_pairs():
    features = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pairs = [
        float(torch.cosine_similarity(features[i], features[j], dim=0)) ** 2
        for i in range(7)
        for j in range(7)
        if i != j
    ]
    assert float(squared_cosine(features)) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    assert float(squared_cosine(torch.eye(3))) == 0.0 and float(squared_cosine(torch.ones(4, 2))) == pytest.approx(1.0)
    assert float(squared_cosine(features[:1])) == 0.0, "one row has no other"


@pytest.mark.slow
def test_rows_of_many_columns_are_learned():
    """Among rows without neighbours the entropy is flat: without its penalty the energy runs away from the program."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(8, 8, generator=generator)
    modes = torch.where(torch.rand(2000, 1, generator=generator) < 0.5, -2.0, 2.0)
    x = modes + 0.5 * torch.randn(2000, 8, generator=generator) @ mixing
    told = {}
    for name, objective in {"default": EBGAN(), "bare": EBGAN(penalty_weight=0.0)}.items():
        for steps in (1, 2000):
            fit = pg.fit(gan(latent=8, hidden=(64, 64)), x, SVI(objective, steps=steps, batch_size=128), seed=0)
            told[name, steps] = pg.compare_rows(x[:1000], fit.sample(1000, seed=1)["x"]).accuracy
    # Seen: 0.54 and 0.98; chance has a standard error of 0.011.
    assert told["default", 2000] < 0.65 < 0.9 < min(told["default", 1], told["bare", 2000])


def test_the_penalty_is_there_where_rows_have_no_neighbours():
    generator, program = torch.Generator().manual_seed(0), gan(latent=2, hidden=(4,))

    def played(columns, **settings):
        x = torch.randn(400, columns, generator=generator)
        return pg.fit(program, x, SVI(EBGAN(**settings), steps=2, batch_size=64), seed=0)

    assert "penalty" not in played(1).history and "penalty" not in played(20, penalty_weight=0.0).history
    wide = played(20, pulling_away=0.5)
    assert wide.notes["energy"].endswith("held by R1 of weight 10")
    assert float(wide.history["penalty"].min()) > 0 and 0 < float(wide.history["squared_cosine"].min()) < 1
    normed = nn.Sequential(nn.Linear(20, 4), nn.BatchNorm1d(4), nn.LeakyReLU(), nn.Linear(4, 1))
    assert "penalty" not in played(20, energy=normed).history
    with pytest.raises(ValueError, match="energy: BatchNorm1d ties the rows of a batch together"):
        played(20, energy=normed, penalty_weight=1.0)


class _Backwards(nn.Module):
    """Holds its layers the other way round than it calls them, and one that it does not call."""

    def __init__(self, spare=False):
        super().__init__()
        self.head, self.body = nn.Linear(8, 1), nn.Linear(2, 8)
        self.spare = nn.Linear(3, 3) if spare else None

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


class _ByPlaces(nn.Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(1, 1)

    def forward(self, x):
        return self.line(x.reshape(-1, 1)).reshape(len(x), -1).sum(1)


@pytest.mark.parametrize("spare", [False, True])
def test_made_rows_are_pulled_apart_in_what_goes_into_the_layer_that_is_called_last(spare):
    energy, rows = _Backwards(spare), torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    assert last_linear(energy, rows) is energy.head
    _, features = _seen_by(energy, energy.head, rows)
    assert torch.equal(features, torch.tanh(energy.body(rows)))
    fit = pg.fit(gan(latent=2, hidden=(4,)), rows, SVI(EBGAN(energy=energy, pulling_away=1.0), steps=1), seed=0)
    assert 0 < float(fit.history["squared_cosine"][0]) <= 1
    with pytest.raises(ValueError, match="pulling_away: expected an energy that calls a torch.nn.Linear last with one"):
        pg.fit(gan(latent=2, hidden=(4,)), rows, SVI(EBGAN(energy=_ByPlaces(), pulling_away=1.0), steps=1), seed=0)


def test_hidden_entries_are_refused():
    """Zero among the data and noise among made rows: the energy ran to -59032 after 1500 steps."""

    def program(x, seen):
        loc = pyro.param("loc", torch.zeros(2))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).mask(seen).to_event(1), obs=x)

    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    seen = torch.ones(20, 2, dtype=torch.bool)
    algorithm = SVI(EBGAN(), steps=1)
    assert pg.fit(program, {"x": x, "seen": seen}, algorithm, seed=0).status == "finished"
    seen[3, 1] = False
    with pytest.raises(pg.IncompatibleError, match="hides entries of x by a mask.*Take Adversarial"):
        pg.fit(program, {"x": x, "seen": seen}, algorithm, seed=0)


def test_a_program_that_reads_x_to_make_x_is_refused():
    def forced(x):
        w = pyro.param("w", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w * x.cumsum(-1), 1.0).to_event(1), obs=x)

    with pytest.raises(pg.IncompatibleError, match="reads its own observation of x"):
        pg.fit(forced, torch.randn(10, 4), SVI(EBGAN(), steps=1))
    with pytest.raises(ValueError, match="energy: expected one number for each of 10 rows"):
        pg.fit(gan(4, latent=2, hidden=(3,)), torch.randn(10, 4), SVI(EBGAN(energy=nn.Linear(4, 2)), steps=1))
