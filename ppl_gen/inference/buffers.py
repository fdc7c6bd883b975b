"""The buffers that a step may write to: where they are held, and how they are put back after a step on trial."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ppl_gen.inference.objectives.game import Game
from ppl_gen.workspace.isolation import generators, set_generators
from ppl_gen.workspace.memory import unremembered
from ppl_gen.workspace.workspace import Workspace

__all__ = ["Buffers"]


class Buffers:
    """Those of the program's networks and of a game's own modules, asked for anew each time."""

    def __init__(self, workspace: Workspace, game: Game) -> None:
        self._workspace, self._game = workspace, game

    def modules(self) -> list[nn.Module]:
        """The networks that hold them, and all other networks of the run, once each."""
        extra = [part for module in self._game.modules.values() for part in module.modules()]
        return list({id(m): m for m in [*self._workspace.networks(), *extra]}.values())

    def places(self) -> list[tuple[nn.Module, str]]:
        """Where they are held, in the order of `values`."""
        return [(module, name) for module in self.modules() for name, b in module._buffers.items() if b is not None]

    def values(self) -> list[Tensor]:
        """The buffers themselves."""
        return [b for module in self.modules() for b in module._buffers.values() if b is not None]

    @contextlib.contextmanager
    def put_back_after(self) -> Iterator[tuple[list[Tensor], Callable[[], None]]]:
        """Buffers, generators and what modules remember are on exit as they were; and a function that makes them so."""
        buffers, numbers = self.values(), generators()
        kept = [buffer.clone() for buffer in buffers]

        def put_back() -> None:
            with torch.no_grad():
                for buffer, value in zip(buffers, kept, strict=True):
                    buffer.copy_(value)
            set_generators(numbers)

        try:
            with unremembered():
                yield buffers, put_back
        finally:
            put_back()
