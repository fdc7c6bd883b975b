"""The zoo: functions that return recipes, one family per file."""

from ppl_gen.models.adversarial.dcgan import dcgan
from ppl_gen.models.adversarial.gan import gan
from ppl_gen.models.adversarial.gran import gran
from ppl_gen.models.adversarial.lapgan import from_pyramid, lapgan, laplacian_pyramid
from ppl_gen.models.autoencoders.autoencoder import autoencoder
from ppl_gen.models.diffusion.binomial import binomial_diffusion
from ppl_gen.models.diffusion.ddim import ddim_sample
from ppl_gen.models.diffusion.denoising import denoising_diffusion
from ppl_gen.models.diffusion.guidance import guided_sample
from ppl_gen.models.diffusion.inpainting import inpaint
from ppl_gen.models.energy.dbm import dbm
from ppl_gen.models.energy.dbn import dbn
from ppl_gen.models.energy.energy_model import energy_model
from ppl_gen.models.energy.gaussian_rbm import gaussian_rbm
from ppl_gen.models.energy.gsn import gsn
from ppl_gen.models.energy.helmholtz import helmholtz
from ppl_gen.models.energy.rbm import rbm
from ppl_gen.models.energy.stack import rbm_stack
from ppl_gen.models.flows import (
    affine_flow,
    bits_per_dimension,
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
from ppl_gen.models.latent_codes import anomaly_scores, codes, reconstructions
from ppl_gen.models.linear.components import PrincipalComponents, factor_analysis, ppca, principal_components
from ppl_gen.models.mixture.gaussian import gaussian_mixture
from ppl_gen.models.sequences.char_rnn import bits_per_character, char_rnn
from ppl_gen.models.sequences.hidden_markov import hidden_markov
from ppl_gen.models.supervised.classifier import classifier
from ppl_gen.models.variational.semi_supervised import m1, m1_m2, m2
from ppl_gen.models.variational.vae import vae
from ppl_gen.nn.images import ConvolutionalCritic

__all__ = [
    "ConvolutionalCritic",
    "PrincipalComponents",
    "affine_flow",
    "anomaly_scores",
    "autoencoder",
    "binomial_diffusion",
    "bits_per_character",
    "bits_per_dimension",
    "char_rnn",
    "classifier",
    "codes",
    "dbm",
    "dbn",
    "dcgan",
    "ddim_sample",
    "denoising_diffusion",
    "energy_model",
    "factor_analysis",
    "ffjord",
    "from_pyramid",
    "gan",
    "gaussian_mixture",
    "gaussian_rbm",
    "glow",
    "gran",
    "gsn",
    "guided_sample",
    "helmholtz",
    "hidden_markov",
    "iaf",
    "inpaint",
    "lapgan",
    "laplacian_pyramid",
    "m1",
    "m1_m2",
    "m2",
    "maf",
    "naf",
    "nice",
    "ppca",
    "principal_components",
    "rbm",
    "rbm_stack",
    "real_nvp",
    "reconstructions",
    "scalar_flow",
    "spline_flow",
    "vae",
]
