"""What each player of a game could still win alone: re-trained from a fit, the others held where they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from ppl_gen.data.batching import Batch
from ppl_gen.fitting.algorithm import Algorithm
from ppl_gen.fitting.run import Outcome, Run
from ppl_gen.inference.svi import SVI
from ppl_gen.inference.updates import State
from ppl_gen.program.offers import Need
from ppl_gen.workspace.isolation import generators, set_generators

__all__ = ["Responses"]


@dataclass(frozen=True)
class Responses(Algorithm):
    """Each player of a game moved alone from where the run starts; ``found`` takes its losses before and after.

    The losses are looked at on the same batches and the same noise before and after: ``found[player]`` becomes a list
    of pairs. The run ends where it began.

    Args:
        svi: how the players move.
        steps: updates of each.
        looks: batches on which a loss is looked at.
        found: where the losses go.
    """

    svi: SVI
    steps: int
    looks: int
    found: dict[str, list[tuple[float, float]]]

    subsamples: ClassVar[bool] = SVI.subsamples

    @property
    def label(self) -> str:
        return self.svi.label

    @property
    def needs(self) -> Sequence[Need]:
        return self.svi.needs

    def check(self, run: Run) -> None:
        self.svi.check(run)

    def run(self, run: Run) -> Outcome:
        svi = replace(self.svi, steps=self.steps, epochs=None)
        state, source = svi.init(run), svi.source(run)
        batches = [source.next() for _ in range(self.looks)]
        began, rows, numbers = state.state_dict(), source.state_dict(), generators()
        players = [player for player in state.game.players if state.leaves[player.name]]
        before = {player.name: self._losses(state, player.name, batches, numbers) for player in players}
        for player in players:
            set_generators(numbers)
            source.load_state_dict(rows)
            state.game.players, state.game.simultaneous = [replace(player, updates=1)], False
            for _ in range(self.steps):
                state.step(source)
            state.check()
            after = self._losses(state, player.name, batches, numbers)
            self.found[player.name] = list(zip(before[player.name], after, strict=True))
            state.load_state_dict(began)
        state.game.players = players
        return svi.outcome(state, run)

    def _losses(self, state: State, player: str, batches: Sequence[Batch], numbers: Any) -> list[float]:
        """The player's loss on each batch, under the same noise whenever it is asked; buffers stay as they are."""
        kept = [(module, name, buffer) for module, name, buffer in state.run.workspace.buffers()]
        set_generators(numbers)
        values = [state.game.loss(player, batch, state.game_state)[0].value.detach() for batch in batches]
        for module, name, buffer in kept:
            module._buffers[name] = buffer
        return torch.stack(values).double().tolist()
