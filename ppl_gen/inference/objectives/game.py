"""The game that an objective becomes in one fit: its players, what each may move, and their losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ppl_gen.data.batching import FEW, Batch, Dataset
from ppl_gen.program.info import ProgramInfo
from ppl_gen.program.program import Program

__all__ = ["Game", "GameState", "Loss", "Player", "Setting"]


#: What a game carries from step to step: tensors by name.
GameState = Mapping[str, Tensor]


@dataclass(frozen=True)
class Player:
    """The parameters one loss may move.

    Args:
        name: ``"program"`` is the generative program's player; losses are recorded as ``<name>_loss``.
        updates: updates of this player per update of the program, each on a fresh batch, made before it.
        optimiser: how to build its optimiser unless the algorithm says otherwise: ``optimiser(params) -> Optimizer``.
        owns: which of the program's parameters it moves, by name; None: all. Ignored for players with a module.
        after: called after each of its updates (weight clipping, say).
        averaging: of the program's player, the decay of an exponential average of its parameters over its updates.
            The fit keeps it instead of the last ones: players circle around an equilibrium, their average does not.
    """

    name: str
    updates: int = 1
    optimiser: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None
    owns: Callable[[str], bool] | None = None
    after: Callable[[], None] | None = None
    averaging: float | None = None


@dataclass(frozen=True)
class Loss:
    """A player's loss on one batch: a scalar, nats per row; named parts for the history (nothing is synchronised)."""

    value: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """What an objective is built for: the program with its guide, the dry run, and a batch to try shapes on.

    ``data`` are all rows, where there are any beside the probe; `sample` is what to take units and scales from.

    >>> from dataclasses import dataclass
    >>> import ppl_gen as pg, pyro, pyro.distributions as dist
    >>> from ppl_gen.inference import SVI, Game, Loss, Objective
    >>> @dataclass(frozen=True)
    ... class SquaredError(Objective):
    ...     needs = (("data plate",),)
    ...     def build(self, setting):
    ...         class Squares(Game):
    ...             def loss(self, player, batch, state):
    ...                 return Loss((setting.model(*batch.args) - batch.args[0]).square().mean()), state
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
    data: Dataset | None = None

    def sample(self) -> Batch:
        """Rows to take units from: the probe, or where that is a small batch of many rows, some hundred of them."""
        data, held = self.data, self.probe.rows
        if data is None or data.rows is None or data.streamed is not None or held is None:
            return self.probe
        if held >= min(FEW, data.rows):
            return self.probe
        # Not the first ones: rows may be sorted.
        index = torch.randperm(data.rows, generator=torch.Generator().manual_seed(0), device="cpu")[:FEW]
        return data.batch(index, total=len(index))


class Game(ABC):
    """What an objective becomes in one fit: players, their extra modules, and the losses.

    It holds what is fixed for the run. What changes from step to step is a value, the state: named tensors that `init`
    makes and every `loss` takes and returns, so that a step can be captured, repeated and resumed.
    """

    #: In the order in which they move; the last one is "program".
    players: Sequence[Player] = (Player("program"),)
    #: Networks of players other than the program, private to the fit.
    modules: Mapping[str, nn.Module] = {}
    #: Whether all players look at the same point and the same batch, once each, before any of them moves.
    simultaneous: bool = False
    #: What was chosen from the dry run, reported in `Fit.notes`.
    notes: Mapping[str, str] = {}
    #: What to change where the program leaves out modes, which this objective accepts; the verdict says it.
    advice: str = ""

    def init(self, batch: Batch) -> GameState:
        """The state before the first step (chains, baselines), found on a batch like those to come; none by default."""
        return {}

    @abstractmethod
    def loss(self, player: str, batch: Batch, state: GameState) -> tuple[Loss, GameState]:
        """The loss of ``player`` on ``batch``, and the state after it.

        Differentiable, free of `.item()`, and pure: it changes neither parameters, nor ``state``, nor the game itself.
        A second call with equal parameters, state and random numbers gives equal losses, gradients and next states.
        """

    def settle(self, player: str, state: GameState) -> GameState:
        """Put the parameters of ``player`` back within their bounds after an update of it; the state after that.

        For bounds that need a state (the vectors of a power iteration, say); `Player.after` is for those without.
        """
        return state
