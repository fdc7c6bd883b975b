"""Objectives: frozen specifications of a game whose players each minimise a loss of their own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import Field, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ppl_gen.data.batching import Batch
from ppl_gen.inference.objectives.game import Game, GameState, Loss, Setting
from ppl_gen.program.dry_run import dry_run
from ppl_gen.program.offers import Need, require
from ppl_gen.program.program import Program, with_known_kwargs
from ppl_gen.workspace.isolation import without_side_effects

__all__ = ["Objective", "require_per_row", "started"]


_PLAIN = (type(None), bool, int, float, str)
_FEW = 16  # numbers of a tensor that are written out
_KEPT = 16  # pairs of model and guide that one objective plays in plain scripts


class Objective(ABC):
    """A frozen specification of what is optimised.

    A one-player objective is also a loss for ordinary Pyro scripts:
    ``pyro.infer.SVI(model, guide, optim, loss=ELBO())``.
    """

    @property
    def label(self) -> str:
        """The name in tables and messages."""
        return type(self).__name__

    @property
    def call(self) -> str:
        """The call that makes it, with the settings that are not the default ones; networks by their layers.

        Two objectives of which it is not the same play different games.

        >>> from ppl_gen.inference import Adversarial
        >>> Adversarial("kl", critic=torch.nn.Linear(2, 1), penalty="none").call
        "Adversarial(kind='kl', critic=Linear, penalty='none')"
        >>> Adversarial(critic=torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))).call
        'Adversarial(critic=Sequential(Linear, Tanh, Linear))'
        """
        made: list[Field[Any]] = [field for field in fields(self) if field.init] if is_dataclass(self) else []
        values = {field.name: getattr(self, field.name) for field in made if not _is_default(field, self)}
        return f"{type(self).__name__}({', '.join(f'{name}={_written(value)}' for name, value in values.items())})"

    @property
    @abstractmethod
    def needs(self) -> Sequence[Need]:
        """What a program must offer."""

    @property
    def uses_density(self) -> bool:
        """Whether the program's density is part of what is optimised."""
        return any("density" in need for need in self.needs)

    #: Whether a guide takes part; without one SVI does not make a default guide.
    uses_guide: bool = True

    #: Whether its game adds the program's own terms to the loss by itself.
    pays_terms: bool = False

    @abstractmethod
    def build(self, setting: Setting) -> Game:
        """A fresh game for one fit."""

    def undivided(self, setting: Setting) -> str | None:
        """Why its loss on a batch is not the mean of its losses on the parts, weighed by their rows; None: it is.

        Several processes share batches (`pg.fit(..., fabric=)`) only where it is.
        """
        return f"{self.label} does not say that its loss on a batch is the mean of those on parts of it (`undivided`)"

    def __call__(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """The total loss of the program in nats, as `pyro.infer.SVI(loss=...)` calls it; N is unknown, so scale 1.

        Raises:
            TypeError: for games of several players, which a single optimiser cannot play.
        """
        batch = Batch(args, kwargs, None, None)
        game, state = self._game_of(model, guide, batch)
        if len(game.players) > 1:
            names = ", ".join(player.name for player in game.players)
            raise TypeError(
                f"{self.label} is a game of several players ({names}), and pyro.infer.SVI moves one; "
                f"use ppl_gen.inference.SVI(objective={self.label}(...))"
            )
        loss, state = game.loss("program", batch, state)
        self.__dict__["_games"][model, guide] = game, state
        return loss.value

    def _game_of(self, model: Callable[..., Any], guide: Callable[..., Any], batch: Batch) -> tuple[Game, GameState]:
        """The game of a plain pair and its state: made from a dry run at the first call, and kept for the next ones."""
        kept: dict[Any, tuple[Game, GameState]] = self.__dict__.setdefault("_games", {})
        if (model, guide) not in kept:
            program = Program(model, guide)
            with without_side_effects():
                info = dry_run(program, batch, guide=guide if self.uses_guide else None)
            require(self.label, self.needs, program.name, info.offers)
            game = started(self, Setting(program, model, guide, info, batch))
            kept[model, guide] = game, game.init(batch)
            while len(kept) > _KEPT:  # a game holds its model: a script that makes many pairs must not keep them all
                del kept[next(iter(kept))]
        return kept[model, guide]

    def __getstate__(self) -> dict[str, Any]:
        """Copies and other processes get the specification alone."""
        return {name: value for name, value in self.__dict__.items() if name != "_games"}


def started(objective: Objective, setting: Setting) -> Game:
    """A fresh game of ``objective``, the terms that the program brings along added to the program's loss.

    Raises:
        ValueError: for a term that does not give one number for each row, or has the name of a part of the loss.
    """
    game = objective.build(setting)
    return _WithTerms(game, setting) if setting.program.terms and not objective.pays_terms else game


class _WithTerms(Game):
    """Another game, whose player "program" also pays the program's own terms."""

    def __init__(self, game: Game, setting: Setting) -> None:
        self.game, self.terms = game, {name: with_known_kwargs(term) for name, term in setting.program.terms.items()}
        self.players, self.modules, self.simultaneous = game.players, game.modules, game.simultaneous
        self.advice = game.advice
        self.notes = {**game.notes, "terms": f"added to the loss: {', '.join(self.terms)}"}
        for name, term in self.terms.items():
            self._refuse_name(name, [f"{player.name}_loss" for player in game.players])
            with without_side_effects():
                value = term(*setting.probe.args, **setting.probe.kwargs)
                require_per_row(f"terms: {name!r}", value, setting.probe.rows)

    def _refuse_name(self, name: str, taken: Collection[str]) -> None:
        if name in taken:
            raise ValueError(
                f"terms: {name!r} is what the history calls a part of the loss; give the term another name"
            )

    def init(self, batch: Batch) -> GameState:
        return self.game.init(batch)

    def settle(self, player: str, state: GameState) -> GameState:
        return self.game.settle(player, state)

    def loss(self, player: str, batch: Batch, state: GameState) -> tuple[Loss, GameState]:
        loss, state = self.game.loss(player, batch, state)
        if player != "program":
            return loss, state
        added = {}
        for name, term in self.terms.items():
            self._refuse_name(name, loss.parts)
            rows = term(*batch.args, **batch.kwargs)
            added[name] = rows.sum() * (batch.rescale / (batch.total or 1))
        total = loss.value + torch.stack(list(added.values())).sum()
        return Loss(total, {**loss.parts, **{name: value.detach() for name, value in added.items()}}), state


def require_per_row(what: str, value: Any, rows: int | None) -> None:
    """Raise ValueError unless ``value`` is a tensor of one number for each of ``rows`` rows (None: of any number).

    A sum over rows would be rescaled as if it were one row, and a number for each column be averaged over them.
    """
    got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    if not isinstance(value, Tensor) or value.dim() != 1 or rows not in (None, len(value)):
        of = "each row" if rows is None else f"each of {rows} rows"
        raise ValueError(f"{what} has to give one number for {of} (a tensor, nats), got {got}")


def _is_default(field: Field[Any], objective: Any) -> bool:
    value = getattr(objective, field.name)
    return isinstance(value, _PLAIN) and bool(value == field.default)


def _written(value: Any) -> str:
    """A setting in words that are the same in every process, and other words for other settings."""
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.numel() <= _FEW):
        value = value.tolist()
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # 2 and 2.0 are the same setting
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name!r}: {_written(inside)}' for name, inside in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_written(inside) for inside in value)}]"
    if isinstance(value, nn.Module):
        return _layers(value)
    call = getattr(value, "call", None)  # other objectives, divergences
    return call if isinstance(call, str) else str(getattr(value, "__qualname__", type(value).__name__))


def _layers(network: nn.Module) -> str:
    """Its class, and those of its layers without parts: sizes are compared where parameters are."""
    leaves = [type(part).__name__ for part in network.modules() if part is not network and not list(part.children())]
    return f"{type(network).__name__}({', '.join(leaves)})" if leaves else type(network).__name__
