"""The E-step of hidden Markov models: the forward recursion and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["expectations"]


def expectations(
    initial: Tensor, transition: Tensor, log_probs: Tensor, active: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Log-likelihood of all sequences, and the expected counts that an M-step needs.

    .. math:: \alpha_1(k) = \pi_k p(x_1 \mid k), \qquad \alpha_t(k) = p(x_t \mid k) \sum_j \alpha_{t-1}(j) A_{jk}

    The gradient of log sum_k alpha_T(k) in the logarithms of pi, A and p(x_t | k) is the expected number of times that
    each is used: the backward pass of Baum and Welch.

    Args:
        initial: pi, K.
        transition: A, K x K.
        log_probs: log p(x_t | k), sequences x time x K.
        active: sequences x time; the chain of a sequence ends where this does.

    Returns:
        The log-likelihood (total nats) and ``initial`` (K), ``transition`` (K x K), ``states`` (sequences x time x K).

    References:
        A maximization technique occurring in the statistical analysis of probabilistic functions of Markov chains
        (Baum, Petrie, Soules and Weiss, 1970).

    Example:
        >>> half = torch.full((2,), 0.5)
        >>> steps = torch.ones(1, 3, dtype=torch.bool)
        >>> total, counts = expectations(half, half.expand(2, 2), torch.zeros(1, 3, 2), steps)
        >>> float(total), counts["transition"].sum()
        (0.0, tensor(2.))
    """
    tiny = torch.finfo(log_probs.dtype).tiny  # the logarithm of an impossible step stays finite, its weight is zero
    with torch.enable_grad():
        leaves = [
            value.detach().clone().requires_grad_()
            for value in (initial.clamp_min(tiny).log(), transition.clamp_min(tiny).log(), log_probs)
        ]
        first, step, emitted = leaves
        forward = first + emitted[:, 0]
        for t in range(1, emitted.shape[1]):
            moved = (forward.unsqueeze(-1) + step).logsumexp(-2) + emitted[:, t]
            forward = torch.where(active[:, t].unsqueeze(-1), moved, forward)
        total = forward.logsumexp(-1).sum()
        gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    counts = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, gradients, strict=True)]
    return total.detach(), dict(zip(("initial", "transition", "states"), counts, strict=True))
