"""Linear-Gaussian latent variables."""
