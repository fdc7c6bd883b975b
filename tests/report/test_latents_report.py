"""Pictures of codes: what stands in them is what the program's own networks and closed forms say."""

from __future__ import annotations

import base64
import math
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from programs import X8, local, local_guide
from test_report import Page

import ppl_gen as pg
from ppl_gen.data.rows import Rows
from ppl_gen.diagnostics.units import active_units, code_means
from ppl_gen.inference import EM, IWAE, SVI, ContrastiveDivergence
from ppl_gen.models import autoencoder, denoising_diffusion, m1, m1_m2, m2, ppca, rbm, vae
from ppl_gen.report import plot_codes, plot_manifold, plot_reconstructions, plot_samples, plot_traversal
from ppl_gen.report.code_section import coded
from ppl_gen.report.html import page
from ppl_gen.report.image_grid import draw_cells, picture_shape
from ppl_gen.report.reconstruct import decoded, expected, point_value, reconstructed

SHORT = SVI(steps=30, lr=0.01)


def _binary(rows: int = 60, columns: int = 36) -> torch.Tensor:
    """Two prototypes with noise."""
    noise = torch.Generator().manual_seed(0)
    base = (torch.rand(2, columns, generator=noise) < 0.5).float().repeat(rows // 2, 1)
    flips = (torch.rand(rows, columns, generator=noise) < 0.1).float()
    return (base - flips).abs()


X = _binary()
Y = torch.arange(60) % 2


@pytest.fixture(scope="module")
def flat() -> pg.Fit:
    return pg.fit(vae(36, latent=2, hidden=(8,)), X, SVI(steps=150, lr=0.01), seed=0)


@pytest.fixture(scope="module")
def deep() -> pg.Fit:
    return pg.fit(vae(36, latent=4, hidden=(8,)), X, SHORT, seed=0)


def cells_of(figure: Figure, down: int, across: int, side: int = 6, gap: int = 1) -> torch.Tensor:
    """The values behind a grid of images, back from the enlarged mosaic."""
    whole = np.asarray(figure.axes[0].images[0].get_array(), dtype=np.float64)
    fine = max(1, 28 // side)
    step = fine * side + gap
    assert whole.shape == (down * step + gap, across * step + gap)
    picked = [
        [whole[gap + i * step :, gap + j * step :][: fine * side : fine, : fine * side : fine] for j in range(across)]
        for i in range(down)
    ]
    return torch.as_tensor(np.array(picked)).flatten(2)


# ------------------------------------------------------------------------------------------ what stands in the pictures
def test_reconstructions_are_the_decoders_means_at_mean_codes(flat) -> None:
    found = cells_of(plot_reconstructions(flat, X, rows=5), 2, 5)
    z = flat.module("encoder")(X[:5]).mean
    assert torch.equal(found[0].float(), X[:5])
    # float32 sums in another order: 1e-6 of values up to 1.
    torch.testing.assert_close(found[1].float(), flat.module("decoder")(z).mean, atol=1e-6, rtol=0)
    untrained = pg.fit(vae(36, latent=2, hidden=(8,)), X, SVI(steps=1, lr=1e-6), seed=0)
    errors = [
        (again - seen).square().mean() for seen, again in (reconstructed(f, f.data, 60) for f in (untrained, flat))
    ]
    # Two prototypes and flips of 0.1: the best mean leaves 0.09, one mean for all rows 0.25 (half of the pixels differ).
    assert errors[0] > 0.15 and errors[1] < 0.12


def test_samples_are_means_at_drawn_codes(flat) -> None:
    figure = plot_samples(flat, 7, seed=3)
    found = cells_of(figure, 3, 3).flatten(0, 1)
    z = flat.sample(7, seed=3)["z"]
    torch.testing.assert_close(found[:7].float(), flat.module("decoder")(z).mean, atol=1e-6, rtol=0)
    assert (found[7:] == 0).all(), "no picture there: white"
    assert not set(found[:7].flatten().tolist()) <= {0.0, 1.0}, "means, not draws"


def test_rows_without_a_mean_are_shown_as_drawn() -> None:
    fit = pg.fit(rbm(36, 4, sweeps=5), X, SVI(ContrastiveDivergence(), steps=5), seed=0)
    found = cells_of(plot_samples(fit, 4, seed=5), 2, 2).flatten(0, 1).float()
    assert torch.equal(found, fit.sample(4, seed=5)["x"])
    with pytest.raises(pg.IncompatibleError, match="has no codes"):
        plot_codes(fit)


def test_rows_and_codes_of_one_number() -> None:
    """z ~ N(0, 1), x ~ N(z, 1), guide N(slope x, .): the code of x is slope x, and so is its reconstruction."""
    fit = pg.fit(pg.Program(local, local_guide), X8, SVI(steps=3), seed=0)
    _, again = reconstructed(fit, fit.data, 8)
    torch.testing.assert_close(again, fit.params["slope"] * X8)
    (line,) = walked_of(fit, 0, "z")
    torch.testing.assert_close(line, torch.linspace(-3, 3, 9, dtype=torch.float64), atol=1e-9, rtol=0)
    assert plot_codes(fit, method="first").axes[0].patches and plot_samples(fit, 4).axes[0].collections


def test_traversal_moves_one_unit_and_keeps_the_others(deep) -> None:
    found = cells_of(plot_traversal(deep, 4, units=[2, 0]), 2, 9)
    code = deep.module("encoder")(X[4:5]).mean
    for line, unit in zip(found, (2, 0), strict=True):
        codes = code.repeat(9, 1)
        codes[:, unit] = torch.linspace(-3, 3, 9)
        # The normal's quantile function at 3 loses four digits in float32: 1e-3 in z, slopes of pixels below 1.
        torch.testing.assert_close(line.float(), deep.module("decoder")(codes).mean, atol=1e-3, rtol=0)
    given_as_data = cells_of(plot_traversal(deep, X[4:5], units=[2, 0]), 2, 9)
    torch.testing.assert_close(given_as_data, found, atol=1e-6, rtol=0)


def test_traversal_takes_the_most_active_units(deep) -> None:
    found = active_units(deep)
    order = found.variance.argsort(descending=True)[: max(1, int(found.active.sum()))].tolist()
    labels = [text.get_text() for text in plot_traversal(deep, 0).axes[0].get_yticklabels()]
    assert labels == [f"unit {unit}" for unit in order]


def test_the_manifold_has_the_first_number_to_the_right_and_the_second_upwards(flat) -> None:
    found = cells_of(plot_manifold(flat, 3), 3, 3, gap=0)
    q = float(torch.special.ndtri(torch.tensor(0.98)))
    places = {(0, 0): (-q, q), (0, 2): (q, q), (2, 0): (-q, -q), (1, 1): (0.0, 0.0), (1, 2): (q, 0.0)}
    for (i, j), z in places.items():
        mean = flat.module("decoder")(torch.tensor([z])).mean[0]
        torch.testing.assert_close(found[i, j].float(), mean, atol=1e-4, rtol=0)
    assert (found[0, 0] - found[2, 2]).abs().max() > 0.05, "the corners differ, so the places say something"


@pytest.mark.parametrize("algorithm", [EM(), SVI(steps=300, lr=0.05)], ids=["EM", "SVI"])
def test_reconstructions_of_ppca_are_the_closed_form(algorithm) -> None:
    """E[z | x] = (W'W + s2 I)^-1 W'(x - b): the guide or the program's local_posterior both give it."""
    noise = torch.Generator().manual_seed(1)
    w = torch.randn(2, 5, generator=noise, dtype=torch.float64)
    x = torch.randn(200, 2, generator=noise, dtype=torch.float64) @ w
    x = x + 1 + 0.3 * torch.randn(200, 5, generator=noise, dtype=torch.float64)
    fit = pg.fit(ppca(5, 2, prior="flat"), x, algorithm, seed=0)
    one = {name: value[0] for name, value in fit.posterior(draws=1).items() if name in ("loadings", "loc", "noise")}
    w, b, s2 = one["loadings"], one["loc"], one["noise"] ** 2
    z = torch.linalg.solve(w.mT @ w + s2 * torch.eye(2, dtype=torch.float64), w.mT @ (x[:6] - b).mT).mT
    seen, again = reconstructed(fit, fit.data, 6)
    torch.testing.assert_close(seen, x[:6])
    torch.testing.assert_close(again, b + z @ w.mT, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(code_means(fit, x[:6]), z, atol=1e-9, rtol=1e-9)
    for figure in (plot_manifold(fit, 4), plot_traversal(fit, 0), plot_samples(fit, 9), plot_reconstructions(fit, x)):
        assert not figure.axes[0].images and figure.axes[0].collections, "five columns are bars, no image"


def test_conditional_pictures_show_the_class_that_is_given() -> None:
    fit = pg.fit(vae(36, latent=2, hidden=(8,), classes=2), {"x": X, "y": Y}, SVI(steps=150, lr=0.01), seed=0)
    decoder = fit.module("decoder")
    for y in (0, 1):
        middle = cells_of(plot_manifold(fit, 3, given={"y": y}), 3, 3, gap=0)[1, 1].float()
        torch.testing.assert_close(middle, decoder(torch.zeros(1, 2), torch.tensor([y])).mean[0], atol=1e-6, rtol=0)
    first = cells_of(plot_manifold(fit, 1), 1, 1, gap=0)[0, 0].float()
    torch.testing.assert_close(first, decoder(torch.zeros(1, 2), Y[:1]).mean[0], atol=1e-6, rtol=0)
    seen, again = reconstructed(fit, fit.dataset({"x": X[1:3], "y": Y[1:3]}), 2)
    code = fit.module("encoder")(X[1:3], Y[1:3]).mean
    torch.testing.assert_close(again, decoder(code, Y[1:3]).mean, atol=1e-6, rtol=0)
    walk = cells_of(plot_traversal(fit, 1, units=[0]), 1, 9)[0]
    codes = torch.stack([torch.linspace(-3, 3, 9), code[:1, 1].expand(9)], 1)
    torch.testing.assert_close(walk.float(), decoder(codes, Y[1].expand(9)).mean, atol=1e-3, rtol=0)
    drawn = fit.sample(4, {"y": 1}, seed=2)["z"]
    found = cells_of(plot_samples(fit, 4, given={"y": 1}, seed=2), 2, 2).flatten(0, 1).float()
    torch.testing.assert_close(found, decoder(drawn, torch.ones(4, dtype=torch.long)).mean, atol=1e-6, rtol=0)


def test_missing_labels_are_filled_in_by_the_likeliest() -> None:
    labels = torch.where(torch.arange(60) < 10, Y, -1)
    fit = pg.fit(m2(36, classes=2, latent=2, hidden=(8,)), {"x": X, "y": labels}, SVI(steps=150, lr=0.01), seed=0)
    guess = fit.module("classifier")(X[20:26]).probs.argmax(-1)
    assert set(guess.tolist()) == {0, 1}, "both classes are there, so the guess matters"
    code = fit.module("encoder")(X[20:26], guess).mean
    _, again = reconstructed(fit, fit.dataset({"x": X[20:26]}), 6)
    torch.testing.assert_close(again, fit.module("decoder")(code, guess).mean, atol=1e-6, rtol=0)
    ones = torch.ones(9, dtype=torch.long)
    middle = cells_of(plot_manifold(fit, 3, given={"y": 1}), 3, 3, gap=0)[1, 1].float()
    torch.testing.assert_close(middle, fit.module("decoder")(torch.zeros(1, 2), ones[:1]).mean[0], atol=1e-6, rtol=0)
    walk = cells_of(plot_traversal(fit, {"x": X[20:21]}, units=[1]), 1, 9)[0].float()
    codes = torch.stack([code[:1, 0].expand(9), torch.linspace(-3, 3, 9)], 1)
    torch.testing.assert_close(walk, fit.module("decoder")(codes, guess[0] * ones).mean, atol=1e-3, rtol=0)


def test_latents_below_the_code_follow_it() -> None:
    first = pg.fit(m1(36, latent=3, hidden=(8,)), X, SVI(steps=150, lr=0.01), seed=0)
    stacked = m1_m2(first, classes=2, latent=2, hidden=(8,))
    fit = pg.fit(stacked, {"x": X, "y": Y}, SVI(steps=150, lr=0.01), seed=0)
    walk = cells_of(plot_traversal(fit, 0, units=[0], site="z2"), 1, 9)[0].float()
    code = fit.module("encoder")(fit.module("features")(X[:1]).mean, Y[:1]).mean
    codes = torch.stack([torch.linspace(-3, 3, 9), code[0, 1].expand(9)], 1)
    through = fit.module("decoder")(codes, Y[0].expand(9)).mean
    torch.testing.assert_close(walk, fit.module("pixels")(through).mean, atol=1e-3, rtol=0)
    assert isinstance(plot_manifold(fit, 2, given={"y": 1}), Figure) and isinstance(
        plot_codes(fit, method="first"), Figure
    )


def two_codes(x):
    """A positive code and another beside it, and a finite latent that nobody guesses."""
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.LogNormal(0.0, 0.5))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.5])))
        pyro.sample("x", dist.Normal(torch.stack(torch.broadcast_tensors(a, b, 10.0 * k), -1), 0.1).to_event(1), obs=x)


def two_guesses(x):
    scale = pyro.param("scale", torch.tensor(0.1), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("a", dist.LogNormal(x[:, 0].log(), scale))
        pyro.sample("b", dist.Normal(x[:, 1], scale))


def test_a_program_of_ones_own() -> None:
    x = torch.tensor([[1.0, -2.0, 10.0], [2.0, 3.0, 0.0], [0.5, 1.0, 10.0]])
    fit = pg.fit(pg.Program(two_codes, two_guesses, name="own"), x, SVI(steps=2, lr=1e-6), seed=0)
    _, again = reconstructed(fit, fit.data, 3)
    means = torch.stack([x[:, 0] * math.exp(0.5 * 0.1**2), x[:, 1], x[:, 2]], -1)
    # k is drawn from its exact posterior, whose other value is 100 sd away.
    torch.testing.assert_close(again, means, atol=1e-4, rtol=1e-4)
    (line,) = walked_of(fit, 0, "a")
    # The quantiles of a log-normal: exp(0.5 t); b and k stay where the row put them.
    torch.testing.assert_close(line[:, 0], (0.5 * torch.linspace(-3, 3, 9)).exp(), atol=1e-2, rtol=1e-3)
    torch.testing.assert_close(line[:, 1:], x[0, 1:].expand(9, 2), atol=1e-4, rtol=1e-4)


def walked_of(fit: pg.Fit, row: int, site: str) -> torch.Tensor:
    """The values behind a traversal of a program whose rows are no images."""
    kept: list[torch.Tensor] = []
    import ppl_gen.report.latents as latents

    original = latents.draw_cells
    try:
        latents.draw_cells = lambda axes, cells, *rest, **more: kept.append(cells)
        plot_traversal(fit, row, site=site)
    finally:
        latents.draw_cells = original
    return kept[0]


def test_flat_priors_take_the_spread_of_the_codes() -> None:
    fit = pg.fit(autoencoder(36, 2, hidden=(8,)), X, SHORT, seed=0)
    codes = fit.module("encoder")(X)
    found = cells_of(plot_traversal(fit, 0, units=[1]), 1, 9)[0].float()
    moved = codes[:1].repeat(9, 1)
    moved[:, 1] = codes[:, 1].mean() + codes[:, 1].std() * torch.linspace(-3, 3, 9)
    torch.testing.assert_close(found, fit.module("decoder")(moved).clamp(-9, 9), atol=1e-4, rtol=1e-4)
    corner = cells_of(plot_manifold(fit, 3), 3, 3, gap=0)[0, 2].float()
    q = float(torch.special.ndtri(torch.tensor(0.98)))
    at = codes.mean(0, keepdim=True) + q * codes.std(0)
    torch.testing.assert_close(corner, fit.module("decoder")(at)[0], atol=1e-4, rtol=1e-4)
    with pytest.raises(pg.IncompatibleError, match="flat"):
        plot_samples(fit, 4)


def test_pixels_that_are_levels_show_their_mean_level() -> None:
    fn = dist.Categorical(logits=torch.randn(2, 36, 5, generator=torch.Generator().manual_seed(0))).to_event(1)
    mean = (fn.base_dist.probs * torch.arange(5.0)).sum(-1)
    torch.testing.assert_close(expected(fn), mean)
    assert torch.equal(point_value(fn), fn.base_dist.probs.argmax(-1))
    assert point_value(dist.Poisson(torch.ones(3))) is None and point_value(dist.Bernoulli(torch.tensor(0.7))) == 1
    one_hot = dist.OneHotCategorical(torch.tensor([[0.1, 0.7, 0.2]]))
    assert point_value(one_hot).tolist() == [[0.0, 1.0, 0.0]]
    assert expected(dist.Cauchy(0.0, 1.0)) is None, "a draw is shown instead"
    levels = (X * 3).long()
    fit = pg.fit(vae(36, latent=2, hidden=(8,), likelihood="categorical", levels=4), levels, SHORT, seed=0)
    seen, again = reconstructed(fit, fit.data, 4)
    assert torch.equal(seen, levels[:4]) and 0 < float(again.min()) and float(again.max()) < 3


# --------------------------------------------------------------------------------------------------- codes in the plane
def test_codes_are_points_coloured_by_label(flat) -> None:
    axes = plot_codes(flat, X, Y, method="first").axes[0]
    z = code_means(flat, X)
    for part, label in zip(axes.collections, (0, 1), strict=True):
        np.testing.assert_allclose(part.get_offsets(), z[label == Y].numpy(), atol=1e-6)
    shades = [to_rgb(part.get_facecolor()[0]) for part in axes.collections]
    assert shades[0] != shades[1]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["0", "1"]
    assert plot_codes(flat, X, method="first").axes[0].get_legend() is None
    many = plot_codes(flat, X, torch.arange(60), method="first")
    assert len(many.axes) == 2, "more than 20 labels are shades with a bar"


def test_principal_directions_of_codes_keep_the_most_variance(deep) -> None:
    drawn = np.asarray(plot_codes(deep, X, method="pca").axes[0].collections[0].get_offsets())
    values = np.linalg.eigvalsh(np.cov(code_means(deep, X).double().numpy().T))[::-1]
    np.testing.assert_allclose(drawn.var(0, ddof=1), values[:2], rtol=1e-6)


def test_tsne_keeps_separate_groups_apart() -> None:
    pytest.importorskip("sklearn")
    fit = pg.fit(vae(36, latent=4, hidden=(16,)), X, SVI(steps=300, lr=0.01), seed=0)
    drawn = np.concatenate(
        [np.asarray(part.get_offsets()) for part in plot_codes(fit, X, Y).axes[0].collections]
    )  # 30 rows of either prototype
    distances = np.linalg.norm(drawn[:, None] - drawn[None], axis=-1) + np.diag(np.full(60, np.inf))
    group = np.arange(60) >= 30
    nearest = group[distances.argmin(1)] == group
    # The prototypes differ in about 18 pixels and rows of one group in about 7: chance would be 30 of 60.
    assert nearest.mean() > 0.9


def test_one_number_is_a_histogram() -> None:
    fit = pg.fit(vae(36, latent=1, hidden=(8,)), X, SHORT, seed=0)
    axes = plot_codes(fit, X, Y, method="tsne").axes[0]
    assert sum(bar.get_height() for bar in axes.patches) == 60 and not axes.collections


# ------------------------------------------------------------------------------------------------------------- refusals
def test_what_has_no_codes_is_refused() -> None:
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    fit = pg.fit(model, torch.ones(10), SHORT)
    for call in (plot_reconstructions, plot_traversal, plot_manifold, plot_codes):
        with pytest.raises(pg.IncompatibleError, match="has no codes"):
            call(fit)
    assert coded({"a": fit}, None, in_sample=False) == ([], [], [])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda fit: plot_reconstructions(fit, X, rows=0), "rows: expected a whole number of at least 1, got 0"),
        (lambda fit: plot_samples(fit, 2.5), "n: expected a whole number of at least 1, got 2.5"),
        (lambda fit: plot_samples(fit, 2, given={"q": 1}), r"given: no site or input named \['q'\]"),
        (lambda fit: plot_manifold(fit, 2, given={"q": 1}), r"given: no site or input named \['q'\]"),
        (lambda fit: plot_manifold(fit, 0), "n: expected a whole number of at least 1, got 0"),
        (lambda fit: plot_traversal(fit, 60), "row: expected a number from 0 to 59, or data of one row, got 60"),
        (lambda fit: plot_traversal(fit, X[:2]), "row: .* got 2 rows"),
        (lambda fit: plot_traversal(fit, 0, [2]), r"units: expected numbers from 0 to 1, at least one, got \[2\]"),
        (lambda fit: plot_traversal(fit, 0, []), "units: expected numbers from 0 to 1, at least one"),
        (lambda fit: plot_codes(fit, X, method="umap"), "method: expected one of 'tsne', 'pca', 'first', got 'umap'"),
        (lambda fit: plot_codes(fit, X, Y[:5], "pca"), "labels: expected one for each of the 60 rows, got shape"),
        (lambda fit: plot_codes(fit, X[:4], site="q"), "site: expected one of z, got 'q'"),
    ],
)
def test_wrong_arguments_are_named(flat, call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(flat)


def test_few_rows_and_wide_codes_are_refused(deep) -> None:
    with pytest.raises(ValueError, match="t-SNE needs at least 5 rows, got 4"):
        plot_codes(deep, X[:4])
    with pytest.raises(ValueError, match="codes of two numbers, and 'z' of 'vae' has 4"):
        plot_manifold(deep)


def test_tsne_names_its_extra(deep, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(pg.MissingExtraError, match=r"ppl_gen\[sklearn\]"):
        plot_codes(deep, X)


def test_pictures_change_nothing(flat) -> None:
    import matplotlib.pyplot

    before, rc = torch.get_rng_state(), dict(matplotlib.rcParams)
    params = flat.params
    for figure in (plot_samples(flat, 4), plot_traversal(flat, 0), plot_manifold(flat, 2), plot_codes(flat, X)):
        assert isinstance(figure, Figure)
    assert torch.equal(torch.get_rng_state(), before) and dict(matplotlib.rcParams) == rc
    assert all(torch.equal(value, params[name]) for name, value in flat.params.items())
    assert matplotlib.pyplot.get_fignums() == []


def test_axes_of_ones_own_are_drawn_on(flat) -> None:
    figure = Figure()
    left, right = figure.subfigures(1, 2)
    assert plot_samples(flat, 4, axes=left.subplots()) is figure
    assert plot_manifold(flat, 2, axes=right.subplots()) is figure and len(figure.axes) == 2


def test_shapes_that_are_images_and_rows_that_are_not() -> None:
    assert picture_shape((1, 8, 6)) == (1, 8, 6) and picture_shape((9,)) is None and picture_shape((5, 3)) is None
    axes = Figure().add_subplot()
    colours = torch.rand(2, 3, 3, 5, 4)
    draw_cells(axes, colours, colours)
    assert axes.images[0].get_array().shape[-1] == 3
    axes = Figure().add_subplot()
    draw_cells(axes, torch.randn(2, 3, 40), torch.randn(9, 40))
    assert len(axes.collections[0].get_segments()) == 6, "a line for each row of 40 columns"
    axes = Figure().add_subplot()
    draw_cells(axes, torch.randn(2, 3, 7), torch.randn(9, 7))
    assert len(axes.collections[0].get_segments()) == 42, "a bar for each of 7 columns"


def test_a_fixed_site_and_the_rest_of_the_program(flat) -> None:
    z = torch.tensor([[0.5, -0.5], [1.0, 0.0]])
    made = decoded(flat, {"z": z}, {}, 2, alike=True)
    torch.testing.assert_close(made, flat.module("decoder")(z).mean, atol=1e-6, rtol=0)


# ----------------------------------------------------------------------------------------------------------- the report
@pytest.fixture(scope="module")
def comparison():
    data = Rows({"x": 0.1 + 0.8 * X, "y": Y}, lambda batch: {**batch, "x": torch.bernoulli(batch["x"])})
    algorithms = {"ELBO": SVI(steps=100, lr=0.01), "I<W>AE": SVI(IWAE(particles=3), steps=100, lr=0.01)}
    return pg.compare(vae(36, latent=2, hidden=(8,)), data, algorithms)


def test_the_report_shows_codes_of_held_out_rows(comparison) -> None:
    assert set(comparison.test_rows) == {"x", "y"} and len(comparison.test_rows["x"]) == 12
    text = page(comparison)
    parsed = Page(text)
    assert (
        "Codes, reconstructions and samples" in parsed.text and "Held-out rows and their reconstructions" in parsed.text
    )
    pictures = [image for image in parsed.all("img") if image["src"].startswith("data:image/png;base64,")]
    # One of reconstructions; samples, traversals, manifolds and codes of two fits; filters and saliency of two encoders.
    assert len(pictures) == 1 + 4 * 2 + 2 * 2
    for image in pictures:
        assert base64.b64decode(image["src"].split(",", 1)[1]).startswith(b"\x89PNG")
        assert len(image["alt"]) > 20 and len(image["src"]) < 200_000
    for label in ("ELBO", "I<W>AE"):
        found = active_units(comparison[label], comparison.test_rows)
        assert f"{label}: {int(found.active.sum())} of 2 units of z active" in parsed.text
    assert "I<W>AE" not in text and any("coloured by label" in image["alt"] for image in pictures)
    rows, again = reconstructed(comparison["ELBO"], comparison["ELBO"].dataset(comparison.test_rows), 8)
    error = float((rows - again).square().mean())
    assert f"ELBO, mean squared error {error:.3g}" in pictures[0]["alt"]


def test_many_numbers_get_tsne_and_no_manifold(deep) -> None:
    pytest.importorskip("sklearn")
    groups, units, problems = coded({"a": deep}, {"x": X, "y": Y}, in_sample=True)
    assert [group.title for group in groups] == ["Rows and their reconstructions", "Samples", "Traversals", "Codes"]
    assert groups[-1].pictures[0].caption == "a: t-SNE of the codes" and not problems and len(units) == 1


def test_a_picture_that_cannot_be_drawn_is_a_sentence(flat, monkeypatch) -> None:
    fit = pg.fit(autoencoder(36, 2, hidden=(8,)), X, SHORT, seed=0)
    groups, _, problems = coded({"point": fit}, X, in_sample=False)
    assert "Samples" not in [group.title for group in groups] and len(groups) == 4
    assert len(problems) == 1 and problems[0].startswith("point, samples:") and "flat" in problems[0]

    def fail(*_, **__):
        raise RuntimeError("no ink")

    monkeypatch.setattr("ppl_gen.report.code_section.reconstructed", fail)
    monkeypatch.setattr("ppl_gen.report.code_section.plot_samples", fail)
    _, _, problems = coded({"a": flat}, X, in_sample=False)
    assert "a, samples: RuntimeError: no ink" in problems


def test_programs_without_codes_get_no_section() -> None:
    rows = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    assert "Codes, reconstructions" not in page(pg.compare(denoising_diffusion(2, steps=3), rows, {"a": SVI(steps=3)}))
