"""Pictures of what latent-variable programs learned: codes, reconstructions, samples, traversals and manifolds."""

from ppl_gen.report.latents import plot_codes, plot_manifold, plot_reconstructions, plot_samples, plot_traversal

__all__ = ["plot_codes", "plot_manifold", "plot_reconstructions", "plot_samples", "plot_traversal"]
