"""Stochastic variational inference, and every other game played by gradient steps."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide, AutoNormal, init_to_feasible, init_to_value
from torch import Tensor

from ppl_gen.data.batching import Batch, Batches
from ppl_gen.dryrun import dry_run
from ppl_gen.errors import IncompatibleError, require_positive, require_whole
from ppl_gen.inference.base import Info, Iterative, Outcome, Run
from ppl_gen.inference.objectives.base import Game, Player, Setting, started
from ppl_gen.inference.objectives.elbo import ELBO
from ppl_gen.inference.objectives.plain import as_objective
from ppl_gen.isolation import ProgramState, copied, looking, quiet, revived
from ppl_gen.offers import Need
from ppl_gen.posterior import GuidePosterior, PointPosterior
from ppl_gen.program import filtered

__all__ = ["SVI", "gradients", "resolved_guide"]

_OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adamax": torch.optim.Adamax,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
}


@dataclass(frozen=True)
class SVI(Iterative):
    """Gradient steps on an objective over model and guide (Hoffman et al. 2013; Ranganath et al. 2014).

    Unlike `pyro.infer.SVI` this is a frozen specification: `pg.fit` runs it, owns the loop and returns a fit.

    Args:
        objective: an objective of `ppl_gen.inference`, or an instance or class of `pyro.infer.ELBO`.
        steps: updates of the program; give ``steps`` or ``epochs`` (2000 steps if neither).
        epochs: passes over the rows.
        batch_size: rows per batch; None: all rows at every step.
        lr: learning rate, or one per player, ``{"critic": 1e-4}``; the objective's own (usually 1e-3) when None.
        optimiser: ``"adam"``, ``"adamw"``, ``"adamax"``, ``"rmsprop"``, ``"sgd"``, or ``f(params) -> Optimizer``; or
            one per player. One optimiser holds all parameters of a player, fused where torch has a fused kernel.
        schedule: ``f(optimizer) -> torch.optim.lr_scheduler.LRScheduler``, stepped once per update.
        clip_norm: bound on the global norm of a player's gradient.
        stop_rule: a pure function ``history -> sentence or None`` that ends the run: `Plateau()`, `Patience()`, yours.
        stratify: name of an integer entry: every batch holds its share of each value (partly labelled data).

    Raises:
        ValueError: for settings out of range, or both ``steps`` and ``epochs``.

    Example:
        >>> SVI(steps=100, lr=0.01).limit_steps(per_epoch=1)
        100
    """

    objective: Any = field(default_factory=ELBO)
    steps: int | None = None
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | Mapping[str, float] | None = None
    optimiser: Any = None
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None
    clip_norm: float | None = None
    stop_rule: Callable[[Mapping[str, Sequence[float]]], str | None] | None = None
    stratify: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "objective", as_objective(self.objective))
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        for name in ("steps", "epochs", "batch_size"):
            if (value := getattr(self, name)) is not None:
                require_whole(name, value)
        rates = self.lr.values() if isinstance(self.lr, Mapping) else [] if self.lr is None else [self.lr]
        for rate in rates:
            require_positive("lr", rate)
        if self.clip_norm is not None:
            require_positive("clip_norm", self.clip_norm)
        for name in ("schedule", "stop_rule"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise TypeError(f"{name}: expected a function, got {type(getattr(self, name)).__name__}")
        named = self.optimiser.values() if isinstance(self.optimiser, Mapping) else [self.optimiser]
        for name in named:
            if isinstance(name, str) and name.lower() not in _OPTIMISERS:
                raise ValueError(f"optimiser: expected one of {', '.join(_OPTIMISERS)} or a function, got {name!r}")

    @property
    def label(self) -> str:
        return f"SVI({self.objective.label})"

    @property
    def needs(self) -> Sequence[Need]:
        return (*self.objective.needs, *((("data plate",),) if self.batch_size is not None else ()))

    def limit_steps(self, per_epoch: int) -> int:
        """Updates of the program in all."""
        return self.epochs * per_epoch if self.epochs is not None else self.steps or 2000

    def limit(self, run: Run) -> int:
        return self.limit_steps(self.source(run).per_epoch)

    def source(self, run: Run) -> Batches:
        return Batches(run.data, self.batch_size, run.seed, self.stratify)

    def stop(self, history: Mapping[str, Sequence[float]]) -> str | None:
        return self.stop_rule(history) if self.stop_rule is not None else None

    def stop_every(self) -> int:
        return 50

    def check(self, run: Run) -> None:
        size = self.batch_size
        if run.data.rows is None or size is None or size >= run.data.rows:
            return
        factors = [site.name for site in run.info.select(kind="factor", local=False)]
        if factors:
            raise IncompatibleError(
                f"the pyro.factor(s) {factors} stand outside the data plate, and minibatches would have to scale them "
                "if they hold data and to leave them if not; move them into the plate, or leave batch_size out"
            )
        local = [site.name for site in run.info.select(local=True) if not site.finite]
        guide = run.program.guide
        if local and self.objective.uses_guide and (guide is None or _is_auto(guide)):
            raise IncompatibleError(
                f"the latent site(s) {local} stand inside the data plate, and an autoguide holds one set of parameters "
                "per row of the data it was set up on: on minibatches rows and parameters would be misaligned. Give an "
                "amortised guide (a network of x), or leave batch_size out."
            )

    def init(self, run: Run) -> _State:
        guide = resolved_guide(run) if self.objective.uses_guide else None
        run.guide = guide
        whole = self.source(run).next() if self.batch_size is not None else run.data.batch()
        probe = _as_whole(whole)
        if guide is not None:
            with looking():
                run.info = dry_run(run.program, probe, guide=guide)
        minibatches = self.batch_size is not None and run.data.rows is not None and self.batch_size < run.data.rows
        if minibatches and guide is not None:
            _refuse_row_parameters(run, guide, whole)
        setting = Setting(run.program, run.program.model, guide, run.info, probe, minibatches)
        game = started(self.objective, setting)
        _continue(game, run)
        return _State(self, run, game, guide, probe)

    def step(self, state: _State, source: Batches) -> tuple[_State, Info]:
        info: dict[str, Tensor | float] = {}
        for player in state.game.players:
            for _ in range(player.updates):
                info.update(state.update(player, source.next()))
        state.count += 1
        return state, info

    def outcome(self, state: _State, run: Run) -> Outcome:
        run.notes.update(state.game.notes)
        state.check_finite()
        values = state.rolled_back() if state.bad else state.run.workspace.snapshot()
        posterior = PointPosterior() if state.guide is None else GuidePosterior(state.guide)
        evaluations = sum(p.updates for p in state.game.players) * state.count
        return Outcome(
            posterior,
            values,
            modules=copy.deepcopy(dict(state.game.modules)),  # the workspace puts back what it finds on exit
            cost={"gradient_evaluations": evaluations},
            guide=state.guide,
        )


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


class _State:
    """Optimisers, schedules and the game of one run, with the last parameters whose loss was finite."""

    def __init__(self, svi: SVI, run: Run, game: Game, guide: Callable[..., Any] | None, probe: Batch) -> None:
        self.svi, self.run, self.game, self.guide = svi, run, game, guide
        self.count, self.bad, self.first = 0, False, True
        runs = [partial(run.program.model, *probe.args, **probe.kwargs)]
        if guide is not None:
            runs.append(partial(guide, *probe.args, **probe.kwargs))
        leaves = run.workspace.collect(*runs)
        run.workspace.others.extend(game.modules.values())
        self._check_players()
        self.leaves = {player.name: self._owned(player, leaves) for player in game.players}
        self.optimisers = {p.name: self._optimiser(p) for p in game.players if self.leaves[p.name]}
        self.schedules = {n: svi.schedule(o) for n, o in self.optimisers.items() if svi.schedule is not None}
        self.kept = {name: [p.detach().clone() for p in ps.values()] for name, ps in self.leaves.items()}
        if not self.leaves["program"]:
            raise IncompatibleError(
                f"{svi.label} has nothing to learn in {run.program.name!r}: neither model nor guide has parameters"
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
            built = _OPTIMISERS[kind](params, lr=rate or 1e-3, **fused)
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
        norm = torch.nn.utils.get_total_norm(grads)
        if not bool(torch.isfinite(value + norm)):
            self.bad = True
            for module, name, kept in buffers:
                module._buffers[name] = kept
            raise FloatingPointError(self._complaint(player, value, norm))
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
            raise

    def _complaint(self, player: Player, value: Tensor, norm: Tensor) -> str:
        bad = [n for n, p in self.leaves[player.name].items() if not bool(p.isfinite().all())]
        what = "loss" if not bool(value.isfinite()) else "gradient"
        where = f"; parameters already non-finite: {', '.join(bad)}" if bad else ""
        return (
            f"the {what} of player {player.name!r} is not finite at step {self.count} (loss {float(value):g}, gradient "
            f"norm {float(norm):g}){where}. Try a smaller lr, clip_norm=, or a prior that keeps scales off zero"
        )

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


def _is_auto(guide: Any) -> bool:
    return isinstance(guide, AutoGuide) or (isinstance(guide, type) and issubclass(guide, AutoGuide))


def _continue(game: Game, run: Run) -> None:
    """Networks of the game go on from those of the fit to continue from, unless they are of another shape."""
    earlier = run.start.extra_modules if run.start is not None else {}
    for name, module in game.modules.items():
        if name not in earlier:
            continue
        old, new = earlier[name].state_dict(), module.state_dict()
        if {k: v.shape for k, v in old.items()} == {k: v.shape for k, v in new.items()}:
            module.load_state_dict(old)
            run.notes[f"{name} starts"] = "from the fit that is continued"
        else:
            run.notes[f"{name} starts"] = "afresh: its parameters differ in names or shapes from the earlier fit's"


def _refuse_row_parameters(run: Run, guide: Callable[..., Any], batch: Batch) -> None:
    """A guide with one set of parameters per row of a batch would share them among all rows: run it on fewer rows."""
    local = [n for n, s in (run.info.guide_sites or {}).items() if s.local and not s.likelihood_free]
    if not local or batch.rows is None or batch.rows < 3 or batch.index is None:
        return
    fewer = run.data.batch(batch.index[:-1])
    try:
        with looking():
            trace = poutine.trace(guide).get_trace(*fewer.args, **fewer.kwargs)
        frames = [f for n in local if n in trace for f in trace.nodes[n]["cond_indep_stack"]]
        sizes = {f.size for f in frames if f.name == run.info.data_plate}
        if sizes == {fewer.rows}:
            return
    except (RuntimeError, ValueError, IndexError):
        pass
    raise IncompatibleError(
        f"the guide's site(s) {local} cannot follow a batch of another size: it seems to hold parameters for each of "
        f"{batch.rows} rows, which minibatches would share among all {run.data.rows}. Give an amortised guide (a "
        "network of x), parameters that are picked by a row number in the data, or leave batch_size out."
    )


def _as_whole(batch: Batch) -> Batch:
    return Batch(batch.args, batch.kwargs, batch.rows, batch.rows, batch.index)


def resolved_guide(run: Run) -> Callable[..., Any] | None:
    """The user's guide; an autoguide class or instance made afresh for this fit; AutoNormal when there is none."""
    guide, info = run.program.guide, run.info
    if not info.select():
        return None
    if run.start is not None and run.start.guide is not None:
        return run.start.guide
    hidden = [name for name in info.finite_latents]
    if guide is None or (isinstance(guide, type) and issubclass(guide, AutoGuide)):
        continuous = [site.name for site in info.select() if site.name not in hidden]
        if not continuous:
            return None
        kind = guide or AutoNormal
        run.notes["guide"] = f"{kind.__name__} over {', '.join(continuous)}" + ("" if guide else " (default)")
        model = poutine.block(run.program.model, expose=continuous)
        start = run.starting_values()
        if start and "init_loc_fn" in inspect.signature(kind).parameters:
            return kind(model, init_loc_fn=init_to_value(values=start, fallback=init_to_feasible))
        return kind(model)
    if isinstance(guide, AutoGuide):
        return revived(copied(guide), poutine.block(run.program.model, hide=hidden))
    if isinstance(guide, torch.nn.Module):
        return guide
    return filtered(guide)
