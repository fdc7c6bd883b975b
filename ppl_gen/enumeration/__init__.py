"""Exact sums over finite latent sites: contraction, marginals, draws."""
