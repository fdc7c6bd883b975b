r"""A noising chain whose variances are learned with the chain back: the one part of the guide that moves."""

from __future__ import annotations

import torch
from torch import nn

from ppl_gen.models.diffusion.noising import Noising

__all__ = ["LearnedNoising"]

_LEAST, _MOST = 1e-6, 0.9999  # of a variance: at either end a step has no density


class LearnedNoising(nn.Module):
    r"""Variances :math:`\beta_t = 1 / (1 + e^{-a_t})` with one parameter for each step, begun at a fixed chain.

    Draws of q are differentiated in them (they are reparameterised), so the bound itself says where noise is best
    added: the schedule is part of the guide. Only a bound can learn it: under the plain error of the predicted noise
    more noise is always better.

    Args:
        start: the chain to begin at.

    References:
        Variational diffusion models (Kingma, Salimans, Poole and Ho, 2021).

    Example:
        >>> chain = LearnedNoising(Noising(torch.tensor([0.25, 0.5])))
        >>> chain.current().betas.requires_grad, chain.current().betas.detach()
        (True, tensor([0.2500, 0.5000], dtype=torch.float64))
    """

    def __init__(self, start: Noising) -> None:
        super().__init__()
        self.logits = nn.Parameter(start.betas.logit().to(torch.get_default_dtype()))

    @property
    def steps(self) -> int:
        """T."""
        return len(self.logits)

    def current(self) -> Noising:
        """The chain at the present parameters, in float64, with a gradient."""
        return Noising.unchecked(self.logits.double().sigmoid().clamp(_LEAST, _MOST))
