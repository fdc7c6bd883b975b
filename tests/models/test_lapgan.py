"""Pyramids of images and their adversarial networks; recurrent generators."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.nn.functional import softplus

import ppl_gen as pg
from ppl_gen.inference import SVI, Adversarial, ConditionalAdversarial
from ppl_gen.models import from_pyramid, gran, lapgan, laplacian_pyramid


def _images(rows=40, side=16, channels=1):
    return torch.rand(rows, channels, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("side", "levels"), [(28, 2), (16, 4), (64, 1)])
def test_a_pyramid_gives_its_images_back(side, levels):
    for images in (_images(5, side, 3), _images(5, side, 3).float()):
        bands = laplacian_pyramid(images, levels)
        assert [band.shape[2] for band in bands] == [side // 2**k for k in range(levels + 1)]
        assert float((from_pyramid(bands) - images).abs().max()) < 1e-6
    # By hand: the coarsest is the mean of blocks, and every band has a mean of zero over each 2 x 2 pixels.
    blocks = images.unfold(2, 2**levels, 2**levels).unfold(3, 2**levels, 2**levels).mean((-1, -2))
    torch.testing.assert_close(bands[-1], blocks)
    pairs = bands[0].unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
    assert float(pairs.abs().max()) < 1e-6 < float(bands[0].abs().max())


def test_samples_are_made_from_coarse_to_fine():
    images = _images()
    fit = pg.fit(lapgan(levels=2, latent=3, filters=4, hidden=(8,)), images, SVI(ConditionalAdversarial(), steps=2))
    made = fit.sample(6)
    assert made["coarse"].shape == (6, 1, 4, 4) and made["level_1"].shape == (6, 1, 8, 8)
    assert made["x"].shape == (6, 1, 16, 16) and made["z_0"].shape == (6, 1, 16, 16)
    low = made["level_1"].repeat_interleave(2, 2).repeat_interleave(2, 3)
    detail = fit.module("detail_0")(low, made["z_0"])
    torch.testing.assert_close(made["x"], low + detail)
    torch.testing.assert_close(made["coarse"], fit.module("coarse")(made["z"]))
    assert set(fit.module("critic").keys()) == {"coarse", "level_1", "x"}


def test_what_is_observed_at_each_scale_is_the_halved_image():
    seen = {}

    class Critic(nn.Module):
        def __init__(self, name, channels, side):
            super().__init__()
            self.name, self.last = name, nn.Linear(channels * side * side, 1)

        def forward(self, x):
            seen.setdefault(self.name, []).append(x.detach())
            return self.last(x.flatten(1))

    images = _images(10)
    critics = {"coarse": Critic("coarse", 1, 8), "x": Critic("x", 2, 16)}
    recipe = lapgan(levels=1, latent=3, filters=4, hidden=(8,))
    fit = pg.fit(recipe, images, SVI(ConditionalAdversarial(critics, penalty="none"), steps=1), seed=0)
    small = images.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    real, made = seen["x"][1:3]
    torch.testing.assert_close(real, torch.cat([images, large], 1))
    # Made given the observed coarse image, not a made one; the critic sees that beside it.
    torch.testing.assert_close(made[:, 1:], large)
    assert float((made[:, :1] - images).abs().max()) > 0.1
    torch.testing.assert_close(seen["coarse"][1], small)
    assert fit.notes["critic"] == "coarse: as given; x: as given; constraint: none"


def _chain(x, y):
    """y given x is 2 x + 1 with noise 0.5; what the program has to find."""
    slope, shift = pyro.param("slope", torch.tensor(0.0)), pyro.param("shift", torch.tensor(0.0))
    loc, log_sd = pyro.param("loc", torch.tensor(0.0)), pyro.param("log_sd", torch.tensor(0.0))
    with pyro.plate("data", len(x)):
        x = pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        pyro.sample("y", dist.Normal(slope * x + shift, log_sd.exp()), obs=y)


def _pairs(rows=2000):
    generator = torch.Generator().manual_seed(0)
    x = 1.0 + torch.randn(rows, generator=generator)
    return {"x": x, "y": 2 * x + 1 + 0.5 * torch.randn(rows, generator=generator)}


@pytest.mark.slow
def test_conditional_games_learn_what_each_site_is_given_the_ones_before():
    found = {}
    for steps in (1, 1500):
        rates = {"critic": 5e-3, "program": 1e-2}
        schedule = lambda o, n=steps: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.05, total_iters=max(n, 2))  # noqa: E731
        algorithm = SVI(ConditionalAdversarial(), steps=steps, batch_size=200, lr=rates, schedule=schedule)
        fit = pg.fit(_chain, _pairs(), algorithm, seed=0)
        values = [float(fit.params[name]) for name in ("loc", "slope", "shift")]
        found[steps] = max(abs(a - b) for a, b in zip(values, (1.0, 2.0, 1.0), strict=True))
    # Players circle their optimum at about their rate times the number of steps of a turn: 0.2 as in the other games.
    assert found[1500] < 0.25 < 0.9 < found[1]


def test_the_losses_are_sums_over_sites_of_the_non_saturating_game():
    class Slope(nn.Module):
        def __init__(self, weights):
            super().__init__()
            self.weights = nn.Parameter(torch.tensor(weights))

        def forward(self, x):
            return x @ self.weights

    critics = {"x": Slope([0.3]), "y": Slope([0.5, -0.2])}
    data = {name: value.double() for name, value in _pairs(200_000).items()}
    played = ConditionalAdversarial(critics, penalty="none")
    fit = pg.fit(_chain, data, SVI(played, steps=1, lr=1e-12), seed=0)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(2, 200_000, generator=generator, dtype=torch.float64)
    y, x = data["y"], data["x"]
    real = softplus(-0.3 * x).mean() + softplus(-(0.5 * y - 0.2 * x)).mean()
    made = softplus(0.3 * noise[0]).mean() + softplus(0.5 * noise[1] - 0.2 * x).mean()
    # Other draws of the made rows: standard errors of 0.5 / sqrt(200 000) = 0.001 each.
    assert abs(float(fit.history["critic_loss"][0]) - float(real + made)) < 0.01
    paid = softplus(-0.3 * noise[0]).mean() + softplus(-(0.5 * noise[1] - 0.2 * x)).mean()
    assert abs(float(fit.history["program_loss"][0]) - float(paid)) < 0.01


def test_what_a_mask_hides_is_seen_by_no_critic():
    generator = torch.Generator().manual_seed(0)
    x, seen = torch.randn(64, 2, generator=generator), torch.rand(64, generator=generator) < 0.5

    def program(x, y, seen):
        scale = pyro.param("scale", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            z, e = (pyro.sample(name, dist.Normal(torch.zeros(2), 1.0).to_event(1)) for name in ("z", "e"))
            with pyro.poutine.mask(mask=seen):
                pyro.sample("x", dist.Normal(scale * z, 0.5).to_event(1), obs=x)
            pyro.sample("y", dist.Normal(scale * e, 0.5).to_event(1), obs=y)

    def first(x):
        data = {"x": x, "y": torch.ones(64, 2), "seen": seen}
        fit = pg.fit(program, data, SVI(ConditionalAdversarial(), steps=1, lr=1e-12), seed=0)
        return [float(fit.history[name][0]) for name in ("critic_loss", "program_loss", "critic_real")]

    # Not in x's own critic, and not in that of y, which sees x beside y.
    filler = torch.where(seen[:, None], x, torch.full_like(x, 100.0))
    assert first(filler) == first(x) != first(2 * x)


@pytest.mark.parametrize("shape", ["same", "parent"])
def test_noise_behind_several_observed_sites_is_refused(shape):
    """Given x, the z that y is made from is no draw of its prior; drawn anew, x and y would be learned as independent."""

    def program(x, y):
        scale = pyro.param("scale", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            one, two = (pyro.sample(n, dist.Normal(z, 1.0)) for n in "ab") if shape == "parent" else (z, z)
            pyro.sample("x", dist.Delta(scale * one), obs=x)
            pyro.sample("y", dist.Delta(scale * two), obs=y)

    data = torch.randn(20), torch.randn(20)
    with pytest.raises(pg.IncompatibleError, match="makes both x and y from 'z'"):
        pg.fit(program, data, SVI(ConditionalAdversarial(), steps=1), seed=0)
    assert pg.fit(program, data, SVI(Adversarial(), steps=1), seed=0).status == "finished"


def test_critics_are_flat_in_their_site_and_free_in_what_it_is_made_from():
    class Slope(nn.Module):
        def __init__(self, weights):
            super().__init__()
            self.weights = nn.Parameter(torch.tensor(weights))

        def forward(self, x):
            return x @ self.weights

    data = {name: value.double() for name, value in _pairs().items()}
    first = {}
    for penalty in ("none", "r1"):
        critics = {"x": Slope([0.3]), "y": Slope([0.5, -0.2])}
        objective = ConditionalAdversarial(critics, penalty=penalty, penalty_weight=2.0)
        fit = pg.fit(_chain, data, SVI(objective, steps=1, lr=1e-12), seed=0)
        first[penalty] = {name: float(fit.history[name][0]) for name in fit.history if name != "step"}
    # Slopes of 0.3 in x and of 0.5 in y, in units of their standard deviations; y's critic has -0.2 in x for nothing.
    wanted = (0.09 * data["x"].var(correction=0) + 0.25 * data["y"].var(correction=0)) / 2
    assert first["r1"]["penalty"] == pytest.approx(float(wanted), rel=1e-5) and "penalty" not in first["none"]
    assert first["r1"]["critic_loss"] - first["none"]["critic_loss"] == pytest.approx(2 * float(wanted), rel=1e-4)


def test_under_r1_default_critics_judge_each_row_alone_and_programs_are_averaged():
    recipe, images = lapgan(levels=1, latent=3, filters=4, hidden=(8,)), _images()

    def norms(penalty):
        fit = pg.fit(recipe, images, SVI(ConditionalAdversarial(penalty=penalty), steps=2), seed=0)
        assert "average of the iterates" in fit.notes["averaging"]
        return [m for m in fit.module("critic").modules() if isinstance(m, nn.BatchNorm2d)]

    assert norms("none") and not norms("r1")


def test_a_critic_of_ones_own_with_batch_norm_plays_without_r1_unless_r1_is_asked_for():
    class Joined(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(width, 4), nn.BatchNorm1d(4), nn.LeakyReLU(), nn.Linear(4, 1))

        def forward(self, x):
            return self.layers(x.reshape(len(x), -1))

    data, critics = _pairs(), {"x": Joined(1), "y": Joined(2)}
    fit = pg.fit(_chain, data, SVI(ConditionalAdversarial(critics), steps=2), seed=0)
    assert fit.notes["critic"].endswith("constraint: none") and "penalty" not in fit.history
    assert "without batch norm" in fit.notes["if modes are missing"]
    own = pg.fit(_chain, data, SVI(ConditionalAdversarial({"y": nn.Linear(2, 1)}), steps=2), seed=0)
    assert own.notes["critic"].endswith("constraint: r1") and "penalty" in own.history
    with pytest.raises(ValueError, match="BatchNorm1d ties the rows of a batch together, so penalty='r1'"):
        pg.fit(_chain, data, SVI(ConditionalAdversarial(critics, penalty="r1"), steps=1), seed=0)


@pytest.mark.slow
def test_coarse_images_start_as_spread_as_the_data():
    """Where all start alike, a critic that knows one image from the data moves all of them together."""
    images = _images(200, side=8)
    for hidden in ((256, 256), (8,), ()):
        fit = pg.fit(lapgan(hidden=hidden), images, SVI(ConditionalAdversarial(), steps=1, lr=1e-12), seed=0)
        spread = (
            fit.sample(1000, seed=0)["coarse"].std(0).mean()
            / fit.data.batch().args[0].unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2)).std(0).mean()
        )
        # Normal weights: the square of the spread is 1 on average over 16 pixels, sd sqrt(2 / width) each and 1/4 of
        # that over all; torch's own initial weights would give 0.1.
        assert 0.5 < float(spread) < 1.6, hidden


def test_a_site_that_reads_its_own_observation_and_one_without_gradient_are_refused():
    def forced(x):
        w = pyro.param("w", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w * x.cumsum(-1), 1.0).to_event(1), obs=x)

    with pytest.raises(pg.IncompatibleError, match="reads its own observation of x"):
        pg.fit(forced, torch.randn(10, 4), SVI(ConditionalAdversarial(), steps=1))
    bits = (torch.rand(20, 9) > 0.5).float()
    with pytest.raises(pg.IncompatibleError, match="gives no gradient to its draws of x"):
        pg.fit(pg.models.vae(latent=2, hidden=(3,)), bits, SVI(ConditionalAdversarial(), steps=1))


def test_sides_that_cannot_be_halved_are_refused():
    with pytest.raises(ValueError, match=r"levels: images of 9 x 9 pixels can be halved 0 time\(s\), got none"):
        pg.check(lapgan(), _images(side=9))
    with pytest.raises(ValueError, match=r"levels: images of 28 x 28 pixels can be halved 2 time\(s\), got 3"):
        lapgan((1, 28, 28), levels=3)
    names = [site.name for site in pg.check(lapgan(), _images(side=28)).select(kind="observed")]
    assert names == ["coarse", "level_1", "x"]


def test_canvases_add_up_and_one_encoder_reads_each_before_the_next():
    images = _images(channels=2)
    fit = pg.fit(gran(latent=3, steps=3, hidden=5, filters=2), images, SVI(Adversarial(), steps=1), seed=0)
    generator, z = fit.module("generator"), torch.randn(4, 3, dtype=torch.float64)
    with torch.no_grad():
        strokes = generator.canvases(z)
        assert strokes.shape == (3, 4, 2, 16, 16)
        torch.testing.assert_close(generator(z), generator.shades(strokes.sum(0)))
        read, seen = generator.noise(z).tanh(), torch.zeros(4, 5, dtype=torch.float64)
        for stroke in strokes:
            torch.testing.assert_close(stroke, generator.decoder(torch.cat([read, seen], 1)))
            seen = generator.encoder(stroke).tanh()
        assert float((strokes[1] - strokes[2]).abs().max()) > 0
    together, alone = fit.sample(4, given={"z": z})["x"], fit.sample(1, given={"z": z[:1]})["x"]
    torch.testing.assert_close(together[:1], alone)
    one = pg.fit(gran(latent=3, steps=1, hidden=5, filters=2), images, SVI(Adversarial(), steps=1), seed=0)
    assert one.module("generator").canvases(z).shape[0] == 1
