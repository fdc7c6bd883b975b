"""The zoo: functions that return recipes, one family per file."""

from ppl_gen.models.boltzmann import rbm
from ppl_gen.models.diffusion import denoising_diffusion
from ppl_gen.models.implicit import gan
from ppl_gen.models.markov import hidden_markov
from ppl_gen.models.mixture import gaussian_mixture

__all__ = ["denoising_diffusion", "gan", "gaussian_mixture", "hidden_markov", "rbm"]
