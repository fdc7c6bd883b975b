"""One training step by gradients: the players' optimisers, the parameters they move, and the last finite ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppl_gen.data.batching import Batch
from ppl_gen.errors import IncompatibleError
from ppl_gen.inference.impossible import impossible
from ppl_gen.inference.objectives.game import Game, Player
from ppl_gen.inference.run import Run
from ppl_gen.isolation import ProgramState, quiet

if TYPE_CHECKING:
    from ppl_gen.inference.svi import SVI

__all__ = ["OPTIMISERS", "State", "gradients"]

OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adamax": torch.optim.Adamax,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
}


def gradients(game: Game, player: str, leaves: Sequence[Tensor], batch: Batch) -> tuple[Tensor, Any, list[Tensor]]:
    """Losses and gradients of one player on one batch: the one function that a captured graph would replace.

    Nothing in it synchronises with the device; a leaf that the loss does not touch gets a zero gradient.
    """
    loss = game.loss(player, batch)
    if not loss.value.requires_grad:
        raise IncompatibleError(f"the loss of player {player!r} depends on none of its parameters: nothing to learn")
    grads = torch.autograd.grad(loss.value, list(leaves), allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else _laid_out(g, p) for p, g in zip(leaves, grads, strict=True)]
    return loss.value.detach(), loss.parts, filled


def _laid_out(grad: Tensor, leaf: Tensor) -> Tensor:
    """Autograd may return an expanded gradient (that of a sum, say); fused optimisers read raw memory."""
    return grad if grad.stride() == leaf.stride() else torch.empty_like(leaf).copy_(grad)


class State:
    """Optimisers, schedules and the game of one run, with the last parameters whose loss was finite."""

    def __init__(self, svi: SVI, run: Run, game: Game, guide: Callable[..., Any] | None, probe: Batch) -> None:
        self.svi, self.run, self.game, self.guide = svi, run, game, guide
        self.count, self.bad, self.first = 0, False, True
        self.unreached: dict[str, dict[str, Tensor]] = {}  # by player, what had no gradient at first, as it was then
        runs = [partial(run.program.model, *probe.args, **probe.kwargs)]
        if guide is not None:
            runs.append(partial(guide, *probe.args, **probe.kwargs))
        leaves = run.workspace.trainable(run.workspace.collect(*runs), run.notes)
        run.workspace.others.extend(game.modules.values())
        self._check_players()
        self.leaves = {player.name: self._owned(player, leaves) for player in game.players}
        self.optimisers = {p.name: self._optimiser(p) for p in game.players if self.leaves[p.name]}
        self.schedules = {n: self._schedule(o) for n, o in self.optimisers.items() if svi.schedule is not None}
        self.kept = {name: [p.detach().clone() for p in ps.values()] for name, ps in self.leaves.items()}
        if not self.leaves["program"]:
            fixed = run.notes.get("kept fixed")
            raise IncompatibleError(
                f"{svi.label} has nothing to learn in {run.program.name!r}: neither model nor guide has parameters"
                + (f" but those it keeps fixed ({fixed})" if fixed else "")
            )

    def _check_players(self) -> None:
        players = [player.name for player in self.game.players]
        for setting in ("lr", "optimiser"):
            value = getattr(self.svi, setting)
            unknown = [name for name in value if name not in players] if isinstance(value, Mapping) else []
            if unknown:
                raise ValueError(f"{setting}: {self.svi.objective.label} has no player {unknown}; it has {players}")

    def _owned(self, player: Player, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        module = self.game.modules.get(player.name)
        if module is not None:
            return {name: p for name, p in module.named_parameters() if p.requires_grad}
        owned = {name: leaf for name, leaf in leaves.items() if player.owns is None or player.owns(name)}
        first = {id(leaf): name for name, leaf in reversed(owned.items())}
        return {name: owned[name] for name in owned if first[id(owned[name])] == name}  # tied weights move once

    def _schedule(self, optimiser: torch.optim.Optimizer) -> Any:
        made = None if self.svi.schedule is None else self.svi.schedule(optimiser)
        if not callable(getattr(made, "step", None)):
            raise TypeError(
                "schedule: expected a function of the optimiser that returns a torch.optim.lr_scheduler.LRScheduler, "
                f"such as lambda o: StepLR(o, 100); it returned {made!r}"
            )
        return made

    def _optimiser(self, player: Player) -> torch.optim.Optimizer:
        svi, params = self.svi, list(self.leaves[player.name].values())
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

    def update(self, player: Player, batch: Batch) -> dict[str, Tensor | float]:
        """One update of one player; parameters move only when loss and gradient are finite."""
        leaves = list(self.leaves[player.name].values())
        if not leaves:
            return {}
        buffers = self.run.workspace.buffers()
        if self.first:
            value, parts, grads = self._validated(player, leaves, batch)
            self.first = False
        else:
            with quiet():
                value, parts, grads = gradients(self.game, player.name, leaves, batch)
        if player.name not in self.unreached:
            named = zip(self.leaves[player.name].items(), grads, strict=True)
            self.unreached[player.name] = {n: p.detach().clone() for (n, p), grad in named if not bool(grad.any())}
        norm = torch.nn.utils.get_total_norm(grads)
        if not bool(torch.isfinite(value + norm)):
            self.bad = True
            for module, name, kept in buffers:
                module._buffers[name] = kept
            where = "" if bool(value.isfinite()) else impossible(self.run.program.model, self.guide, batch)
            said = f"the loss is not finite at step {self.count}: {where}" if where else ""
            raise FloatingPointError(said or self._complaint(player, value, norm))
        if self.svi.clip_norm is not None:
            # Not in place: autograd may hand out one tensor as the gradient of two parameters.
            grads = list(torch._foreach_mul(grads, (self.svi.clip_norm / (norm + 1e-6)).clamp(max=1.0)))
        torch._foreach_copy_(self.kept[player.name], [p.detach() for p in leaves])
        for leaf, grad in zip(leaves, grads, strict=True):
            leaf.grad = grad
        self.optimisers[player.name].step()
        for leaf in leaves:
            leaf.grad = None
        if player.name in self.schedules:
            self.schedules[player.name].step()
        if player.after is not None:
            player.after()
        return {f"{player.name}_loss": value, **{f"{k}": v for k, v in parts.items()}}

    def _validated(self, player: Player, leaves: list[Tensor], batch: Batch) -> tuple[Tensor, Any, list[Tensor]]:
        """The first step, with Pyro's checks on: a value they refuse because it is not finite is a non-finite loss."""
        try:
            return gradients(self.game, player.name, leaves, batch)
        except ValueError as error:
            if "invalid values" in str(error) and ("nan" in str(error) or "inf" in str(error)):
                self.bad = True
                raise FloatingPointError(f"the first step is not finite: {error}") from error
            if where := impossible(self.run.program.model, self.guide, batch):
                self.bad = True
                raise FloatingPointError(f"the loss is not finite at step 0: {where}") from error
            raise

    def _complaint(self, player: Player, value: Tensor, norm: Tensor) -> str:
        bad = [n for n, p in self.leaves[player.name].items() if not bool(p.isfinite().all())]
        what = "loss" if not bool(value.isfinite()) else "gradient"
        where = f"; parameters already non-finite: {', '.join(bad)}" if bad else ""
        return (
            f"the {what} of player {player.name!r} is not finite at step {self.count} (loss {float(value):g}, gradient "
            f"norm {float(norm):g}){where}. Try a smaller lr, clip_norm=, or a prior that keeps scales off zero"
        )

    def unmoved(self) -> list[str]:
        """Parameters that no gradient reached at the first step, and that stand where they began."""
        began = (
            (self.leaves[player][n], value) for player, kept in self.unreached.items() for n, value in kept.items()
        )
        names = [n for kept in self.unreached.values() for n in kept]
        return [n for n, (leaf, value) in zip(names, began, strict=True) if torch.equal(leaf.detach(), value)]

    def check_finite(self) -> None:
        """What the last update did has no loss of its own yet that would show an overflow."""
        bad = [n for ps in self.leaves.values() for n, p in ps.items() if not bool(p.isfinite().all())]
        if bad and not self.bad:
            self.bad = True
            raise FloatingPointError(
                f"the update of step {self.count} made {', '.join(bad)} infinite or NaN. Try a smaller lr or clip_norm="
            )

    def rolled_back(self) -> ProgramState:
        """The parameters before the update that led to a non-finite loss."""
        with torch.no_grad():
            for name, values in self.kept.items():
                for leaf, value in zip(self.leaves[name].values(), values, strict=True):
                    leaf.copy_(value)
        return self.run.workspace.snapshot()


def _fusable(params: Sequence[Tensor]) -> bool:
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda", "mps") for p in params)
