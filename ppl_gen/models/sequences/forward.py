"""The E-step of hidden Markov models: forward and backward passes over all series, step by step or by a scan."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["expectations", "pays"]

_SEQUENTIAL = 32  # steps that a scan leaves to be made one after the other
_NUMBERS = 150  # series x states, below which what a step costs is not its arithmetic (found by measuring)
_STATES = 40  # beyond them, products of matrices cost more than the steps that they save
_NEVER = -1e15  # nats of an impossible step
_LEAST = 1e-200  # of a normaliser: below this, products of probabilities may have lost digits


def expectations(
    initial: Tensor, transition: Tensor, log_probs: Tensor, active: Tensor, *, scan: bool | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Log-likelihood of all sequences, and the expected counts that an M-step needs.

    .. math:: \alpha_1(k) \propto \pi_k p(x_1 \mid k), \quad \alpha_t(k) \propto p(x_t \mid k) \sum_j \alpha_{t-1}(j)
              A_{jk}, \quad \beta_{t-1}(j) \propto \sum_k A_{jk} p(x_t \mid k) \beta_t(k)

    Both are normalised at each step, and the logarithms of the normalisers of alpha add up to the log-likelihood. Long
    series of few states go by a parallel scan: products of neighbouring transition matrices, of neighbouring products,
    and so on, which takes log T passes where steps take T. Where probabilities would underflow (states that the data
    exclude by hundreds of nats) the recursion is done in logarithms, and counts are its gradient.

    Args:
        initial: pi, K.
        transition: A, K x K.
        log_probs: log p(x_t | k), sequences x time x K.
        active: sequences x time; the chain of a sequence ends where this does.
        scan: whether to use the scan; None: where it pays (`pays`).

    Returns:
        The log-likelihood (total nats) and ``initial`` (K), ``transition`` (K x K), ``states`` (sequences x time x K).

    References:
        A maximization technique occurring in the statistical analysis of probabilistic functions of Markov chains
        (Baum, Petrie, Soules and Weiss, 1970).
        Temporal parallelization of Bayesian smoothers (Sarkka and Garcia-Fernandez, 2021).

    Example:
        >>> half = torch.full((2,), 0.5)
        >>> steps = torch.ones(1, 3, dtype=torch.bool)
        >>> total, counts = expectations(half, half.expand(2, 2), torch.zeros(1, 3, 2), steps)
        >>> float(total), counts["transition"].sum()
        (0.0, tensor(2.))
    """
    with torch.no_grad():
        parallel = pays(*log_probs.shape) if scan is None else scan
        found = _smoothed(initial, transition, log_probs, active, parallel)
        if found is None and parallel:
            found = _smoothed(initial, transition, log_probs, active, False)
    return _by_logarithms(initial, transition, log_probs, active) if found is None else found


def pays(series: int, time: int, states: int) -> bool:
    """Whether a scan is faster than steps: few numbers in each of many steps."""
    return time > 4 * _SEQUENTIAL and series * states <= _NUMBERS and states <= _STATES


def _smoothed(
    initial: Tensor, transition: Tensor, log_probs: Tensor, active: Tensor, parallel: bool
) -> tuple[Tensor, dict[str, Tensor]] | None:
    """By probabilities; None where they underflow. Inside, time comes first."""
    top = log_probs.amax(-1)
    emitted = (log_probs - top.unsqueeze(-1)).exp().movedim(1, 0)
    used = active.T.unsqueeze(-1)
    ragged = not bool(active.all())
    first = initial * emitted[0]
    start = first.sum(-1, keepdim=True)
    passes = _scanned if parallel else _stepped
    alpha, beta, least = passes(first / start, transition, emitted[1:], used[1:], ragged)
    moved = (alpha[:-1] @ transition) * emitted[1:]
    norm = torch.cat([start[None], torch.where(used[1:], moved.sum(-1, keepdim=True), 1.0)])
    if not float(torch.minimum(norm.min(), least)) > _LEAST:  # NaN too
        return None
    total = (torch.where(active, top, 0.0).T + norm.squeeze(-1).log()).sum()
    states = alpha * beta
    states = torch.where(used, states / states.sum(-1, keepdim=True), 0.0)
    ahead = emitted[1:] * beta[1:]
    weight = (moved * beta[1:]).sum(-1, keepdim=True)
    ahead = torch.where(used[1:], ahead / weight, 0.0)
    pairs = alpha[:-1].flatten(0, 1).mT @ ahead.flatten(0, 1)
    counts = {"initial": states[0].sum(0), "transition": transition * pairs, "states": states.movedim(0, 1)}
    if not all(bool(value.isfinite().all()) for value in counts.values()):
        return None
    return total, counts


Passes = tuple[Tensor, Tensor, Tensor]  # alpha and beta, time x sequences x K; the least of their normalisers


def _stepped(first: Tensor, transition: Tensor, emitted: Tensor, used: Tensor, ragged: bool) -> Passes:
    """One step after the other; ``emitted`` and ``used`` are those of the second time step on."""
    time = len(emitted) + 1
    alpha, beta = first.new_empty(time, *first.shape), first.new_ones(time, *first.shape)
    alpha[0], least = first, first.new_ones(())
    here = first
    for t in range(time - 1):
        moved = (here @ transition).mul_(emitted[t])
        norm = moved.sum(-1, keepdim=True)
        moved.div_(norm)
        here = torch.where(used[t], moved, here) if ragged else moved
        alpha[t + 1] = here
    here, back = beta[-1], transition.mT.contiguous()
    for t in range(time - 2, -1, -1):
        moved = (emitted[t] * here) @ back
        norm = moved.amax(-1, keepdim=True)
        least = torch.minimum(least, norm.min())
        moved.div_(norm)
        here = torch.where(used[t], moved, here) if ragged else moved
        beta[t] = here
    return alpha, beta, least


def _scanned(first: Tensor, transition: Tensor, emitted: Tensor, used: Tensor, ragged: bool) -> Passes:
    """As `_stepped`, by two scans over the matrices of the steps: time x sequences x K x K."""
    matrices = transition * emitted.unsqueeze(-2)
    if ragged:  # a sequence that has ended stays as it is
        eye = torch.eye(len(transition), dtype=first.dtype, device=first.device)
        matrices = torch.where(used.unsqueeze(-1), matrices, eye)
    forward, one = _scan(first, matrices)
    backward, two = _scan(torch.ones_like(first), matrices.flip(0).mT)
    alpha = torch.cat([first[None], forward])
    beta = torch.cat([backward.flip(0), torch.ones_like(first)[None]])
    return alpha, beta, torch.minimum(one, two)


def _scan(vector: Tensor, matrices: Tensor) -> tuple[Tensor, Tensor]:
    """v M_1, v M_1 M_2, ... (time x sequences x K), each scaled to sum to one; and the least sum before scaling."""
    time = len(matrices)
    if time <= _SEQUENTIAL:
        found, least = [], vector.new_ones(())
        for matrix in matrices:
            vector, norm = _scaled((vector.unsqueeze(-2) @ matrix).squeeze(-2))
            least = torch.minimum(least, norm)
            found.append(vector)
        return torch.stack(found), least
    even = 2 * (time // 2)
    pairs = matrices[0:even:2] @ matrices[1:even:2]
    pairs = pairs / pairs.amax((-1, -2), keepdim=True)
    after, least = _scan(vector, pairs)
    before = torch.cat([vector[None], after])[: (time + 1) // 2]
    between, norm = _scaled((before.unsqueeze(-2) @ matrices[0::2]).squeeze(-2))
    result = vector.new_empty(time, *vector.shape)
    result[0::2], result[1::2] = between, after
    return result, torch.minimum(least, norm)


def _scaled(vectors: Tensor) -> tuple[Tensor, Tensor]:
    norm = vectors.sum(-1, keepdim=True)
    return vectors / norm, norm.min()


def _by_logarithms(
    initial: Tensor, transition: Tensor, log_probs: Tensor, active: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The forward recursion in logarithms, which nothing underflows; its gradient is the expected counts."""
    with torch.enable_grad():
        leaves = [value.detach().clone().requires_grad_() for value in (_log(initial), _log(transition), log_probs)]
        first, step, emitted = leaves
        forward = first + emitted[:, 0]
        for t in range(1, emitted.shape[1]):
            moved = (forward.unsqueeze(-1) + step).logsumexp(-2) + emitted[:, t]
            forward = torch.where(active[:, t].unsqueeze(-1), moved, forward)
        series = forward.logsumexp(-1)
        total = torch.where(series > _NEVER / 10, series, -torch.inf).sum()
        gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    counts = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, gradients, strict=True)]
    return total.detach(), dict(zip(("initial", "transition", "states"), counts, strict=True))


def _log(probability: Tensor) -> Tensor:
    """Finite where nothing is possible: a logarithm of zero has no gradient, and the weight of such a step is zero."""
    return torch.where(probability > 0, probability.log(), _NEVER)
