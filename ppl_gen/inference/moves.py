"""How the players of a game move: their optimisers and schedules, the bound on gradients, averages of the way."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppl_gen.inference.averages import Average
from ppl_gen.inference.fused_adam import FusedAdam
from ppl_gen.inference.objectives.game import Player
from ppl_gen.inference.optimisers import optimiser_of, schedule_of

if TYPE_CHECKING:
    from ppl_gen.inference.svi import SVI

__all__ = ["Moves"]


class Moves:
    """The optimiser of each player that has parameters, its schedule, and the average of the parameters it made.

    ``leaves`` are the parameters by player and name; they are moved in place.
    """

    def __init__(self, svi: SVI, players: Sequence[Player], leaves: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._clip_norm, self._leaves = svi.clip_norm, leaves
        self._fused: dict[str, FusedAdam] = {}
        self.optimisers = {p.name: optimiser_of(svi, p, leaves[p.name]) for p in players if leaves[p.name]}
        kept = [(p.name, p.averaging) for p in players if p.averaging is not None]
        self.averages = {name: Average(list(leaves[name].values()), decay) for name, decay in kept}
        self._schedules = {n: schedule_of(svi, o) for n, o in self.optimisers.items() if svi.schedule is not None}

    def move(self, player: str, grads: list[Tensor]) -> None:
        """One update of a player's parameters, and one of its rate."""
        if self._clip_norm is not None:
            # Not in place: autograd may hand out one tensor as the gradient of two parameters.
            norm = torch.nn.utils.get_total_norm(grads)
            grads = list(torch._foreach_mul(grads, (self._clip_norm / (norm + 1e-6)).clamp(max=1.0)))
        self._update(player, grads)
        if player in self._schedules:
            self._schedules[player].step()

    def average(self, player: str) -> None:
        """Take a player's parameters into its average, if it keeps one."""
        if player in self.averages:
            self.averages[player].update(list(self._leaves[player].values()))

    def _update(self, player: str, grads: Sequence[Tensor]) -> None:
        fused, optimiser, leaves = self._fused.get(player), self.optimisers[player], self._leaves[player].values()
        if fused is not None:
            fused.step(grads)
            return
        for leaf, grad in zip(leaves, grads, strict=True):
            leaf.grad = grad
        optimiser.step()
        for leaf in leaves:
            leaf.grad = None
        if FusedAdam.serves(optimiser):
            self._fused[player] = FusedAdam(optimiser)

    def state_dict(self) -> dict[str, Any]:
        """Where optimisers, schedules and averages stand, copied."""
        return {
            "optimisers": {name: copy.deepcopy(o.state_dict()) for name, o in self.optimisers.items()},
            "schedules": {name: copy.deepcopy(s.state_dict()) for name, s in self._schedules.items()},
            "averages": {name: average.state_dict() for name, average in self.averages.items()},
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on where those stood that gave ``saved``."""
        for name, optimiser in self.optimisers.items():
            optimiser.load_state_dict(copy.deepcopy(saved["optimisers"][name]))
        self._fused = {}
        for name, schedule in self._schedules.items():
            schedule.load_state_dict(copy.deepcopy(saved["schedules"][name]))
        for name, average in self.averages.items():
            average.load_state_dict(saved["averages"][name])
