"""Widths that a recipe leaves to the data: as many as the data have, and the same fit as with the width written out."""

from __future__ import annotations

import pytest
import torch

import ppl_gen as pg
from ppl_gen.inference import EM, SVI, Adversarial, ContrastiveDivergence, WakeSleep, Walkback
from ppl_gen.models import (
    affine_flow,
    autoencoder,
    binomial_diffusion,
    char_rnn,
    dbm,
    dbn,
    denoising_diffusion,
    factor_analysis,
    gan,
    gaussian_rbm,
    gsn,
    helmholtz,
    iaf,
    m1,
    m2,
    maf,
    ppca,
    rbm,
    real_nvp,
    spline_flow,
    vae,
)

pytestmark = pytest.mark.filterwarnings("ignore::ppl_gen.FitWarning")  # a few steps are no fit

STEPS = SVI(steps=3)
COLUMNS = 5


def rows(columns=COLUMNS):
    return torch.randn(30, columns, generator=torch.Generator().manual_seed(0))


def bits():
    return (rows() > 0).float()


def labelled():
    return {"x": bits(), "y": torch.arange(30) % 2}


CASES = {  # the recipe without a width, the one with it, data and algorithm
    "ppca": (lambda: ppca(latent=2), lambda: ppca(COLUMNS, 2), rows, EM(steps=3)),
    "factor_analysis": (lambda: factor_analysis(latent=2), lambda: factor_analysis(COLUMNS, 2), rows, EM(steps=3)),
    "autoencoder": (lambda: autoencoder(code=3), lambda: autoencoder(COLUMNS, 3), rows, STEPS),
    "vae": (lambda: vae(), lambda: vae(COLUMNS), rows, STEPS),
    "m1": (lambda: m1(latent=2), lambda: m1(COLUMNS, latent=2), bits, STEPS),
    "m2": (lambda: m2(classes=2), lambda: m2(COLUMNS, classes=2), labelled, STEPS),
    "gan": (lambda: gan(), lambda: gan(COLUMNS), rows, SVI(Adversarial(), steps=3)),
    "rbm": (lambda: rbm(hidden=4), lambda: rbm(COLUMNS, 4), bits, SVI(ContrastiveDivergence(), steps=3)),
    "gaussian_rbm": (
        lambda: gaussian_rbm(hidden=2),
        lambda: gaussian_rbm(COLUMNS, 2),
        rows,
        SVI(ContrastiveDivergence(), steps=3),
    ),
    "dbm": (lambda: dbm(hidden=(3, 2)), lambda: dbm(COLUMNS, (3, 2)), bits, SVI(ContrastiveDivergence(), steps=3)),
    "dbn": (lambda: dbn(hidden=(3, 2)), lambda: dbn(COLUMNS, (3, 2)), bits, SVI(WakeSleep(), steps=3)),
    "helmholtz": (lambda: helmholtz(hidden=(3,)), lambda: helmholtz(COLUMNS, (3,)), bits, SVI(WakeSleep(), steps=3)),
    "gsn": (lambda: gsn(), lambda: gsn(COLUMNS), rows, SVI(Walkback(), steps=3)),
    "denoising_diffusion": (
        lambda: denoising_diffusion(steps=4),
        lambda: denoising_diffusion(COLUMNS, steps=4),
        rows,
        STEPS,
    ),
    "binomial_diffusion": (
        lambda: binomial_diffusion(steps=4),
        lambda: binomial_diffusion(COLUMNS, steps=4),
        bits,
        STEPS,
    ),
    "affine_flow": (lambda: affine_flow(), lambda: affine_flow(COLUMNS), rows, STEPS),
    "real_nvp": (lambda: real_nvp(), lambda: real_nvp(COLUMNS), rows, STEPS),
    "maf": (lambda: maf(), lambda: maf(COLUMNS), rows, STEPS),
    "iaf": (lambda: iaf(), lambda: iaf(COLUMNS), rows, STEPS),
    "spline_flow": (lambda: spline_flow(), lambda: spline_flow(COLUMNS), rows, STEPS),
}


@pytest.mark.parametrize("name", CASES)
def test_the_width_is_that_of_the_data_and_the_fit_that_of_the_width_written_out(name):
    free, fixed, data, algorithm = CASES[name]
    found, wanted = (pg.fit(recipe(), data(), algorithm, seed=0) for recipe in (free, fixed))
    if name != "autoencoder":  # which has no prior of codes to draw rows from
        assert found.sample(2)["x"].shape == (2, COLUMNS)
    learned, expected = ({**fit.params, **(fit.point or {})} for fit in (found, wanted))
    assert learned and set(learned) == set(expected)
    for site, value in learned.items():
        assert torch.equal(value, expected[site]), site


@pytest.mark.parametrize("name", CASES)
def test_a_width_that_is_written_out_is_still_held_against_the_data(name):
    _, fixed, data, _ = CASES[name]
    narrow = data()
    narrow = {**narrow, "x": narrow["x"][:, 1:]} if isinstance(narrow, dict) else narrow[:, 1:]
    with pytest.raises(ValueError, match=str(COLUMNS)):
        fixed()(narrow)


def test_images_and_symbols():
    images = bits()[:, :4].reshape(30, 1, 2, 2).repeat(1, 1, 2, 2)
    for recipe in (vae(latent=2, network="convolutional", hidden=(8,)), vae(latent=2)):
        assert pg.fit(recipe, images, STEPS, seed=0).sample(3)["x"].shape == (3, 1, 4, 4)
    coded = pg.fit(autoencoder(kind="convolutional"), images, STEPS, seed=0)
    assert coded.module("decoder")(torch.zeros(3, 2)).shape == (3, 1, 4, 4)

    text = {"x": torch.tensor([[0, 3, 1, 9], [2, 2, 0, 1]]), "lengths": torch.tensor([3, 4])}  # 9 pads
    assert pg.fit(char_rnn(hidden=4), text, STEPS, seed=0).module("network").symbols == 4
    with pytest.raises(ValueError, match=r"char_rnn\(symbols=2\): expected codes from 0 to 1, got 3"):
        char_rnn(2)(text)


@pytest.mark.parametrize(
    "made", [ppca, factor_analysis, vae, rbm, real_nvp, denoising_diffusion, autoencoder, affine_flow]
)
def test_a_vector_is_a_column_or_a_row_and_no_recipe_guesses_which(made):
    with pytest.raises(
        ValueError, match=r"rows x columns, got shape \(5,\); one column is x\[:, None\], one row x\[None\]"
    ):
        made()(torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0]))


def test_what_the_width_has_to_allow_is_looked_at_once_the_data_say_it():
    with pytest.raises(ValueError, match="latent: expected fewer than the 2 features, got 2"):
        ppca()(rows(2))
    with pytest.raises(ValueError, match="one column depends on no other"):
        maf()(rows(1))
    with pytest.raises(ValueError, match=r"hidden: expected widths of at least 5 \(one for each column\), got 4"):
        iaf(hidden=(4,))(rows())
    with pytest.raises(ValueError, match=r"takes images.*got features=\(5,\)"):
        vae(network="convolutional")(rows())
    with pytest.raises(ValueError, match="prior"):
        ppca(prior="strong")  # what needs no data is refused at once
