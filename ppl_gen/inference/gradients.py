"""The inner step of a run by gradients: losses, gradients and the next state of one player on one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ppl_gen.data.batching import Batch
from ppl_gen.errors import IncompatibleError
from ppl_gen.inference.objectives.game import Game, GameState

__all__ = ["Step", "gradients"]


@dataclass(frozen=True)
class Step:
    """What one step of one player came to; nothing in it is synchronised with the device."""

    value: Tensor
    parts: Mapping[str, Tensor]
    gradients: list[Tensor]
    state: GameState


def gradients(game: Game, player: str, leaves: Sequence[Tensor], batch: Batch, state: GameState) -> Step:
    """Losses, gradients and the next state of one player on one batch: the one function that a captured graph replaces.

    A leaf that the loss does not touch gets a zero gradient.
    """
    loss, state = game.loss(player, batch, state)
    if not loss.value.requires_grad:
        raise IncompatibleError(f"the loss of player {player!r} depends on none of its parameters: nothing to learn")
    grads = torch.autograd.grad(loss.value, list(leaves), allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else _laid_out(g, p) for p, g in zip(leaves, grads, strict=True)]
    return Step(loss.value.detach(), loss.parts, filled, {name: value.detach() for name, value in state.items()})


def _laid_out(grad: Tensor, leaf: Tensor) -> Tensor:
    """Autograd may return an expanded gradient (that of a sum, say); fused optimisers read raw memory."""
    return grad if grad.stride() == leaf.stride() else torch.empty_like(leaf).copy_(grad)
