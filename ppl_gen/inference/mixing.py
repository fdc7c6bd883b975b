"""Shares of a mixture of normals, by the importance weights of its own draws."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from ppl_gen.inference.potentials import Potential
from ppl_gen.weights.psis import effective_sample_size, pareto_k, smoothed_weights

__all__ = ["Shares", "importance_shares"]


@dataclass(frozen=True)
class Shares:
    """The shares (K,), and a sentence on the weights that they were made of."""

    shares: Tensor
    said: str


def importance_shares(
    potential: Potential, loc: Tensor, scale_tril: Tensor, draws: int, seed: int, *, floor: float
) -> Shares:
    r"""What part of the posterior each of K normals stands for.

    .. math:: \pi_k = \sum_s w_s \frac{N_k(u_s)}{\sum_j N_j(u_s)}, \quad
        w_s \propto \frac{p(x, u_s)}{\tfrac1K \sum_j N_j(u_s)}

    Draws are taken from all normals alike and weighed by the density of their mixture, Pareto smoothed: one step of
    population Monte Carlo (Cappe et al. 2008), which counts a mode once however many paths ended in it. Where fewer
    than ``floor`` times ``draws`` draws carry the weight, the sentence says that the shares may be wrong.

    Args:
        potential: minus the log density, of one vector.
        loc, scale_tril: (K, size) and (K, size, size).
        draws: in all.
        seed: of the draws.
        floor: the share of effective draws that is expected.
    """
    count, size = loc.shape
    each = -(-draws // count)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    noise = torch.randn(count, each, size, dtype=loc.dtype, generator=generator).to(loc.device)
    u = (loc[:, None] + noise @ scale_tril.mT).flatten(0, 1)
    parts = MultivariateNormal(loc, scale_tril=scale_tril, validate_args=False).log_prob(u[:, None])  # draws x K
    target = -torch.stack([potential(point)[0] for point in u])
    ratios = (target - parts.logsumexp(1)).double().cpu()
    ratios = torch.where(ratios.isfinite(), ratios, torch.full_like(ratios, -float("inf")))
    if not bool(ratios.isfinite().any()):
        return Shares(loc.new_full((count,), 1.0 / count), "no draw of theirs has a finite density: equal shares")
    k, logs = pareto_k(ratios.numpy()), torch.as_tensor(smoothed_weights(ratios.numpy()))
    weights = logs.exp().to(loc)
    shares = (weights[:, None] * parts.softmax(1)).sum(0)
    effective = float(effective_sample_size(logs.numpy()))
    said = f"k-hat of their mixture {k:.2f}, {effective:.0f} of {len(u)} draws effective"
    if effective < floor * len(u):
        said += ": too few to tell how much each holds"
    return Shares((shares / shares.sum()).clamp(min=1e-12), said)
