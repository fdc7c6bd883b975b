"""One training step by gradients: the players in turn, the parameters they move, and the last finite ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppl_gen.data.batches import Batches
from ppl_gen.data.batching import Batch
from ppl_gen.data.calls import ByStep
from ppl_gen.errors import PROGRAM_ERRORS, IncompatibleError
from ppl_gen.fitting.run import NonFiniteStepError, Run
from ppl_gen.inference.captured import Steps
from ppl_gen.inference.gradients import Step, gradients
from ppl_gen.inference.impossible import impossible
from ppl_gen.inference.moves import Moves
from ppl_gen.inference.objectives.game import Game, Player
from ppl_gen.inference.optimisers import check_players, owned
from ppl_gen.inference.reduction import Together
from ppl_gen.inference.rollback import Mark
from ppl_gen.workspace.closures import functions_of
from ppl_gen.workspace.isolation import validation_off

if TYPE_CHECKING:
    from ppl_gen.inference.svi import SVI

__all__ = ["CHECK", "State"]

#: Steps between two looks at whether all losses were finite.
CHECK = 50


class State:
    """What changes in one run: the game's state, the parameters and how they move; and a mark to go back to.

    Steps read nothing from the device. Their losses are read together once in `CHECK` steps; where one is not finite,
    the steps since the last mark are made again under full checks, so that the error names the step and the run ends at
    the last parameters whose loss was finite.
    """

    def __init__(self, svi: SVI, run: Run, game: Game, guide: Callable[..., Any] | None, probe: Batch) -> None:
        self.svi, self.run, self.game, self.guide = svi, run, game, guide
        self.count, self.first = 0, True
        self.unreached: dict[str, dict[str, Tensor]] = {}  # by player, what had no gradient at first, as it was then
        runs = [partial(run.program.model, *probe.args, **probe.kwargs)]
        if guide is not None:
            runs.append(partial(guide, *probe.args, **probe.kwargs))
        leaves = run.workspace.trainable(run.workspace.collect(*runs), run.notes)
        run.workspace.take_in(game.modules.values())
        check_players(svi, game)
        self.leaves = {player.name: owned(game, player, leaves) for player in game.players}
        self.moves = Moves(svi, game.players, self.leaves)
        firsts = {id(leaf): name for name, leaf in self.leaves["program"].items()}
        #: Every parameter of the program by the name of the leaf that moves it: tied weights share one.
        self.movers = {name: firsts[id(leaf)] for name, leaf in leaves.items() if id(leaf) in firsts}
        others = {id(part) for module in game.modules.values() for part in module.modules()}
        #: What the program's networks remembered before the first step; asked for where parameters are averaged.
        averaged = bool(self.moves.averages)
        self.began = [kept for kept in run.workspace.buffers() if id(kept[0]) not in others] if averaged else []
        if not self.leaves["program"]:
            fixed = run.notes.get("kept fixed")
            raise IncompatibleError(
                f"{svi.label} has nothing to learn in {run.program.name!r}: neither model nor guide has parameters"
                + (f" but those it keeps fixed ({fixed})" if fixed else "")
            )
        self.game_state = game.init(probe)
        self.steps = self._steps()
        self.losses: list[tuple[int, Tensor]] = []  # step and loss, those that were not looked at yet
        self.together: Together | None = None
        if not run.ranks.alone:
            self.together = Together(run, game)
            self.together.begin([leaf for leaves in self.leaves.values() for leaf in leaves.values()])
        self.kept: dict[str, list[Tensor]] = {}  # parameters before the last update, while steps are checked
        self.mark: Mark | None = None
        self.bad: FloatingPointError | None = None

    def step(self, source: Batches) -> dict[str, Tensor | float]:
        """One update of the program, after those of the other players."""
        if self.mark is None or self.mark.is_due(self.count):
            self.mark = Mark(self, source)
        try:
            info = self.round(source)
        except NonFiniteStepError as error:
            self.bad = error
            raise
        except PROGRAM_ERRORS:
            if self.together is not None:  # the others have heard of this error, and make no steps again
                raise
            self.check()  # what the program raises at parameters that are no numbers is not its own fault
            raise
        if self.count % CHECK == 0 or self.together is not None:
            self.check()
        return info

    def round(self, source: Batches, *, checked: bool = False) -> dict[str, Tensor | float]:
        """All players in turn; ``checked`` raises at once where a loss or a gradient is not finite."""
        info: dict[str, Tensor | float] = {}
        self.steps.whole = source.whole
        self.steps.begin_round()
        turns = [p for p in self.game.players if self.leaves[p.name]]
        together = [turns] if self.game.simultaneous else [[p] for p in turns for _ in range(p.updates)]
        for players in together:
            if self.together is None:
                info.update(self._update(players, source.next(), checked))
            else:
                with self.together.batch(source) as batch:
                    info.update(self._update(players, batch, checked))
        self.count += 1
        return info

    def _steps(self) -> Steps:
        run, svi = self.run, self.svi
        own: list[Any] = [svi.schedule, svi.stop_rule, run.data.on_batch, *run.hooks]  # they run between steps
        named = svi.optimiser.values() if isinstance(svi.optimiser, Mapping) else [svi.optimiser]
        own += [choice for choice in named if choice is not None and not isinstance(choice, str)]
        afters = [player.after for player in self.game.players if player.after is not None]
        own += [after for after in afters if not str(after.__module__).startswith("ppl_gen.")]
        moving = any(isinstance(value, ByStep) for value in run.data.constants.values())
        return Steps(
            self.game,
            run.workspace,
            self.leaves,
            functions_of(run.program, self.guide),
            run.compile if run.ranks.alone else "alone",
            svi.limit(run),
            run.data.constants,
            run.data.positional,
            moving or any(part is not None for part in own),
            sum(site.finite for site in run.info.select()),
        )

    def _update(self, players: Sequence[Player], batch: Batch, checked: bool) -> dict[str, Tensor | float]:
        """All gradients of ``players`` at one point, and then all their moves."""
        info: dict[str, Tensor | float] = {}
        steps = [self._looked(player, batch, checked) for player in players]
        for player, step in zip(players, steps, strict=True):
            self._moved(player, step.gradients)
            info |= {f"{player.name}_loss": step.value, **step.parts}
        return info

    def _looked(self, player: Player, batch: Batch, checked: bool) -> Step:
        """Loss and gradients of one player on a batch; the game's state goes on."""
        leaves = list(self.leaves[player.name].values())
        buffers = self.run.workspace.buffers() if checked or self.first else []
        if self.first:
            step = self._validated(player, leaves, batch)
        elif checked:
            with validation_off():
                step = gradients(self.game, player.name, leaves, batch, self.game_state)
        else:
            step = self.steps(player.name, batch, self.game_state)
        step = self.reduce(step, batch)
        if player.name not in self.unreached:
            named = zip(self.leaves[player.name].items(), step.gradients, strict=True)
            self.unreached[player.name] = {n: p.detach().clone() for (n, p), grad in named if not bool(grad.any())}
        if checked or self.first:
            self._refuse(player, step, batch, buffers)
            if checked and not self._infinite():
                self.kept[player.name] = [p.detach().clone() for p in leaves]
            self.first = False
        self.losses.append((self.count, step.value))
        self.game_state = step.state
        return step

    def _moved(self, player: Player, grads: list[Tensor]) -> None:
        """One update of one player, and what follows it."""
        self.moves.move(player.name, grads)
        if player.after is not None:
            player.after()
        self.game_state = self.game.settle(player.name, self.game_state)
        self.moves.average(player.name)

    def reduce(self, step: Step, batch: Batch) -> Step:
        """The step of the whole batch, from those of the processes that share it: between gradients and optimiser."""
        if self.together is None or batch.share is None:
            return step
        values = [step.value, *step.parts.values(), *step.gradients, *step.state.values()]
        means = iter(self.together.reduced(values, batch.share))
        value, parts = next(means), {name: next(means) for name in step.parts}
        return Step(value, parts, [next(means) for _ in step.gradients], dict(zip(step.state, means, strict=True)))

    def _validated(self, player: Player, leaves: list[Tensor], batch: Batch) -> Step:
        """The first step, with Pyro's checks on: a value they refuse because it is not finite is a non-finite loss."""
        try:
            return gradients(self.game, player.name, leaves, batch, self.game_state)
        except ValueError as error:
            if "invalid values" in str(error) and ("nan" in str(error) or "inf" in str(error)):
                raise self._ended(f"the first step is not finite: {error}") from error
            if where := self._impossible(batch):
                raise self._ended(f"the loss is not finite at step 0: {where}") from error
            raise

    def _refuse(self, player: Player, step: Step, batch: Batch, buffers: list[Any]) -> None:
        """Raise where loss or gradient are not finite, the buffers as they were before."""
        norm = torch.nn.utils.get_total_norm(step.gradients)
        if bool(torch.isfinite(step.value + norm)):
            return
        for module, name, kept in buffers:
            module._buffers[name] = kept
        where = "" if bool(step.value.isfinite()) else self._impossible(batch)
        said = f"the loss is not finite at step {self.count}: {where}" if where else ""
        raise self._ended(said or self._complaint(player, step.value, norm))

    def _impossible(self, batch: Batch) -> str:
        """What a density of zero explains; nothing to a loss that has no density in it."""
        return impossible(self.run.program.model, self.guide, batch) if self.svi.objective.uses_density else ""

    def _ended(self, text: str) -> NonFiniteStepError:
        return NonFiniteStepError(text, self.count)

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

    def check(self) -> None:
        """Where a loss was not finite, or a parameter is not, go back to what was, and raise."""
        if self.bad is not None or self.mark is None:
            return
        failed = self._failed()
        self.losses.clear()
        if failed is None and not self._infinite():
            return
        self.bad = self.mark.failure(self, failed)
        raise self.bad

    def _failed(self) -> int | None:
        """The first of the steps not looked at yet whose loss is not finite."""
        finite = torch.stack([loss for _, loss in self.losses]).isfinite().tolist() if self.losses else []
        return next((step for (step, _), fine in zip(self.losses, finite, strict=True) if not fine), None)

    def _infinite(self) -> list[str]:
        """The names of parameters that are not finite."""
        every = {name: p.detach() for leaves in self.leaves.values() for name, p in leaves.items()}
        norms = torch._foreach_norm(list(every.values())) if every else []
        if not norms or bool(torch.stack([norm.float() for norm in norms]).isfinite().all()):
            return []
        return [name for name, p in every.items() if not bool(p.isfinite().all())]

    def ran_along(self) -> list[str]:
        """The kinds of networks of the program whose statistics, as those of batch norm, moved with the parameters."""
        moved = (
            type(module).__name__
            for module, name, value in self.began
            if value.is_floating_point() and not torch.equal(module._buffers[name], value)  # type: ignore[arg-type]
        )
        return sorted(set(moved))

    def put_back(self) -> None:
        """The parameters before the last update of each player, where steps were checked."""
        with torch.no_grad():
            for name, values in self.kept.items():
                for leaf, value in zip(self.leaves[name].values(), values, strict=True):
                    leaf.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """All that changes from step to step, copied."""
        program = self.run.workspace.snapshot()
        return {
            "count": self.count,
            "params": dict(program.unconstrained),
            "buffers": dict(program.buffers),
            "loose": self.run.workspace.loose_buffers(),
            "modules": {name: copy.deepcopy(m.state_dict()) for name, m in self.game.modules.items()},
            **self.moves.state_dict(),
            "game": {name: value.clone() for name, value in self.game_state.items()},
            "begun": not self.first,
            "unreached": {player: dict(values) for player, values in self.unreached.items()},
            "ended": None if self.bad is None else str(self.bad),
            "path": self.steps.state_dict(),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on where the state of the same run stood that gave ``saved``."""
        self.count, self.mark, self.first = int(saved["count"]), None, not saved["begun"]
        self.bad = None if saved["ended"] is None else NonFiniteStepError(saved["ended"], self.count)
        self.unreached = {player: dict(values) for player, values in saved["unreached"].items()}
        self.losses.clear()
        self.run.workspace.restore(saved["params"], saved["buffers"], saved["loose"])
        if self.together is not None:
            self.together.stale = True
        for name, module in self.game.modules.items():
            module.load_state_dict(saved["modules"][name])
        self.moves.load_state_dict(saved)
        self.game_state = {name: value.clone() for name, value in saved["game"].items()}
        self.steps.load_state_dict(saved["path"])
