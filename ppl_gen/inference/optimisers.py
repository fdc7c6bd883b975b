"""Which parameters each player of a game moves, and the optimiser and schedule that move them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppl_gen.inference.objectives.game import Game, Player

if TYPE_CHECKING:
    from ppl_gen.inference.svi import SVI

__all__ = ["OPTIMISERS", "check_players", "optimiser_of", "owned", "schedule_of"]

OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adamax": torch.optim.Adamax,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
}


def check_players(svi: SVI, game: Game) -> None:
    """Raise ValueError where a rate or an optimiser is given for a player that the game does not have."""
    players = [player.name for player in game.players]
    for setting in ("lr", "optimiser"):
        value = getattr(svi, setting)
        unknown = [name for name in value if name not in players] if isinstance(value, Mapping) else []
        if unknown:
            raise ValueError(f"{setting}: {svi.objective.label} has no player {unknown}; it has {players}")


def owned(game: Game, player: Player, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters that a player moves, tied weights once."""
    module = game.modules.get(player.name)
    if module is not None:
        return {name: p for name, p in module.named_parameters() if p.requires_grad}
    mine = {name: leaf for name, leaf in leaves.items() if player.owns is None or player.owns(name)}
    first = {id(leaf): name for name, leaf in reversed(mine.items())}
    return {name: mine[name] for name in mine if first[id(mine[name])] == name}


def schedule_of(svi: SVI, optimiser: torch.optim.Optimizer) -> Any:
    """The user's schedule of an optimiser's rate."""
    made = None if svi.schedule is None else svi.schedule(optimiser)
    if not callable(getattr(made, "step", None)):
        raise TypeError(
            "schedule: expected a function of the optimiser that returns a torch.optim.lr_scheduler.LRScheduler, "
            f"such as lambda o: StepLR(o, 100); it returned {made!r}"
        )
    return made


def optimiser_of(svi: SVI, player: Player, leaves: Mapping[str, Tensor]) -> torch.optim.Optimizer:
    """What moves a player's parameters: the user's choice, else that of its game, else Adam."""
    params = list(leaves.values())
    chosen = svi.optimiser.get(player.name) if isinstance(svi.optimiser, Mapping) else svi.optimiser
    rate = svi.lr.get(player.name) if isinstance(svi.lr, Mapping) else svi.lr
    if chosen is not None and not isinstance(chosen, str):
        built = chosen(params)
    elif chosen is None and player.optimiser is not None:
        built = player.optimiser(params)
    else:
        kind = (chosen or "adam").lower()
        fused = {"fused": True} if kind in ("adam", "adamw", "sgd") and _fusable(params) else {}
        built = OPTIMISERS[kind](params, lr=rate or 1e-3, **fused)
    if not isinstance(built, torch.optim.Optimizer):
        raise TypeError(
            f"optimiser: expected a function of the parameters that makes a torch.optim.Optimizer, got "
            f"{type(built).__name__} from {chosen!r}; write optimiser=torch.optim.Adam, say, not a pyro.optim one"
        )
    if rate is not None:
        for group in built.param_groups:
            group["lr"] = rate
    return built


def _fusable(params: Sequence[Tensor]) -> bool:
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda", "mps") for p in params)
