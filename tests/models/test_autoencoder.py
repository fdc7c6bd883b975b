"""Autoencoders: the principal subspace, what a code may look like, and what a flat prior rules out.

Errors of reconstruction are compared between fits of the same seed and data; the factors asserted are about half of
those measured.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

import ppl_gen as pg
from ppl_gen.inference import EM, NUTS, SVI, Adversarial
from ppl_gen.models import anomaly_scores, autoencoder, codes, principal_components, reconstructions
from ppl_gen.models.improper import Flat

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")  # chains and guides are short on purpose

STILL = SVI(steps=1, lr=1e-30)


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]), pyro.get_param_store().scope():
        torch.manual_seed(7)
        yield


@pytest.fixture(scope="module")
def digits():
    x = pg.load_data("digits", images=True)["x"]
    return x[:1200], x[1200:1500]


def flat(pair):
    return tuple(x.flatten(1) for x in pair)


def plane():
    """300 rows near a plane in six dimensions, in float64."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(300, 6, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
    return 3 + noise * torch.tensor([4.0, 3.0, 1.0, 0.5, 0.3, 0.2], dtype=torch.float64) @ turn


def angle(fit, axes):
    """The largest principal angle between the image of a linear decoder and a subspace."""
    decoder = fit.module("decoder")
    with torch.no_grad():
        image = (decoder(torch.eye(2, dtype=axes.dtype)) - decoder(torch.zeros(1, 2, dtype=axes.dtype))).T
    cosines = torch.linalg.svdvals(torch.linalg.qr(image)[0].T @ axes)
    return float(cosines.clamp(max=1.0).arccos().max())


def missed(filled, x):
    return float((filled - x).square().mean())


def trained(x, steps=400, batch=128, **settings):
    """On rows or images of 64 pixels."""
    return pg.fit(autoencoder(64, **settings), x, SVI(steps=steps, lr=3e-3, batch_size=batch), seed=0)


# ---------------------------------------------------------------------------------------------------------- the oracle


@pytest.mark.parametrize("tied", [False, True])
def test_a_linear_autoencoder_finds_the_principal_subspace(tied):
    x, steps = plane(), 800
    axes = principal_components(x, 2).axes
    recipe = autoencoder(6, 2, hidden=(), tied=tied)
    assert angle(pg.fit(recipe, x, STILL, seed=0), axes) > 0.5

    def falling(optimiser):
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)

    fit = pg.fit(recipe, x, SVI(steps=steps, lr=0.03, schedule=falling), seed=0)
    assert angle(fit, axes) < 0.01
    # The loss is the squared error in units of the overall variance, over 2, and the normal's constant.
    left = x - x.mean(0) - (x - x.mean(0)) @ axes @ axes.T
    variance = (x - x.mean(0)).square().mean()
    constant = 3 * torch.log(2 * torch.pi * variance)
    best = float(left.square().sum(1).mean() / (2 * variance) + constant)
    assert best - 1e-9 <= float(fit.history["program_loss"].values[-1]) < best + 1e-3


# ------------------------------------------------------------------------------------------------------------ variants


def test_a_denoising_autoencoder_reconstructs_better_what_is_broken(digits):
    train, test = flat(digits)
    seen = torch.rand(test.shape, generator=torch.Generator().manual_seed(1)) >= 0.3
    broken = torch.where(seen, test, train.mean(0))
    plain, denoising = (trained(train, code=32, hidden=(64,), corruption=share) for share in (0.0, 0.3))
    untrained = pg.fit(autoencoder(64, 32, hidden=(64,), corruption=0.3), train, STILL, seed=0)
    errors = [missed(reconstructions(fit, broken), test) for fit in (denoising, plain, untrained)]
    assert errors[0] < 0.9 * errors[1] < errors[2]
    clean = [denoising.module("encoder")(test) for _ in range(2)]
    assert torch.equal(*clean), "a trained encoder corrupts nothing"
    torch.testing.assert_close(codes(denoising, test), clean[0])


def test_corruption_destroys_as_much_as_it_says():
    x = torch.randn(4000, 5) * 3 + 1
    for noise in ("masking", "normal"):
        encoder = pg.fit(autoencoder(5, 2, corruption=0.25, noise=noise), x, STILL).module("encoder").train()
        broken = encoder.corrupted(torch.ones(4000, 5))
        # 20000 entries: a share of 1/4 is known to 0.0031, a standard deviation of 1/4 to 0.0013; 5.5 of these.
        if noise == "masking":
            assert set(broken.unique().tolist()) == {0.0, 1.0} and abs(float(broken.mean()) - 0.75) < 0.017
        else:
            assert abs(float(broken.std()) - 0.25) < 0.007


def test_k_sparse_codes_have_exactly_k_numbers(digits):
    train, test = flat(digits)
    fit = trained(train, steps=100, code=20, top_k=3)
    found = codes(fit, test)
    assert ((found != 0).sum(1) == 3).all()
    free = trained(train, steps=100, code=20)
    assert ((codes(free, test) != 0).sum(1) == 20).all()
    # The largest are kept.
    encoder = fit.module("encoder")
    encoder.top_k = None
    whole = encoder(test).detach()
    assert torch.equal(found != 0, whole >= whole.topk(3, 1).values[:, -1:])


def test_a_penalty_makes_codes_sparse_and_is_recorded(digits):
    train, test = flat(digits)

    def share(fit):
        """Of the numbers of a code that add less than a hundredth of the largest to the decoder's first layer."""
        sizes = codes(fit, test).abs() * fit.module("decoder").weights[-1].norm(dim=1).detach()
        return float((sizes < 0.01 * sizes.max()).double().mean())

    plain, l1 = trained(train, code=32, hidden=()), trained(train, code=32, hidden=(), sparsity=1.0)
    assert "sparsity" not in plain.history and l1.history["sparsity"].notnull().all()
    assert share(l1) > 2 * share(plain)
    kl = trained(train, code=32, hidden=(), sparsity=30.0, penalty="kl", target=0.1)
    half = pg.fit(autoencoder(64, 32, hidden=(), sparsity=30.0, penalty="kl", target=0.1), train, STILL)
    activity = codes(kl, train)
    assert 0 < float(activity.min()) and float(activity.max()) < 1
    assert float(kl.history["sparsity"][-1]) < 0.5 * float(kl.history["sparsity"][0])
    assert abs(float(activity.mean()) - 0.1) < 0.6 * abs(float(codes(half, train).mean()) - 0.1)


def test_the_penalties_are_what_they_say():
    x = torch.randn(40, 3)
    for penalty in ("l1", "kl"):
        fit = pg.fit(autoencoder(3, 2, hidden=(4,), sparsity=0.5, penalty=penalty, target=0.2), x, STILL)
        z, weight = codes(fit, x), fit.module("decoder").weights[-1].detach()
        if penalty == "l1":
            expected = (z.abs() * weight.norm(dim=1)).sum(1).mean()
        else:
            r = z.mean(0)
            expected = (0.2 * (0.2 / r).log() + 0.8 * (0.8 / (1 - r)).log()).sum()
        torch.testing.assert_close(torch.tensor(fit.history["sparsity"].values[0]).float(), 0.5 * expected)
        assert fit.history["program_loss"].values[0] == pytest.approx(
            float(fit.history["reconstruction"][0] + fit.history["kl"][0] + fit.history["sparsity"][0]), rel=1e-5
        )


@pytest.mark.parametrize("kind", ["dense", "convolutional"])
def test_tied_weights_are_one_tensor(kind, digits):
    x = digits[0][:300]
    fit = trained(x, steps=60, code=8, kind=kind, tied=True)
    assert not [name for name in fit.params if name.startswith("decoder$$$weights")]
    decoder = fit.module("decoder")
    encoder = fit.module("encoder")
    for i, layer in enumerate(encoder.layers):
        assert torch.equal(decoder.weight(i), layer.weight)
        assert decoder.weight(i) is decoder.mirrored[0].layers[i].weight
    before = pg.fit(autoencoder(64, 8, kind=kind, tied=True), x, STILL, seed=0)
    assert not torch.equal(before.module("encoder").layers[0].weight, encoder.layers[0].weight)
    assert missed(reconstructions(fit, x), x) < 0.8 * missed(reconstructions(before, x), x)
    # An encoder's layer and its mirror are adjoint: <Wx, y> = <x, W'y>.
    if kind == "convolutional":
        image, maps = torch.randn(1, 1, 8, 8), torch.randn(1, 16, 4, 4)
        with torch.no_grad():
            there = torch.nn.functional.conv2d(image, encoder.layers[0].weight, stride=2, padding=1)
            back = decoder._widened(maps, 0) - decoder.biases[0]
        torch.testing.assert_close((there * maps).sum(), (image * back).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", [8, 28, 7])
def test_convolutions_take_images_of_any_size(side):
    x = torch.rand(12, 1, side, side)
    fit = pg.fit(autoencoder(side**2, 4, kind="convolutional", hidden=(4, 6)), x, SVI(steps=3), seed=0)
    assert fit.module("decoder")(codes(fit, x)).shape == x.shape
    assert fit.sample(2, given={"z": torch.zeros(2, 4)})["x"].shape == (2, 1, side, side)


def test_a_convolutional_autoencoder_learns_digits(digits):
    train, test = digits
    fit = trained(train, steps=150, code=16, kind="convolutional")
    assert missed(reconstructions(fit, test), test) < 0.5 * missed(train.mean(0).expand_as(test), test)
    noise = torch.rand(test.shape, generator=torch.Generator().manual_seed(2))
    assert anomaly_scores(fit, noise).min() > anomaly_scores(fit, test).median(), "noise is no digit"


def test_bernoulli_pixels_are_zeros_and_ones_or_chances_of_them(digits):
    grey = flat(digits)[0][:200]
    binary = (grey > 0.5).float()
    fit = trained(binary, steps=60, code=8, likelihood="bernoulli", batch=64)
    means = fit.module("decoder")(codes(fit, binary)).detach()
    assert 0 <= float(means.min()) and float(means.max()) <= 1
    expected = -dist.Bernoulli(means).to_event(1).log_prob(binary)
    torch.testing.assert_close(anomaly_scores(fit, binary), expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="zeros and ones"):
        trained(2 * grey, steps=1, code=8, likelihood="bernoulli")
    assert trained(grey, steps=2, code=8, likelihood="bernoulli").history["program_loss"].notnull().all()


# --------------------------------------------------------------------------------------------- codes without a prior


def test_codes_are_the_guides_points(digits):
    train, test = flat(digits)
    fit = trained(train, steps=20, code=8)
    drawn = fit.posterior({"x": test}, draws=2)["z"]
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], codes(fit, test))
    torch.testing.assert_close(fit.module("encoder")(test).detach(), drawn[0])
    assert codes(fit, torch.cat([test] * 4)).shape == (1200, 8), "more rows than a chunk"


def test_what_needs_a_distribution_over_codes_is_refused():
    x = torch.randn(30, 4)
    fit = pg.fit(autoencoder(4, 2), x, SVI(steps=5))
    with pytest.raises(pg.IncompatibleError, match="improper"):
        fit.evidence()
    with pytest.raises(pg.IncompatibleError, match="given"):
        fit.sample(3)
    with pytest.raises(pg.IncompatibleError, match="flat"):
        pg.prior_predictive(autoencoder(4, 2), x, draws=2)
    assert fit.sample(3, given={"z": torch.zeros(3, 2)})["x"].shape == (3, 4)
    assert "samples" not in fit.info.offers and "density" in fit.info.offers
    for algorithm in (EM(), NUTS(), SVI(Adversarial())):
        with pytest.raises(pg.IncompatibleError, match="missing"):
            pg.fit(autoencoder(4, 2), x, algorithm)
    assert "prior" not in fit.to_arviz(draws=5)


def test_a_guide_of_points_is_no_proposal_for_the_evidence():
    """z ~ Normal(0, 1), x ~ Normal(z, 1), guide Delta: with the prior as proposal log p(x) = log Normal(x | 0, 2)."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        slope = pyro.param("slope", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(slope * x))

    x = torch.tensor([0.3, -1.0, 1.2])
    estimate = pg.fit(pg.Program(model, guide), x, STILL).evidence(particles=20_000)
    exact = dist.Normal(0.0, 2.0**0.5).log_prob(x)
    # Weights Normal(x | z, 1) under the prior have relative variance below 1: 20000 of them, five standard errors.
    assert float((estimate.values - exact).abs().max()) < 5 / 20_000**0.5
    assert "importance" in estimate.kind and not estimate.exact


def test_a_flat_distribution():
    for support, value in ((constraints.real, 0.0), (constraints.positive, 1.0)):
        prior = Flat(support, (2,)).expand((3,))
        assert torch.equal(prior.sample(), torch.full((3, 2), value))
        assert torch.equal(prior.log_prob(torch.rand(3, 2)), torch.zeros(3)) and prior.support is support


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "wrong",
    [
        {"code": 0},
        {"hidden": (0,)},
        {"kind": "recurrent"},
        {"corruption": 1.0},
        {"noise": "salt"},
        {"sparsity": -1.0},
        {"penalty": "l2"},
        {"target": 1.0},
        {"top_k": 5},
        {"likelihood": "poisson"},
        {"activation": "sine"},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_arguments_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        autoencoder(4, **{"code": 2, **wrong})


def test_data_are_checked():
    with pytest.raises(ValueError, match="features"):
        autoencoder(5, 2)(torch.ones(3, 4))
    with pytest.raises(ValueError, match="images=True"):
        autoencoder(4, 2, kind="convolutional")(torch.ones(3, 4))
    with pytest.raises(ValueError, match="contradict"):
        autoencoder(4, 2, top_k=1, sparsity=1.0, penalty="kl")
    with pytest.raises(ValueError, match="not a local latent site"):
        codes(pg.fit(autoencoder(4, 2), torch.randn(10, 4), STILL), site="code")
