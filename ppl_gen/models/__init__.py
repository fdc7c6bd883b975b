"""The zoo: functions that return recipes, one family per file."""

from ppl_gen.models.hidden_markov import hidden_markov
from ppl_gen.models.mixture import gaussian_mixture

__all__ = ["gaussian_mixture", "hidden_markov"]
