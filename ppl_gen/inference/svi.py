"""Stochastic variational inference, and every other game played by gradient steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from ppl_gen.data.batches import Batches
from ppl_gen.errors import IncompatibleError, require_callable, require_positive, require_whole
from ppl_gen.fitting.algorithm import Iterative
from ppl_gen.fitting.run import Info, Outcome, Run
from ppl_gen.fitting.stopping import Plateau
from ppl_gen.inference.guides.begun import Beginning, beginning
from ppl_gen.inference.guides.guide_list import has_own_parts
from ppl_gen.inference.guides.jacobians import check_jacobians
from ppl_gen.inference.guides.moving import refuse_fixed_supports
from ppl_gen.inference.guides.resolved import as_whole, is_auto, refuse_row_parameters, resolved_guide
from ppl_gen.inference.objectives.base import started
from ppl_gen.inference.objectives.elbo import ELBO
from ppl_gen.inference.objectives.game import Game, Setting
from ppl_gen.inference.objectives.plain import as_objective
from ppl_gen.inference.optimisers import OPTIMISERS
from ppl_gen.inference.outcome import outcome_of
from ppl_gen.inference.outside import refuse_rows_outside
from ppl_gen.inference.single_rows import single_rows_told, try_single_row
from ppl_gen.inference.spread import as_shared, refuse_coupled, refuse_undivided, rows_each
from ppl_gen.inference.updates import State
from ppl_gen.inference.whitened import WhitenedAdam
from ppl_gen.program.dry_run import dry_run
from ppl_gen.program.guide_checks import check_masked
from ppl_gen.program.offers import Need, require
from ppl_gen.workspace.isolation import without_side_effects

__all__ = ["SVI"]

_WORTH = 100  # steps: to look for a start evaluates the density some hundred times
_FLAT = Plateau(window=250, tolerance=0.0)  # where the user gave neither steps nor rate: no fall beyond the noise


@dataclass(frozen=True)
class SVI(Iterative):
    """Gradient steps on an objective over model and guide (Hoffman et al. 2013; Ranganath et al. 2014).

    Unlike `pyro.infer.SVI` this is a frozen specification: `pg.fit` runs it, owns the loop and returns a fit.

    Where ``lr``, ``optimiser``, ``schedule`` and ``clip_norm`` are left open, the objective is `ELBO` on all rows, and
    the guide is the default or the class of a normal autoguide of Pyro's over at most 300 continuous latents of a
    program without parameters of its own, a run of 100 steps or more finds settings that arrive: the guide starts at
    the best normal of four quasi-Newton paths (`Pathfinder`), Adam moves it in units of that normal, so that one rate
    fits every program, and the parameters are the mean of the iterates (Dhaka et al. 2020). Without ``steps`` and
    ``epochs`` the run ends when the loss falls no more beyond its noise, after 2000 steps at most. ``fit.notes`` says
    what was chosen. ``start=`` a fit of `Laplace` or `Pathfinder` begins the guide at its normal instead.

    Args:
        objective: an objective of `ppl_gen.inference`, or an instance or class of `pyro.infer.ELBO`.
        steps: updates of the program; give ``steps`` or ``epochs`` (2000 steps if neither).
        epochs: passes over the rows.
        batch_size: rows per batch; None: all rows at every step.
        lr: learning rate, or one per player, ``{"critic": 1e-4}``; when None as said above, else the
            objective's own (usually 1e-3).
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

    subsamples: ClassVar[bool] = True
    spreads: ClassVar[bool] = True
    growing: ClassVar[Sequence[str]] = ("steps", "epochs")

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
            if getattr(self, name) is not None:
                require_callable(name, getattr(self, name))
        named = self.optimiser.values() if isinstance(self.optimiser, Mapping) else [self.optimiser]
        for name in named:
            if isinstance(name, str) and name.lower() not in OPTIMISERS:
                raise ValueError(f"optimiser: expected one of {', '.join(OPTIMISERS)} or a function, got {name!r}")
            if not isinstance(name, str) and name is not None and not callable(name):
                raise TypeError(f"optimiser: expected a name or a function, got {type(name).__name__}")

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
        return Batches(run.data, self.batch_size, run.seed, self.stratify, ranks=run.ranks)

    def stop(self, history: Mapping[str, Sequence[float]]) -> str | None:
        rule = self.stop_rule
        if rule is None and self.steps is None and self.epochs is None and "learning_rate" in history:
            rule = _FLAT
        said: Any = None if rule is None else rule(history)  # whatever the user's function gives
        if said is not None and not isinstance(said, str):
            raise TypeError(f"stop_rule: expected None, or a sentence that says why the run ends, got {said!r}")
        return said

    def stop_every(self) -> int:
        return 50

    def check(self, run: Run) -> None:
        if run.data.streamed is not None:
            require(self.label, (("data plate",),), run.program.name, run.info.offers)
            self.source(run)  # refuses a batch size
        size = run.data.streamed or rows_each(run, self.batch_size)
        if run.data.rows is not None and size is not None and size < run.data.rows:
            with as_shared(run, self.batch_size):
                self._check_minibatches(run, size)

    def _check_minibatches(self, run: Run, size: int) -> None:
        factors = [site.name for site in run.info.select(kind="factor", local=False)]
        if factors:
            raise IncompatibleError(
                f"the pyro.factor(s) {factors} stand outside the data plate, and minibatches would have to scale them "
                "if they hold data and to leave them if not; move them into the plate, or leave batch_size out"
            )
        refuse_rows_outside(run, size)
        local = [site.name for site in run.info.select(local=True) if not site.finite]
        guide = run.program.guide
        if local and self.objective.uses_guide and (guide is None or (is_auto(guide) and not has_own_parts(guide))):
            raise IncompatibleError(
                f"the latent site(s) {local} stand inside the data plate, and an autoguide holds one set of parameters "
                "per row of the data it was set up on: on minibatches rows and parameters would be misaligned. Give an "
                "amortised guide (a network of x), or leave batch_size out."
            )

    def init(self, run: Run) -> State:
        with single_rows_told(run, self.batch_size):
            state = self._made(run)
            try_single_row(run, state.game, state.game_state, self.batch_size)
        return state

    def _made(self, run: Run) -> State:
        guide = resolved_guide(run) if self.objective.uses_guide else None
        # All of it, on every process: what is made and looked at here is the same everywhere.
        first = Batches(run.data, self.batch_size, run.seed, self.stratify)
        size = run.data.streamed or self.batch_size
        whole = run.data.most() if run.data.streamed else first.next() if size is not None else run.data.batch()
        probe = as_whole(whole)
        if guide is not None:
            with without_side_effects():
                fewer, known = (lambda: run.data.head((probe.rows or 2) // 2)), run.info.predicted
                info = dry_run(run.program, probe, guide=guide, fewer=fewer, predicted=known)
                run.info = info.as_tried(run.info)
            computed = [name for name, site in (info.guide_sites or {}).items() if site.likelihood_free]
            refuse_fixed_supports(guide, run.joint, probe, computed, run.program.name)
            check_jacobians(guide, probe)
        if self.objective.uses_guide:
            check_masked(run.info, run.info.guide_sites)
        minibatches = size is not None and run.data.rows is not None and size < run.data.rows
        setting = Setting(run.program, run.joint, guide, run.info, probe, minibatches, run.data)
        refuse_undivided(self.objective, setting, run)
        shared = replace(setting, minibatches=minibatches or not run.ranks.alone)
        with as_shared(run, self.batch_size, lambda: started(self.objective, setting)):
            if shared.minibatches and guide is not None:
                refuse_row_parameters(run, guide, whole)
            game = started(self.objective, shared)
        refuse_coupled(game, run)
        _continue(game, run)
        begins = self._beginning(run, guide, minibatches)
        state = State(self, run, game, guide, probe)
        if begins is not None:
            self._begin(state, begins)
        return state

    @property
    def _open(self) -> bool:
        """Whether the user left open how the parameters of an ELBO move."""
        chosen = (self.lr, self.optimiser, self.schedule, self.clip_norm)
        return self.objective == ELBO(particles=self._particles) and all(choice is None for choice in chosen)

    @property
    def _particles(self) -> int:
        return self.objective.particles if isinstance(self.objective, ELBO) else 1

    def _beginning(self, run: Run, guide: Callable[..., Any] | None, minibatches: bool) -> Beginning | None:
        if guide is None or not run.ranks.alone:
            return None
        whole = not minibatches and not run.data.streamed
        return beginning(run, guide, search=self._open and whole and self.limit(run) >= _WORTH)

    def _begin(self, state: State, begins: Beginning) -> None:
        """Put the guide at its normal, and move it in units of that, unless the user says how it moves."""
        run, params = state.run, list(state.leaves["program"].values())
        run.notes["guide starts"] = begins.said
        if begins.evaluations:
            run.notes["density evaluations"] = f"{begins.evaluations} to find where the guide starts"
        if not self._open:
            begins.place(params)
            return
        state.moves.optimisers["program"] = begins.optimiser(params)
        run.notes["optimiser"] = (
            "Adam in units of the normal that the guide starts at, 0.05 sd a step and falling as 1 / sqrt(step) after "
            "100; the parameters are the mean of the iterates, later ones counted more. lr= or optimiser= replace all "
            "this"
        )

    def step(self, state: State, source: Batches) -> tuple[State, Info]:
        optimiser = state.moves.optimisers.get("program")
        if isinstance(optimiser, WhitenedAdam):
            rate = optimiser.rate
            return state, {**state.step(source), "learning_rate": rate}
        return state, state.step(source)

    def state_dict(self, state: State) -> dict[str, Any]:
        state.check()  # what is kept is finite: the steps before it cannot be made again
        return state.state_dict()

    def load_state_dict(self, state: State, saved: Mapping[str, Any]) -> State:
        state.load_state_dict(saved)
        return state

    def outcome(self, state: State, run: Run) -> Outcome:
        state.check()
        return outcome_of(self.objective, state, run)


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
            run.notes[f"{name} starts"] = "new: its parameters differ in names or shapes from the earlier fit's"
