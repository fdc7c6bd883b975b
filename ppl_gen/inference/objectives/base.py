"""Objectives: frozen specifications of a game whose players each minimise a loss of their own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ppl_gen.data.batching import Batch
from ppl_gen.dryrun import ProgramInfo
from ppl_gen.isolation import looking
from ppl_gen.offers import Need
from ppl_gen.program import Program, filtered

__all__ = ["Game", "Loss", "Objective", "Player", "Setting", "started"]


@dataclass(frozen=True)
class Player:
    """The parameters one loss may move.

    Args:
        name: ``"program"`` is the generative program's player; losses are recorded as ``<name>_loss``.
        updates: updates of this player per update of the program, each on a fresh batch, made before it.
        optimiser: how to build its optimiser unless the algorithm says otherwise: ``optimiser(params) -> Optimizer``.
        owns: which of the program's parameters it moves, by name; None: all. Ignored for players with a module.
        after: called after each of its updates (weight clipping, say).
    """

    name: str
    updates: int = 1
    optimiser: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None
    owns: Callable[[str], bool] | None = None
    after: Callable[[], None] | None = None


@dataclass(frozen=True)
class Loss:
    """A player's loss on one batch: nats per row, and named parts for the history (nothing is synchronised)."""

    value: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """What an objective is built for: the program with its guide, the dry run, and a batch to try shapes on.

    >>> from dataclasses import dataclass
    >>> import ppl_gen as pg, pyro, pyro.distributions as dist
    >>> from ppl_gen.inference import SVI
    >>> @dataclass(frozen=True)
    ... class SquaredError(Objective):
    ...     needs = (("data plate",),)
    ...     def build(self, setting):
    ...         class Squares(Game):
    ...             def loss(self, player, batch):
    ...                 return Loss((setting.model(*batch.args) - batch.args[0]).square().mean())
    ...         return Squares()
    >>> def model(x):
    ...     loc = pyro.param("loc", torch.zeros(()))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
    ...     return loc
    >>> fit = pg.fit(model, torch.arange(5.0), SVI(objective=SquaredError(), steps=300, lr=0.05), seed=0)
    >>> abs(float(fit.params["loc"]) - 2.0) < 0.1
    True
    """

    program: Program
    model: Callable[..., Any]
    guide: Callable[..., Any] | None
    info: ProgramInfo
    probe: Batch
    minibatches: bool = False


class Game(ABC):
    """The fresh state of an objective in one fit: players, their extra modules, and the losses."""

    #: In the order in which they move; the last one is "program".
    players: Sequence[Player] = (Player("program"),)
    #: Networks of players other than the program, private to the fit.
    modules: Mapping[str, nn.Module] = {}
    #: What was chosen from the dry run, reported in `Fit.notes`.
    notes: Mapping[str, str] = {}

    @abstractmethod
    def loss(self, player: str, batch: Batch) -> Loss:
        """The loss of ``player`` on ``batch``; differentiable, free of `.item()`, without effect on parameters."""


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
    @abstractmethod
    def needs(self) -> Sequence[Need]:
        """What a program must offer."""

    #: Whether a guide takes part; without one SVI does not make a default guide.
    uses_guide: bool = True

    @abstractmethod
    def build(self, setting: Setting) -> Game:
        """A fresh game for one fit."""

    def __call__(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """The total loss of the program in nats, as `pyro.infer.SVI(loss=...)` calls it; N is unknown, so scale 1.

        Raises:
            TypeError: for games of several players, which a single optimiser cannot play.
        """
        from ppl_gen.inference.objectives.plain import total_loss

        return total_loss(self, model, guide, args, kwargs)


def started(objective: Objective, setting: Setting) -> Game:
    """A fresh game of ``objective``, the terms that the program brings along added to the program's loss.

    Raises:
        ValueError: for a term that does not give one number for each row, or has the name of a part of the loss.
    """
    game = objective.build(setting)
    return _WithTerms(game, setting) if setting.program.terms else game


class _WithTerms(Game):
    """Another game, whose player "program" also pays the program's own terms."""

    def __init__(self, game: Game, setting: Setting) -> None:
        self.game, self.terms = game, {name: filtered(term) for name, term in setting.program.terms.items()}
        self.players, self.modules = game.players, game.modules
        for name, term in self.terms.items():
            self._refuse_name(name, [f"{player.name}_loss" for player in game.players])
            with looking():
                _check_term(name, term(*setting.probe.args, **setting.probe.kwargs), setting.probe.rows)

    def _refuse_name(self, name: str, taken: Collection[str]) -> None:
        if name in taken:
            raise ValueError(
                f"terms: {name!r} is what the history calls a part of the loss; give the term another name"
            )

    @property
    def notes(self) -> Mapping[str, str]:  # type: ignore[override]  # games add to their notes while they run
        return {**self.game.notes, "terms": f"added to the loss: {', '.join(self.terms)}"}

    def loss(self, player: str, batch: Batch) -> Loss:
        loss = self.game.loss(player, batch)
        if player != "program":
            return loss
        added = {}
        for name, term in self.terms.items():
            self._refuse_name(name, loss.parts)
            rows = term(*batch.args, **batch.kwargs)
            added[name] = rows.sum() * (batch.rescale / (batch.total or 1))
        total = loss.value + torch.stack(list(added.values())).sum()
        return Loss(total, {**loss.parts, **{name: value.detach() for name, value in added.items()}})


def _check_term(name: str, value: Any, rows: int | None) -> None:
    """A sum over rows would be rescaled as if it were one row: only numbers of single rows add up on minibatches."""
    got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    if not isinstance(value, Tensor) or value.dim() != 1 or rows not in (None, len(value)):
        of = "each row" if rows is None else f"each of {rows} rows"
        raise ValueError(f"terms: {name!r} has to give one number for {of} (a tensor, nats), got {got}")
