"""Flows of images: layers against autograd, batch norm against PyTorch's, pixels against quadrature.

Tolerances of layers are those of `test_flows`: 1e-8 in float64, 1e-4 in float32. An estimate is held to 5.5 of its
standard errors, a false alarm of 4e-8.
"""

from __future__ import annotations

import math

import pytest
import torch
from fixtures import float64_under
from flow_cases import shaken

import ppl_gen as pg
from ppl_gen.inference import SVI, Adversarial
from ppl_gen.models import bits_per_dimension, glow, nice, real_nvp
from ppl_gen.models.flows.glow import ActNorm, InvertibleConvolution
from ppl_gen.models.flows.image_layers import BatchNorm, number_of_scales
from ppl_gen.nn.pixels import Dequantised, Quantised

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")  # runs are short on purpose

STILL = SVI(steps=1, lr=1e-30)
RECIPES = {
    "real_nvp": lambda **more: real_nvp(channels=6, blocks=1, **more),
    "glow": lambda **more: glow(steps=2, channels=6, **more),
}
#: One that goes to a single pixel, one that ends at an odd size, one that is odd, and one pixel.
SHAPES = [(1, 4, 4), (2, 6, 6), (3, 3, 3)]

float64_and_seed = float64_under(7)


def waves(rows, shape=(1, 4, 4), seed=0):
    """Smooth images: a wave of random place and height in each channel, and a little noise."""
    noise = torch.Generator().manual_seed(seed)
    channels, height, width = shape
    place = 2 * math.pi * torch.rand(rows, channels, 1, 1, generator=noise)
    along = torch.arange(height).unsqueeze(-1) + 2.0 * torch.arange(width)
    made = (along + place).sin() * (1 + torch.rand(rows, channels, 1, 1, generator=noise))
    return 3.0 + made + 0.1 * torch.randn(rows, *shape, generator=noise)


def flow_of(name, shape, **more):
    """One with random weights and statistics: as it comes it is the identity."""
    flow = pg.fit(RECIPES[name](**more), waves(30, shape), STILL, seed=0).module("flow")
    for layer in flow.modules():
        if isinstance(layer, BatchNorm):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2.0)
    return shaken(flow, by=0.1)


def gap(flow, rows):
    """Errors of both log determinants against autograd, and of the round trip; and how the determinants spread."""
    size = rows[0].numel()
    exact = torch.stack(
        [
            torch.linalg.slogdet(torch.autograd.functional.jacobian(flow.encode, row).reshape(size, size)).logabsdet
            for row in rows
        ]
    )
    with torch.no_grad():
        codes = flow.encode(rows)
        back, log_det = flow.to_data(codes)
        errors = torch.stack([(flow.log_det(rows) - exact).abs(), (log_det + exact).abs()]).amax()
        return float(max(errors, (back - rows).abs().max())), float(exact.std())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", RECIPES)
def test_log_determinants_are_autograds_and_the_inverse_inverts(name, shape):
    flow = flow_of(name, shape)
    error, spread = gap(flow, waves(6, shape, seed=1))
    assert error < 1e-8 and spread > 1e-3, (error, spread)
    single = flow.float()
    assert single.loc.dtype == torch.float32
    assert gap(single, waves(6, shape, seed=1).float())[0] < 1e-4


@pytest.mark.parametrize("name", RECIPES)
def test_every_pixel_depends_on_others(name):
    flow = flow_of(name, (1, 4, 4))
    slopes = torch.autograd.functional.jacobian(flow.encode, waves(1)[0]).reshape(16, 16)
    assert bool(((slopes - slopes.diag().diag()).abs().amax(1) > 1e-4).all())


@pytest.mark.parametrize(("name", "shape"), [("real_nvp", (1, 1, 2)), ("glow", (2, 1, 1))])
def test_the_density_of_two_pixels_integrates_to_one(name, shape):
    """A trapezoid rule on 400 x 400 points, over the box that holds the images of all codes within 6.5 of zero."""
    flow = flow_of(name, shape)
    with torch.no_grad():
        angle = torch.arange(400) * (math.pi / 200)
        far = flow.decode(6.5 * torch.stack([angle.cos(), angle.sin()], 1).reshape(-1, *shape)).reshape(-1, 2)
        sides = [torch.linspace(float(a), float(b), 400) for a, b in zip(far.amin(0), far.amax(0), strict=True)]
        density = flow.log_prob(torch.cartesian_prod(*sides).reshape(-1, *shape)).exp()
    assert float(density.sum()) * math.prod(float(s[1] - s[0]) for s in sides) == pytest.approx(1.0, abs=1e-3)


# ----------------------------------------------------------------------------------------------------------- batch norm
def test_batch_norm_is_pytorchs_and_knows_its_determinant():
    ours, theirs = BatchNorm(3, rho=0.8), torch.nn.BatchNorm2d(3, momentum=0.2, affine=False)
    for seed in range(3):
        x = waves(20, (3, 4, 2), seed=seed)
        z, log_det = ours.to_code(x)
        torch.testing.assert_close(z, theirs(x), rtol=0, atol=1e-12)
        variance = x.var((0, 2, 3), correction=0)
        torch.testing.assert_close(log_det, -4 * (variance + ours.eps).log().sum().expand(20), rtol=0, atol=1e-10)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=0, atol=1e-12)
    # PyTorch's running variance has the factor n / (n - 1), n = 20 x 4 x 2.
    ratio = (theirs.running_var - 0.8**3) / (ours.running_var - 0.8**3)
    torch.testing.assert_close(ratio, torch.full((3,), 160 / 159), rtol=0, atol=1e-9)
    ours.eval()
    kept = ours.running_mean.clone()
    z, log_det = ours.to_code(x[:1])
    torch.testing.assert_close(ours.to_data(z)[0], x[:1], rtol=0, atol=1e-12)
    slopes = torch.autograd.functional.jacobian(lambda v: ours.to_code(v)[0], x[0]).reshape(24, 24)
    torch.testing.assert_close(log_det[0], torch.linalg.slogdet(slopes).logabsdet, rtol=0, atol=1e-10)
    assert torch.equal(kept, ours.running_mean), "nothing runs outside of training"


def test_batch_norm_does_not_mix_particles():
    together, alone = BatchNorm(2), [BatchNorm(2) for _ in range(3)]
    x = torch.stack([(k + 1) * waves(8, (2, 2, 2), seed=k) + 10 * k for k in range(3)])
    z, log_det = together.to_code(x)
    for k, norm in enumerate(alone):
        expected = norm.to_code(x[k])
        torch.testing.assert_close((z[k], log_det[k]), expected, rtol=0, atol=1e-12)
    means = torch.stack([norm.running_mean for norm in alone]).mean(0)
    torch.testing.assert_close(together.running_mean, means, rtol=0, atol=1e-12)


def test_a_captured_step_moves_the_running_averages_as_the_program_does():
    x = waves(24)
    runs = [
        pg.fit(RECIPES["real_nvp"](), x, SVI(steps=12, lr=0.01, batch_size=8), seed=3, compile=mode)
        for mode in (False, "graph")
    ]
    assert runs[0].cost["path"] == "eager" and runs[1].cost["path"] != "eager", runs[1].cost
    both = [dict(fit.module("flow").named_buffers()) for fit in runs]
    moved = [name for name in both[0] if "running" in name]
    assert moved and all(bool((both[0][n] != both[0][n].round()).any()) for n in moved), "they left 0 and 1"
    for name in moved:
        torch.testing.assert_close(both[0][name], both[1][name], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(*(torch.tensor(fit.records["program_loss"]) for fit in runs), rtol=1e-8, atol=1e-8)


def test_evidence_of_a_row_does_not_depend_on_the_rows_beside_it():
    x = waves(20)
    fit = pg.fit(RECIPES["real_nvp"](), x, SVI(steps=20, lr=0.01), seed=0)
    whole, some = fit.evidence(x), fit.evidence(x[3:5])
    assert whole.exact and whole.kind == "exact"
    torch.testing.assert_close(whole.values[3:5], some.values, rtol=0, atol=1e-10)
    torch.testing.assert_close(fit.module("flow").log_prob(x).detach(), whole.values, rtol=0, atol=1e-10)
    assert fit.sample(4)["x"].shape == (4, 1, 4, 4)


@pytest.mark.parametrize("name", [pytest.param("real_nvp", marks=pytest.mark.slow), "glow"])
def test_training_beats_the_best_independent_normals(name):
    x, new = waves(300), waves(500, seed=9)
    normal = torch.distributions.Normal(x.mean(0), x.std(0)).log_prob(new).sum((1, 2, 3))

    def gain(values, over):
        return float((values - over).mean() / (values - over).std()) * len(new) ** 0.5

    before, after = (
        pg.fit(RECIPES[name](scales=2), x, algorithm, seed=0).evidence(new).values
        for algorithm in (STILL, SVI(steps=120, lr=0.01, batch_size=100))
    )
    assert gain(after, before) > 5.5 and gain(after, normal) > 5.5
    assert name == "glow" or gain(before, normal) < 5.5, "glow starts at the spread of the data in rotated axes"


# ----------------------------------------------------------------------------------------------------------------- glow
def test_activation_norms_start_at_the_training_data():
    x = 50 * waves(60, (3, 3, 3))
    flow = pg.fit(RECIPES["glow"](), x, STILL, seed=0).module("flow")
    (scale,), value = flow.layers, (x - flow.loc) / flow.scale
    seen = 0
    for layer in scale.layers:
        value = layer.to_code(value)[0]
        if isinstance(layer, ActNorm):
            channels = value.detach().transpose(0, 1).flatten(1)
            torch.testing.assert_close(channels.mean(1), torch.zeros(3), rtol=0, atol=1e-10)
            torch.testing.assert_close(channels.std(1, correction=0), torch.ones(3), rtol=0, atol=1e-10)
            seen += 1
    assert seen == 2
    other = pg.fit(RECIPES["glow"](), x + 1000.0, STILL, seed=0).module("flow")
    assert not torch.allclose(other.loc, flow.loc), "the data are what they start at"


def test_an_invertible_convolution_is_its_matrix():
    layer = shaken(InvertibleConvolution(4), by=0.3)
    images = torch.randn(2, 4, 3, 5)
    lower, upper = layer._factors()
    matrix = layer.permutation @ lower @ upper
    expected = torch.einsum("ab,nbhw->nahw", matrix, images)
    made, log_det = layer.to_code(images)
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(log_det, (15 * torch.linalg.slogdet(matrix).logabsdet).expand(2), rtol=0, atol=1e-10)
    start = InvertibleConvolution(4)
    lower, upper = start._factors()
    turned = start.permutation @ lower @ upper
    torch.testing.assert_close(turned @ turned.T, torch.eye(4), rtol=0, atol=1e-12)


# --------------------------------------------------------------------------------------------------------------- pixels
def two_pixels(rows, seed=0):
    """Images of two pixels with four levels, which agree more often than not."""
    noise = torch.Generator().manual_seed(seed)
    first = torch.randint(4, (rows,), generator=noise)
    same = torch.rand(rows, generator=noise) < 0.7
    second = torch.where(same, first, torch.randint(4, (rows,), generator=noise))
    return torch.stack([first, second], 1).reshape(rows, 1, 1, 2) / 3.0


EVERY = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0)).reshape(16, 1, 1, 2).double() / 3


def exact_shares(flow, beyond=0.0):
    """p(x) of all 16 images by quadrature of the flow's density; the outer intervals may reach farther."""
    edges, points = [-beyond, 0.25, 0.5, 0.75, 1 + beyond], 120
    # Midpoints in the angle of a cosine, which come close where the density of a logit rises to the ends.
    angle = (torch.arange(points) + 0.5) * math.pi / points
    shares = torch.zeros(4, 4)
    for i in range(4):
        for j in range(4):
            sides = [(a, b - a) for a, b in ((edges[i], edges[i + 1]), (edges[j], edges[j + 1]))]
            places = [a + width * (1 - angle.cos()) / 2 for a, width in sides]
            slopes = [width * angle.sin() / 2 * (math.pi / points) for _, width in sides]
            density = flow.log_prob(torch.cartesian_prod(*places).reshape(-1, 1, 1, 2)).exp().reshape(points, points)
            shares[i, j] = slopes[0] @ density @ slopes[1]
    return shares


@pytest.mark.slow
def test_pixels_have_the_probability_of_their_intervals():
    x = two_pixels(400)
    recipe = real_nvp(channels=6, blocks=1, levels=4, margin=0.05)
    before, fit = (pg.fit(recipe, x, algorithm, seed=0) for algorithm in (STILL, SVI(steps=300, lr=0.01)))
    info = fit.info
    assert [(s.name, s.kind) for s in info.sites.values()] == [("dequantised", "latent"), ("x", "observed")]
    assert "exact evidence" not in info.offers and "differentiable samples" not in info.offers
    flow = fit.module("flow")
    with torch.no_grad():
        inside, shares = (exact_shares(flow, far).flatten() for far in (0.0, 0.05 / 0.9))
    assert float(shares.sum()) == pytest.approx(1.0, abs=2e-3)
    assert 0.7 < float(inside.sum()) < 1.0, "draws beyond [0, 1] have no level, and count against the flow"
    found = fit.evidence(EVERY, particles=4000)
    assert abs(found.mean - float(inside.log().mean())) < 5.5 * found.mc_stderr + 0.002, "and what quadrature leaves"
    torch.testing.assert_close(found.values.exp(), inside, rtol=0.1, atol=0.002)
    bound = fit.evidence(EVERY, particles=1, seed=1)
    assert bound.mean < found.mean
    elbo = -torch.tensor(fit.records["program_loss"][-50:]).mean()
    assert float(elbo) < fit.evidence(x, particles=500).mean + 0.01
    assert bits_per_dimension(fit.evidence(x), 2) < bits_per_dimension(before.evidence(x), 2) - 0.05
    drawn = fit.sample(4000, seed=1)["x"]
    seen = torch.bincount((drawn.flatten(1) * 3).round().long() @ torch.tensor([4, 1]), minlength=16)
    chi2 = float(((seen - 4000 * shares) ** 2 / (4000 * shares)).sum())
    assert chi2 < 60.0, chi2  # 15 degrees of freedom: a false alarm of 2e-7
    shuffled = 4000 * shares.roll(1)
    assert float(((seen - shuffled) ** 2 / shuffled).sum()) > 60.0, "the test sees shares in wrong places"


@pytest.mark.parametrize("precision", (torch.float32, torch.float64))
def test_dequantised_pixels_always_have_the_level_they_came_from(precision):
    levels = (torch.arange(256).repeat(4000) / 255).to(precision)
    v = Dequantised(levels, 256).rsample()
    assert bool((Quantised(v, 256).log_prob(levels) == 0).all())
    assert bool((Dequantised(levels, 256).log_prob(v) == math.log(256)).all())
    below = Quantised(v, 256).log_prob((levels * 255 - 1).abs() / 255)[levels > 0.001]
    assert float((below == -math.inf).double().mean()) > 0.998, "0.001 of an interval is shared with the neighbour"
    # Within rounding of an end a number may be read as the neighbour's; of a million none or a few.
    assert float((Quantised(v, 256).sample() - levels).abs().gt(1e-4).double().mean()) < 1e-4


def test_nice_reads_flat_pixels_and_tells_bits():
    x = two_pixels(200).flatten(1)
    fit = pg.fit(nice(layers=2, hidden=(8,), levels=4), x, SVI(steps=100, lr=0.02), seed=0)
    bits = bits_per_dimension(fit.evidence(particles=50), 2)
    assert 1.0 < bits < 2.1  # the entropy is 1.69 bits a pixel, and independent levels have 2
    assert bool((fit.sample(50)["x"] * 3 - (fit.sample(50)["x"] * 3).round()).abs().max() < 1e-6)


# ------------------------------------------------------------------------------------------------- what does not fit
def test_scales_and_shapes_that_do_not_suit_are_refused():
    assert [number_of_scales((1, n, n), None) for n in (28, 27, 32, 6)] == [3, 1, 3, 2]
    with pytest.raises(ValueError, match="scales: images of 6 x 6 pixels can be halved 1 time"):
        pg.check(real_nvp(scales=3), waves(5, (1, 6, 6)))
    with pytest.raises(ValueError, match="scales: images of 28 x 28"):
        real_nvp((1, 28, 28), scales=4)
    with pytest.raises(ValueError, match="features: glow couples halves of the channels"):
        pg.check(glow(), waves(5, (1, 3, 3)))
    with pytest.raises(ValueError, match=r"takes images of shape \(1, 8, 8\), got shape \(5, 1, 4, 4\)"):
        pg.check(real_nvp((1, 8, 8)), waves(5))
    with pytest.raises(ValueError, match=r"channel\(s\) 1 are constant"):
        pg.check(real_nvp(), waves(5, (2, 4, 4)) * torch.tensor([1.0, 0.0])[:, None, None])
    with pytest.raises(ValueError, match=r"features: expected a number of columns or \(channels, height, width\)"):
        real_nvp((4, 4))


def test_levels_that_are_not_those_of_the_data_are_refused():
    pixels = (waves(5) * 30).round().clamp(0, 255) / 255
    with pytest.raises(ValueError, match="say levels=256"):
        pg.check(real_nvp(), pixels)
    with pytest.raises(ValueError, match="levels: expected rows of 0, 1/3"):
        pg.check(real_nvp(levels=4), pixels)
    with pytest.raises(ValueError, match="levels: expected rows of 0, 1/255"):
        pg.check(nice(levels=256), pixels.flatten(1) * 255)
    with pytest.raises(ValueError, match="all pixels have the same value"):
        pg.check(real_nvp(levels=4), torch.ones(5, 1, 4, 4))
    for bad in ({"levels": 1}, {"margin": 0.5}, {"margin": 0.0}, {"channels": 0}, {"blocks": -1}, {"scales": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            real_nvp((1, 4, 4), **bad)
    with pytest.raises(pg.IncompatibleError, match="differentiable samples"):
        pg.fit(real_nvp(levels=256), pixels, SVI(Adversarial("non-saturating"), steps=1))


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ((waves(40) * 8).round() / 16, "evenly spaced values from .*levels="),
        ((waves(40) * 8).round().long(), "evenly spaced values"),
        ((waves(40) * 20).round() / 127.5 - 1, "evenly spaced values"),
        (torch.where(torch.arange(16).reshape(4, 4) == 5, 2.0, waves(40)), r"1 pixel\(s\) .* \(0, 1, 1\)"),
    ],
)
@pytest.mark.parametrize("name", RECIPES)
def test_images_without_a_density_are_refused_whatever_their_units(name, images, said):
    with pytest.raises(ValueError, match=said):
        pg.check(RECIPES[name](), images)


def test_values_that_are_no_levels_are_refused_after_the_fit_too():
    x = two_pixels(40)
    fit = pg.fit(real_nvp(channels=4, blocks=1, levels=4), x, SVI(steps=2), seed=0)
    for off in (x * 0.5, x * 3, x - 1 / 3, (x * 3).round() / 4):
        for ask in (fit.evidence, fit.posterior, fit.predict):
            with pytest.raises(ValueError, match="4 levels: 0, 1/3, ..., 1"):
                ask(off)
        with pytest.raises(ValueError, match="levels: 0, 1/3"):
            pg.fit(real_nvp(channels=4, blocks=1, levels=4), x, SVI(steps=2), seed=0, validation=off)


@pytest.mark.parametrize("name", RECIPES)
def test_a_flow_of_images_is_found_again_on_disk(name, tmp_path):
    x = waves(20)
    fit = pg.fit(RECIPES[name](), x, SVI(steps=6, lr=0.01, batch_size=8), seed=1)
    loaded = pg.load(fit.save(tmp_path / "fit"), RECIPES[name]())
    assert torch.equal(loaded.evidence(x).values, fit.evidence(x).values)
    assert fit.diagnose().attrs["verdict"].startswith(("trust:", "doubtful:", "do not trust:"))
