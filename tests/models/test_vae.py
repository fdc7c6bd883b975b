"""Variational autoencoders against closed forms, enumeration and quadrature."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import X8, local, local_guide, losses, network, playing
from torch import Tensor, nn

import ppl_gen as pg
from ppl_gen.diagnostics.posterior_group import affordable_rows
from ppl_gen.diagnostics.units import active_units, code_means
from ppl_gen.inference import ELBO, IWAE, SVI
from ppl_gen.models import principal_components, vae
from ppl_gen.models.variational.encoders import FlowEncoder, NormalEncoder, flow_maps
from ppl_gen.nn.likelihoods import chosen_likelihood
from ppl_gen.nn.networks import ConvolutionalDecoder, ConvolutionalEncoder, Perceptron

STILL = SVI(steps=1, lr=1e-30)  # one step too small to change anything


def every_row(columns: int, levels: int = 2) -> Tensor:
    """All rows that there are."""
    return torch.tensor(list(itertools.product(range(levels), repeat=columns)))


def two_kinds(rows: int = 60) -> Tensor:
    """Rows of six zeros and ones in two kinds, one pixel in ten flipped."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.tensor([[1.0, 1, 1, 0, 0, 0], [0.0, 0, 0, 1, 1, 1]]).repeat(rows // 2, 1)
    return (kind - (torch.rand(kind.shape, generator=generator) < 0.1).float()).abs()


def factors(rows: int = 300) -> Tensor:
    """Four columns of two factors, in float64 and in units far from standard ones."""
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    loadings = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 1.0, 1.5, 0.5]], dtype=torch.float64)
    return 5.0 + 3.0 * (draw[:, :2] @ loadings + 0.8 * draw[:, 2:])


# ------------------------------------------------------------------------------- the linear VAE is PPCA
def falling(optimiser: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.001 ** (1 / 900))


def test_the_linear_vae_reaches_the_closed_form_of_ppca() -> None:
    """At the optimum its bound is tight, so the evidence is that of the closed form (Lucas et al. 2019)."""
    x = factors(100)
    found = principal_components(x, 2)
    covariance = found.loadings @ found.loadings.T + found.noise**2 * torch.eye(4, dtype=torch.float64)
    best = float(torch.distributions.MultivariateNormal(found.loc, covariance).log_prob(x).mean())
    linear = vae(4, latent=2, hidden=(), likelihood="normal")

    def gap(fit: pg.Fit) -> tuple[float, float]:
        evidence = fit.evidence(particles=200)
        assert "importance weighted" in evidence.kind
        return abs(evidence.mean - best), evidence.mc_stderr

    before, _ = gap(pg.fit(linear, x, STILL, seed=0))
    assert before > 0.1
    fit = pg.fit(linear, x, SVI(ELBO(), steps=900, lr=0.05, schedule=falling), seed=0)
    after, error = gap(fit)
    # Adam's steps end a thousandth of 0.05 wide; the weights of a guide that is nearly exact are nearly equal.
    assert after < 1e-3 and error < 2e-4
    spread = torch.tensor(float((x - x.mean(0)).square().mean().sqrt()))
    assert float(spread * fit.params["decoder$$$likelihood.log_scale"].exp()) == pytest.approx(
        float(found.noise), rel=0.01
    )
    # The guide is the posterior: every draw has the same weight, and its tail is flat.
    evidence = fit.evidence(particles=200)
    assert evidence.effective_draws is not None and evidence.pareto_k is not None
    assert float(evidence.effective_draws.min()) > 190 and evidence.pareto_k < 0.4


# ------------------------------------------------------------------- every likelihood, network and condition
CASES = {
    "bernoulli": ({"features": 6}, lambda: two_kinds()),
    "integer zeros and ones": ({"features": 6}, lambda: two_kinds().to(torch.uint8)),
    "booleans": ({"features": 6, "likelihood": "bernoulli"}, lambda: two_kinds().bool()),
    "grey": ({"features": 6}, lambda: 0.2 + 0.6 * two_kinds()),
    "normal": ({"features": 6, "likelihood": "normal"}, lambda: two_kinds() * 7.0 - 2.0),
    "normal, known scale": ({"features": 6, "scale": 2.0}, lambda: two_kinds() * 7.0 - 2.0),
    "categorical": ({"features": 6, "likelihood": "categorical", "levels": 3}, lambda: 2 * two_kinds().long()),
    "images by a perceptron": ({"features": (1, 2, 3)}, lambda: two_kinds().reshape(-1, 1, 2, 3)),
    "convolutional": (
        {"features": (1, 2, 3), "network": "convolutional"},
        lambda: two_kinds().reshape(-1, 1, 2, 3),
    ),
    "convolutional, normal": (
        {"features": (2, 3, 1), "network": "convolutional", "likelihood": "normal"},
        lambda: two_kinds().reshape(-1, 2, 3, 1) * 7.0,
    ),
    "convolutional, categorical": (
        {"features": (2, 3, 1), "network": "convolutional", "likelihood": "categorical", "levels": 3},
        lambda: 2 * two_kinds().long().reshape(-1, 2, 3, 1),
    ),
    "conditional": (
        {"features": 6, "classes": 2},
        lambda: {"x": two_kinds(), "y": torch.arange(60) % 2},
    ),
    "conditional, normal": (
        {"features": 6, "classes": 2, "likelihood": "normal"},
        lambda: {"x": two_kinds() * 7.0, "y": torch.arange(60) % 2},
    ),
}


SAVED = ("integer zeros and ones", "convolutional, categorical", "conditional, normal")  # saving draws takes seconds


@pytest.mark.parametrize("case", CASES)
def test_it_trains_samples_and_is_saved(case: str, tmp_path: Any) -> None:
    arguments, made = CASES[case]
    data = made()
    recipe, x = vae(latent=2, hidden=(16,), **arguments), data["x"] if isinstance(data, dict) else data
    before = pg.fit(recipe, data, STILL, seed=0).evidence(particles=20).mean
    fit = pg.fit(recipe, data, SVI(steps=100, lr=0.02), seed=0)
    learned = fit.evidence(particles=20)
    # There are 6 log 2 = 4.2 nats to begin with, and log 2 + 6 * 0.33 = 2.6 when all is known (3.6 in grey).
    assert learned.mean > before + (0.1 if case == "grey" else 0.5)
    drawn = fit.sample(9)["x"]
    assert drawn.shape == (9, *x.shape[1:]) and drawn.isfinite().all()
    if "normal" in case:
        assert drawn.std() > 0.5, "in the user's units"
    else:
        assert set(drawn.unique().tolist()) <= ({0, 1, 2} if "categorical" in case else {0, 1})
    labels = (data["y"][:5],) if isinstance(data, dict) else ()
    codes = fit.module("encoder")(x[:5], *labels).mean
    assert codes.shape == (5, 2)
    assert fit.module("decoder")(codes, *labels).event_shape == x.shape[1:]
    if case not in SAVED:
        return
    fit.save(tmp_path / "fit")
    again = pg.load(tmp_path / "fit", program=recipe)
    assert torch.equal(again.evidence(particles=20).values, learned.values)


def test_a_conditional_vae_draws_rows_of_the_class_asked_for() -> None:
    data = {"x": two_kinds(), "y": torch.arange(60) % 2}
    fit = pg.fit(vae(6, latent=1, hidden=(16,), classes=2), data, SVI(steps=400, lr=0.02), seed=0)
    for label in (0, 1):
        mean = fit.sample(400, given={"y": label})["x"].mean(0)
        left, right = mean[:3].mean(), mean[3:].mean()
        # 1200 coins of chance 0.9 and as many of 0.1: standard errors of 0.01; the fit itself is within 0.1.
        assert (left - right if label == 0 else right - left) > 0.6


# ----------------------------------------------------------------------------- densities by enumeration
def decoder_of(columns: int, data: Tensor, **arguments: Any) -> nn.Module:
    fit = pg.fit(vae(columns, latent=2, hidden=(4,), **arguments), data, SVI(steps=3, lr=0.1), seed=0)
    return fit.module("decoder")


@pytest.mark.parametrize("levels", [2, 3])
def test_densities_given_z_sum_to_one_over_all_rows(levels: int) -> None:
    rows, z = every_row(3, levels), torch.randn(5, 1, 2, dtype=torch.float64)
    if levels == 2:
        decoder = decoder_of(3, rows.double())
        rows = rows.double()
    else:
        decoder = decoder_of(3, rows, likelihood="categorical", levels=3).double()
    total = decoder(z).log_prob(rows).logsumexp(-1)
    assert total.tolist() == pytest.approx([0.0] * 5, abs=1e-6 if levels == 3 else 1e-12)  # float32 buffers in one


def test_grey_rows_have_the_mean_log_density_of_the_rows_that_their_chances_draw() -> None:
    grey = torch.tensor([[0.2, 0.9, 0.5], [1.0, 0.0, 0.7]], dtype=torch.float64)
    decoder, z = decoder_of(3, grey), torch.randn(4, 1, 2, dtype=torch.float64)
    rows = every_row(3).double()
    chances = torch.where(rows[:, None] == 1, grey, 1 - grey).prod(-1)  # of each row under each grey one
    expected = decoder(z).log_prob(rows) @ chances
    assert torch.allclose(decoder(z).log_prob(grey), expected, rtol=0, atol=1e-12)
    assert set(decoder(z).sample().unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("kind", ["bernoulli", "categorical"])
@pytest.mark.parametrize("form", ["perceptron", "convolutional"])
def test_at_zero_weights_every_row_has_the_marginal_distribution(kind: str, form: str) -> None:
    generator = torch.Generator().manual_seed(1)
    levels = 3 if kind == "categorical" else 2
    x = torch.randint(0, levels, (50, 2, 5, 4), generator=generator)
    x[:, 0] = torch.where(x[:, 0] == 0, 1, x[:, 0])  # the channels differ
    arguments: dict[str, Any] = {"levels": 3} if kind == "categorical" else {}
    data = x if kind == "categorical" else x.double()
    recipe = vae((2, 5, 4), latent=1, hidden=(4,), likelihood=kind, network=form, **arguments)
    decoder = pg.fit(recipe, data, STILL, seed=0).module("decoder")
    nn.init.zeros_(decoder.network.last.weight)
    found = decoder(torch.zeros(1, 1, dtype=next(decoder.parameters()).dtype)).base_dist.probs[0]
    shares = torch.stack([(x == level).double().mean(0) for level in range(levels)], -1)
    shares = (50 * shares + 1 / levels) / 51  # one row more, shared by all levels
    if form == "convolutional":
        shares = shares.mean((1, 2), keepdim=True).expand_as(shares)  # one bias for a channel
    expected = shares if kind == "categorical" else shares[..., 1]
    assert torch.allclose(found.double(), expected, rtol=0, atol=1e-5)  # weights in float32 for integers


# -------------------------------------------------------------------------------------------- networks
@pytest.mark.parametrize("height,width", [(5, 5), (6, 9), (7, 8), (9, 6), (28, 28), (1, 2)])
def test_convolutions_come_back_to_the_size_they_came_from(height: int, width: int) -> None:
    shape = (2, height, width)
    encoder, decoder = ConvolutionalEncoder(shape, (3, 4), 5, 6), ConvolutionalDecoder(shape, (3, 4), 5, 6, depth=3)
    images = torch.rand(4, 7, *shape)
    codes = encoder(images)
    assert codes.shape == (4, 7, 6)
    assert torch.allclose(codes[2], encoder(images[2]), atol=1e-6), "leading dimensions are rows like any others"
    numbers = decoder(codes)
    assert numbers.shape == (4, 7, 2 * height * width * 3)
    # The numbers of one pixel stand side by side: the map of channel c, number d is output channel 3 c + d.
    maps = decoder.layers(codes[0]).reshape(7, 2, 3, height, width)
    assert torch.equal(numbers[0].reshape(7, 2, height, width, 3)[:, 1, :, :, 2], maps[:, 1, 2])


def test_images_of_the_size_of_mnist() -> None:
    x = torch.rand(12, 1, 28, 28)
    recipe = vae((1, 28, 28), latent=3, hidden=(16,), network="convolutional")
    fit = pg.fit(recipe, x, SVI(steps=2, batch_size=6), seed=0)
    assert fit.sample(2)["x"].shape == (2, 1, 28, 28) and fit.module("encoder")(x).mean.shape == (12, 3)


def test_labels_enter_as_a_one_hot_code_would_and_without_effect_at_first() -> None:
    made = Perceptron(4, (5,), 2, classes=3)
    x, y = torch.randn(6, 4), torch.tensor([0, 2, 1, 1, 0, 2])
    assert torch.equal(made(x, y), made(x))
    nn.init.normal_(made.label.weight)
    joined = nn.Linear(7, 5)
    joined.weight.data = torch.cat([made.first.weight, made.label.weight.T], 1).detach()
    joined.bias.data = made.first.bias.detach()
    expected = made.rest(joined(torch.cat([x, nn.functional.one_hot(y, 3).float()], 1)))
    assert torch.allclose(made(x, y), expected, atol=1e-6)
    assert made(x, torch.arange(3)[:, None]).shape == (3, 6, 2), "enumerated labels have a dimension of their own"


# ---------------------------------------------------------------------------- bounds with convolutions
def test_the_folded_convolutions_are_vectorised_and_equal_the_unrolled_bound() -> None:
    x = two_kinds(8).reshape(-1, 1, 2, 3).double()
    recipe = vae((1, 2, 3), latent=2, hidden=(4,), network="convolutional")
    assert pg.fit(recipe, x, SVI(IWAE(particles=3), steps=1)).notes["particles"] == "vectorised"
    program = recipe(x)
    values = []
    for vectorise in (True, False):
        with playing(program.model, program.guide, IWAE(particles=3), x) as (game, dataset):
            game.vectorise = vectorise
            torch.manual_seed(3)  # draws of three particles at once are those of one after the other
            values.append(float(losses(game, dataset.batch(), 1)))
    assert values[0] == pytest.approx(values[1], abs=1e-12)


def test_a_convolution_that_does_not_fold_is_unrolled() -> None:
    import pyro
    import pyro.distributions as dist

    net = network(nn.Linear(2, 4), nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 1, 2, padding=1), nn.BatchNorm2d(1))

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(3), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(2)), 1.0).to_event(1))

    fit = pg.fit(pg.Program(model, guide), torch.randn(6, 1, 3, 3), SVI(IWAE(particles=3), steps=2))
    assert fit.notes["particles"] == "unrolled"


# --------------------------------------------------------------------------------- codes and their units
def test_a_unit_that_nothing_depends_on_is_inactive_and_the_others_are_counted() -> None:
    """Of a linear VAE with known noise those eigenvectors collapse whose eigenvalue is below it (Lucas et al. 2019)."""
    x = factors(100)
    eigenvalues = torch.linalg.eigvalsh(torch.cov(x.T, correction=0)).flip(0)
    scale = 4.0
    assert eigenvalues[1] > 1.5 * scale**2 > 1.5 * 2 * eigenvalues[2]
    fit = pg.fit(vae(4, latent=3, hidden=(), scale=scale), x, SVI(steps=600, lr=0.03), seed=0)
    found = active_units(fit)
    assert int(found.active.sum()) == 2 and repr(found) == "ActiveUnits(2 of 3 at site 'z')"
    # The means' variance over the active directions is 1 - scale^2 / eigenvalue each; together it is that in any basis.
    expected = float((1 - scale**2 / eigenvalues[:2]).sum())
    assert float(found.variance.sum()) == pytest.approx(expected, abs=0.1)  # Adam at 0.03 keeps wandering by some 0.03
    assert int(active_units(pg.fit(vae(4, latent=3, hidden=(), scale=scale), x, STILL, seed=0)).active.sum()) == 3
    assert torch.allclose(code_means(fit), fit.module("encoder")(x).mean.detach())
    assert code_means(fit, x[:7]).shape == (7, 3)
    assert int(active_units(fit, x[:50], site="z", threshold=1e-9).active.sum()) == 3
    with pytest.raises(ValueError, match="expected one of z, got 'x'"):
        active_units(fit, site="x")
    with pytest.raises(ValueError, match="at least 2"):
        active_units(fit, x[:1])
    with pytest.raises(ValueError, match="threshold: expected a positive number"):
        active_units(fit, threshold=0.0)


def test_what_has_no_encoder_has_no_units() -> None:
    fit = pg.fit(local, X8, SVI(steps=2))  # AutoNormal: parameters of each training row
    with pytest.raises(pg.IncompatibleError, match="'local' has no codes"):
        active_units(fit)
    assert active_units(pg.fit(pg.Program(local, local_guide), X8, STILL)).site == "z"


def test_exports_of_many_rows_keep_to_the_first_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = pg.fit(vae(6, latent=2, hidden=(4,)), two_kinds(), SVI(steps=2), seed=0)
    with fit.bound():
        assert affordable_rows(fit, 100) is fit
    monkeypatch.setattr(
        "ppl_gen.diagnostics.posterior_group.MAX_ELEMENTS", 8 * 30 * 10
    )  # 8 numbers a row: 30 rows of 10 draws
    with fit.bound():
        assert affordable_rows(fit, 10).data.rows == 30
        assert affordable_rows(fit, 1000).data.rows == 25, "25 at least"
    tree = fit.to_arviz(draws=10)
    assert tree.attrs["rows"] == "the first 30 of 60"
    assert np.asarray(tree["posterior"]["z"]).shape[2] == 30


# ------------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": 0}, "features: expected a whole number"),
        ({"features": ()}, "features: expected a number of columns or the shape"),
        ({"features": 3, "latent": 0}, "latent"),
        ({"features": 3, "hidden": (4, 0)}, "hidden"),
        ({"features": 3, "likelihood": "poisson"}, "likelihood: expected one of .auto., .bernoulli."),
        ({"features": 3, "likelihood": "bernoulli", "scale": 1.0}, "scale: is the noise of likelihood='normal'"),
        ({"features": 3, "scale": -1.0}, "scale: expected a positive number"),
        ({"features": 3, "likelihood": "categorical"}, "levels: expected"),
        ({"features": 3, "levels": 4}, "levels: expected"),
        ({"features": 3, "network": "convolutional"}, "takes images"),
        ({"features": (1, 3, 3), "network": "convolutional", "classes": 2}, "no classes"),
        ({"features": 3, "network": "transformer"}, "network: expected"),
        ({"features": 3, "activation": "step"}, "activation: expected one of 'tanh'"),
        ({"features": 3, "classes": 1}, "classes: expected at least 2"),
    ],
)
def test_settings_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vae(**arguments)


def test_data_that_do_not_suit_are_refused() -> None:
    for arguments, data, message in (
        ({}, torch.zeros(4, 2), r"made for rows of shape \(3,\), got data of shape \(4, 2\)"),
        ({"likelihood": "bernoulli"}, torch.full((4, 3), 1.5), "takes zeros and ones, or chances"),
        ({"likelihood": "categorical", "levels": 3}, torch.zeros(4, 3), "got torch.float32"),
        ({"likelihood": "categorical", "levels": 3}, torch.full((4, 3), 3), "values from 3 to 3"),
        ({"classes": 2}, torch.zeros(4, 3), "reads labels from the entry 'y'"),
        ({"classes": 2}, {"x": torch.zeros(4, 3), "y": torch.zeros(4)}, "one integer label per row, got torch.float32"),
        ({"classes": 2}, {"x": torch.zeros(4, 3), "y": torch.tensor([0, 1, 2, 0])}, "from 0 to 1, got 2 at row 2"),
        ({"classes": 2}, {"x": torch.zeros(4, 3), "y": torch.tensor([0, -1, 1, 0])}, "from 0 to 1, got -1 at row 1"),
    ):
        with pytest.raises(ValueError, match=message):
            pg.fit(vae(3, latent=1, hidden=(4,), **arguments), data, SVI(steps=1))


def test_auto_takes_the_likelihood_that_the_values_suggest() -> None:
    def chosen(x: Tensor, scale: float | None = None) -> str:
        made = chosen_likelihood("auto", x, (3,), scale=scale, levels=None, program="vae")
        return ("Grey" if getattr(made, "grey", False) else "") + type(made).__name__

    rows = every_row(3)
    assert chosen(rows) == chosen(rows.float()) == "BernoulliPixels" and chosen(rows * 0.5) == "GreyBernoulliPixels"
    assert chosen(rows * 2) == chosen(rows.float(), 0.5) == "NormalPixels"
    fixed = chosen_likelihood("auto", rows.float(), (3,), scale=0.25, levels=None, program="vae")
    assert fixed(torch.zeros(2, 3)).base_dist.scale.unique().tolist() == pytest.approx([0.25])
    assert math.isfinite(
        float(chosen_likelihood("normal", torch.ones(4, 3), (3,), scale=None, levels=None, program="vae").spread)
    ), "constant columns divide by one"


# ------------------------------------------------------------------------------------------------------ flow posteriors
FLOWS = ["planar", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("radial", "sylvester", "iaf"))]


@pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")  # runs are short on purpose
@pytest.mark.parametrize("kind", FLOWS)
def test_the_evidence_under_a_flow_posterior_is_that_of_the_program(kind: str, tmp_path: Any) -> None:
    """A linear decoder: log p(x) in closed form, to 5.5 standard errors (4e-8)."""
    x = factors(60)[:, :3]
    recipe = vae(latent=2, hidden=(), scale=1.0, posterior=kind, posterior_layers=2)
    before, fit = (pg.fit(recipe, x, algorithm, seed=0) for algorithm in (STILL, SVI(steps=300, lr=0.02)))
    decoder = fit.module("decoder").double()
    start = decoder(torch.zeros(2).double()).mean
    weight = (decoder(torch.eye(2).double()).mean - start).detach()
    normal = torch.distributions.MultivariateNormal(start.detach(), weight.T @ weight + torch.eye(3).double())
    exact = float(normal.log_prob(x.double()).mean())
    found = fit.evidence(particles=500)
    assert abs(found.mean - exact) < 5.5 * found.mc_stderr + 1e-3
    assert -before.records["program_loss"][0] < exact - 0.5, "it had something to learn"
    bound = -float(np.mean(fit.records["program_loss"][-50:]))
    assert exact - 1.0 < bound < exact + 0.1
    assert fit.posterior(x[:4], draws=3)["z"].shape == (3, 4, 2)
    assert fit.diagnose(draws=50).attrs["verdict"].startswith(("trust:", "doubtful:", "do not trust:"))
    with pytest.raises(pg.IncompatibleError, match="no mean in closed form"):
        code_means(fit)
    loaded = pg.load(fit.save(tmp_path / "fit"), recipe)
    assert torch.equal(loaded.posterior(x[:4], draws=3, seed=1)["z"], fit.posterior(x[:4], draws=3, seed=1)["z"])


@pytest.mark.slow
def test_a_flow_posterior_follows_a_ring() -> None:
    """A row that tells the length of z alone: a normal can cover a piece of the ring, maps of the row bend around it."""
    x = 1.5 + torch.rand(64, 1, generator=torch.Generator().manual_seed(0))

    def bound(kind: str) -> float:
        def build(rows: Tensor) -> pg.Program:
            maps = flow_maps(kind, 8, 2)
            reads = Perceptron(1, (16,), 4 + sum(part.numbers for part in maps))
            centre, spread = rows.mean(0), rows.std()
            encoder = FlowEncoder(reads, centre, spread, maps, 2) if maps else NormalEncoder(reads, centre, spread)

            def model(x: Tensor) -> None:
                with pyro.plate("data", len(x)):
                    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                    pyro.sample("x", dist.Normal(z.norm(dim=-1, keepdim=True), 0.2).to_event(1), obs=x)

            def guide(x: Tensor) -> None:
                pyro.module("encoder", encoder)
                with pyro.plate("data", len(x)):
                    pyro.sample("z", encoder(x))

            return pg.Program(model, guide)

        fit = pg.fit(pg.Recipe(build), x, SVI(steps=800, lr=0.01), seed=0)
        return -float(np.mean(fit.records["program_loss"][-100:]))

    assert bound("planar") > bound("normal") + 0.1


def test_posteriors_out_of_range_are_refused() -> None:
    for bad in ({"posterior": "spline"}, {"posterior": "planar", "posterior_layers": 0}):
        with pytest.raises(ValueError, match=list(bad)[-1]):
            vae(3, **bad)
    with pytest.raises(ValueError, match="posterior: 'iaf'"):
        vae(3, latent=1, posterior="iaf")
