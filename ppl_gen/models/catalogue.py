"""The list of the zoo: each model with the smallest data it can be tried on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ppl_gen.models.adversarial.dcgan import dcgan
from ppl_gen.models.adversarial.gan import gan
from ppl_gen.models.adversarial.gran import gran
from ppl_gen.models.adversarial.lapgan import lapgan
from ppl_gen.models.autoencoders.autoencoder import autoencoder
from ppl_gen.models.diffusion.binomial import binomial_diffusion
from ppl_gen.models.diffusion.denoising import denoising_diffusion
from ppl_gen.models.energy.dbm import dbm
from ppl_gen.models.energy.dbn import dbn
from ppl_gen.models.energy.energy_model import energy_model
from ppl_gen.models.energy.gaussian_rbm import gaussian_rbm
from ppl_gen.models.energy.gsn import gsn
from ppl_gen.models.energy.helmholtz import helmholtz
from ppl_gen.models.energy.rbm import rbm
from ppl_gen.models.flows import (
    affine_flow,
    ffjord,
    glow,
    iaf,
    maf,
    naf,
    nice,
    real_nvp,
    scalar_flow,
    spline_flow,
)
from ppl_gen.models.linear.components import factor_analysis, ppca
from ppl_gen.models.mixture.gaussian import gaussian_mixture
from ppl_gen.models.sequences.char_rnn import char_rnn
from ppl_gen.models.sequences.hidden_markov import hidden_markov
from ppl_gen.models.small_data import (
    bars,
    first_stage,
    labelled_bars,
    letters,
    ring,
    ripples,
    small_network,
    some_labelled,
    squares,
    two_factors,
    two_groups,
    two_regimes,
)
from ppl_gen.models.supervised.classifier import classifier
from ppl_gen.models.variational.semi_supervised import m1, m1_m2, m2
from ppl_gen.models.variational.vae import vae
from ppl_gen.program.program import Recipe

__all__ = ["CATALOGUE", "Entry", "programs_offering"]


@dataclass(frozen=True)
class Entry:
    """One model of the zoo: how to make it, and a handful of rows that suit it.

    Args:
        name: the key in `CATALOGUE`, as the command line knows it.
        recipe: makes the recipe in its smallest sensible size.
        data: a few rows, the same ones each time.
        about: one line for lists.
        offers: what its programs offer, in the words of `OFFERS`.

    Example:
        >>> entry = CATALOGUE["gaussian_mixture"]
        >>> entry.data().shape, entry.recipe()
        (torch.Size([40]), Recipe(gaussian_mixture, components=2, covariance='full', weights='free'))
    """

    name: str
    recipe: Callable[[], Recipe]
    data: Callable[[], Any]
    about: str
    offers: tuple[str, ...]


# What several models offer alike; the contract test holds every row against the dry run.
_CODES = (
    "density",
    "latent sites",
    "samples",
    "differentiable samples",
    "differentiable latents",
    "codes",
    "data plate",
)
_LABELS = ("density", "latent sites", "samples", "differentiable latents", "data plate")
_LINEAR = (
    "density",
    "latent sites",
    "samples",
    "differentiable samples",
    "no free parameters",
    "differentiable latents",
    "data plate",
    "exact evidence",
    "EM steps",
)
_IMPLICIT = ("latent sites", "samples", "differentiable samples", "differentiable latents", "codes", "data plate")
_FLOW = ("density", "samples", "differentiable samples", "data plate", "exact evidence")


#: Every model, by name. A new model adds one row here, which also enters it into the contract test.
CATALOGUE: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            "gaussian_mixture",
            lambda: gaussian_mixture(components=2),
            two_groups,
            "Gaussian mixture: free or equal weights; spherical, diagonal or full covariance",
            (
                "density",
                "latent sites",
                "samples",
                "finite local latents",
                "no free parameters",
                "differentiable latents",
                "data plate",
                "EM steps",
                "CAVI updates",
            ),
        ),
        Entry(
            "ppca",
            lambda: ppca(latent=2),
            two_factors,
            "probabilistic principal components: exact evidence, entries may be missing",
            _LINEAR,
        ),
        Entry(
            "factor_analysis",
            lambda: factor_analysis(latent=1),
            two_factors,
            "factor analysis: as ppca, with a noise variance for each column",
            _LINEAR,
        ),
        Entry(
            "autoencoder",
            lambda: autoencoder(code=2, hidden=(8,)),
            two_factors,
            "autoencoder: deep, convolutional, tied, denoising, sparse or k-sparse; codes without a prior",
            ("density", "latent sites", "differentiable latents", "data plate"),
        ),
        Entry(
            "vae",
            lambda: vae(latent=2, hidden=(8,)),
            bars,
            "variational autoencoder: perceptron or convolutional; pixels, numbers or levels; conditional",
            _CODES,
        ),
        Entry(
            "m1",
            lambda: m1(latent=2, hidden=(8,)),
            bars,
            "latent-feature model: a variational autoencoder whose codes serve any classifier",
            _CODES,
        ),
        Entry(
            "m2",
            lambda: m2(classes=2, latent=2, hidden=(8,)),
            some_labelled,
            "semi-supervised classifier: labels of some rows, a generative model of all",
            _LABELS,
        ),
        Entry(
            "m1_m2",
            lambda: m1_m2(first_stage(), classes=2, latent=2, hidden=(8,)),
            some_labelled,
            "m2 on the codes of a trained m1, which stays as it is",
            _LABELS,
        ),
        Entry(
            "hidden_markov",
            lambda: hidden_markov(states=2),
            two_regimes,
            "hidden Markov model of sequences with normal or categorical emissions",
            (
                "density",
                "latent sites",
                "samples",
                "finite local latents",
                "no free parameters",
                "differentiable latents",
                "data plate",
                "EM steps",
            ),
        ),
        Entry(
            "gan",
            lambda: gan(latent=4, hidden=(16,)),
            ring,
            "generative adversarial network: a perceptron of normal noise, without a density",
            _IMPLICIT,
        ),
        Entry(
            "dcgan",
            lambda: dcgan(latent=4, filters=4),
            squares,
            "deep convolutional adversarial network of images: transposed convolutions with batch norm",
            _IMPLICIT,
        ),
        Entry(
            "lapgan",
            lambda: lapgan(levels=1, latent=4, filters=4, hidden=(8,)),
            squares,
            "pyramid of adversarial networks of images: a coarse image, then what each finer scale adds",
            _IMPLICIT,
        ),
        Entry(
            "gran",
            lambda: gran(latent=4, steps=2, hidden=4, filters=2),
            squares,
            "recurrent adversarial network of images: a sum of canvases drawn in turn",
            _IMPLICIT,
        ),
        Entry(
            "rbm",
            lambda: rbm(hidden=4, sweeps=20),
            bars,
            "restricted Boltzmann machine of zeros and ones: an energy, trained by contrastive divergence",
            ("samples", "data plate", "exact evidence", "energy"),
        ),
        Entry(
            "gaussian_rbm",
            lambda: gaussian_rbm(hidden=3, sweeps=20),
            ring,
            "restricted Boltzmann machine of numbers: visible normals, hidden zeros and ones",
            ("samples", "data plate", "exact evidence", "energy"),
        ),
        Entry(
            "dbm",
            lambda: dbm(hidden=(4, 3), updates=3, sweeps=20),
            bars,
            "deep Boltzmann machine of zeros and ones: mean field for the data, chains for the model",
            ("samples", "data plate", "exact evidence", "energy"),
        ),
        Entry(
            "dbn",
            lambda: dbn(hidden=(4, 3), sweeps=20),
            bars,
            "deep belief network of zeros and ones: layers of coins below a Boltzmann machine, trained by wake-sleep",
            ("latent sites", "samples", "data plate", "energy"),
        ),
        Entry(
            "helmholtz",
            lambda: helmholtz(hidden=(4, 3)),
            bars,
            "Helmholtz machine: a sigmoid belief network of zeros and ones, and a network that recognises its states",
            ("density", "latent sites", "samples", "data plate"),
        ),
        Entry(
            "energy_model",
            lambda: energy_model(small_network(), sweeps=10),
            ring,
            "energy-based model: a network of one's own as energy, rows moved by Langevin steps",
            ("samples", "data plate", "energy"),
        ),
        Entry(
            "gsn",
            lambda: gsn(hidden=(8,), sweeps=10),
            bars,
            "generative stochastic network: a chain that corrupts rows and restores them",
            ("samples", "data plate", "transition"),
        ),
        Entry(
            "denoising_diffusion",
            lambda: denoising_diffusion(steps=4, hidden=8),
            ring,
            "diffusion model of vectors or images: a fixed chain into noise, a learned chain back",
            (
                "density",
                "latent sites",
                "samples",
                "differentiable samples",
                "differentiable latents",
                "codes",
                "data plate",
                "time steps",
                "noise prediction",
            ),
        ),
        Entry(
            "binomial_diffusion",
            lambda: binomial_diffusion(steps=4, hidden=8),
            bars,
            "diffusion model of zeros and ones: bits flipped into fair coins, a learned chain back",
            ("density", "latent sites", "samples", "data plate", "time steps"),
        ),
        Entry(
            "affine_flow",
            lambda: affine_flow(),
            ring,
            "flow of one affine map: a normal distribution with a full covariance",
            _FLOW,
        ),
        Entry(
            "real_nvp",
            lambda: real_nvp(layers=2, hidden=(8,)),
            ring,
            "flow of affine coupling layers: exact density, both directions fast",
            _FLOW,
        ),
        Entry(
            "maf",
            lambda: maf(layers=2, hidden=(8,)),
            ring,
            "masked autoregressive flow: exact density, fast; samples column by column",
            _FLOW,
        ),
        Entry(
            "iaf",
            lambda: iaf(layers=2, hidden=(8,)),
            ring,
            "inverse autoregressive flow: fast samples; exact density, column by column",
            _FLOW,
        ),
        Entry(
            "spline_flow",
            lambda: spline_flow(layers=2, hidden=(8,), bins=4),
            ring,
            "flow of coupling layers of rational-quadratic splines",
            _FLOW,
        ),
        Entry(
            "scalar_flow",
            lambda: scalar_flow("uniform", bins=4),
            two_groups,
            "flow of single numbers to uniform, Beta or normal codes",
            _FLOW,
        ),
        Entry(
            "nice",
            lambda: nice(layers=2, hidden=(8,)),
            ring,
            "flow of additive coupling layers, which keep volumes, and one scale for each column",
            _FLOW,
        ),
        Entry(
            "naf",
            lambda: naf(layers=1, hidden=(8,), units=3),
            ring,
            "neural autoregressive flow: a monotone network for each column; samples by bisection",
            _FLOW,
        ),
        Entry(
            "glow",
            lambda: glow(steps=1, channels=4),
            ripples,
            "flow of images: activation norm, invertible 1 x 1 convolutions, couplings, several scales",
            _FLOW,
        ),
        Entry(
            "ffjord",
            lambda: ffjord(hidden=(6,), method="rk4", steps=2),
            ring,
            "flow in continuous time: any network, its trace integrated",
            _FLOW,
        ),
        Entry(
            "char_rnn",
            lambda: char_rnn(cell="gru", hidden=4),
            letters,
            "recurrent network (plain, LSTM, GRU) of sequences of symbols, each predicted from those before it",
            ("density", "samples", "data plate", "exact evidence"),
        ),
        Entry(
            "classifier",
            lambda: classifier(hidden=(8,)),
            labelled_bars,
            "classifier: labels given rows or images, by a perceptron or a small convolutional network",
            ("density", "samples", "differentiable samples", "data plate"),
        ),
    )
}


def programs_offering(offer: str) -> list[str]:
    """Names of the models that offer ``offer``.

    Example:
        >>> "gaussian_mixture" in programs_offering("CAVI updates")
        True
    """
    return [name for name, entry in CATALOGUE.items() if offer in entry.offers]
