"""What a run by gradients has learned: the numbers, the posterior, and what the notes have to say of them."""

from __future__ import annotations

from dataclasses import replace

from pyro.infer.autoguide import AutoLaplaceApproximation

from ppl_gen.fitting.posteriors.guides import GuidePosterior
from ppl_gen.fitting.posteriors.points import PointPosterior
from ppl_gen.fitting.run import Ending, Outcome, Run
from ppl_gen.inference.guides.laplace import LaplaceGuide, second_stage
from ppl_gen.inference.guides.normals import kept_buffers
from ppl_gen.inference.objectives.base import Objective
from ppl_gen.inference.objectives.game import Setting
from ppl_gen.inference.updates import State
from ppl_gen.inference.whitened import WhitenedAdam
from ppl_gen.nn.copies import plain_copy
from ppl_gen.program.dry_run import dry_run
from ppl_gen.workspace.isolation import without_side_effects
from ppl_gen.workspace.workspace import ProgramState

__all__ = ["outcome_of"]


def outcome_of(objective: Objective, state: State, run: Run) -> Outcome:
    """The outcome of a run whose steps were all looked at; the notes are added to those of the run."""
    _note(objective, state, run)
    values = _averaged(state, state.run.workspace.snapshot())
    guide, failed = state.guide, None
    if isinstance(guide, AutoLaplaceApproximation) and state.bad is None:
        try:
            guide, values = _curved(guide, values, run)
        except ValueError as error:
            failed = str(error)
    posterior = PointPosterior() if guide is None else GuidePosterior(guide)
    evaluations = sum(p.updates for p in state.game.players) * state.count
    return Outcome(
        posterior,
        values,
        # Copies, as the workspace puts back what it finds on exit.
        modules={name: plain_copy(module) for name, module in state.game.modules.items()},
        cost={"gradient_evaluations": evaluations, **state.steps.cost()},
        guide=guide,
        ending=None if failed is None else Ending("failed", failed),
    )


def _note(objective: Objective, state: State, run: Run) -> None:
    """What the user is told of the game, and of parameters that did not move."""
    run.notes.update(state.game.notes)
    if state.game.advice:
        run.notes["if modes are missing"] = state.game.advice
    if len(state.game.players) > 1:
        run.notes["objective"] = objective.call
    if unmoved := state.unmoved():
        more = f" and {len(unmoved) - 5} more" if len(unmoved) > 5 else ""
        run.notes["not moved"] = (
            f"{', '.join(unmoved[:5])}{more}: no gradient of the loss reaches them, as behind .detach(), .item() "
            "or a comparison"
        )
    if not objective.uses_density:
        run.notes["game"] = f"{objective.label} does not use the density: look at samples, not at the loss"


def _averaged(state: State, values: ProgramState) -> ProgramState:
    """The learned numbers, at the mean of the iterates where the player or its optimiser averages them."""
    average = state.moves.averages.get("program")
    if average is not None and average.count and state.bad is None:
        if ran_along := state.ran_along():
            state.run.notes["averaging"] = (
                f"none: {', '.join(ran_along)} kept running averages of what the last parameters made, and these do "
                "not belong to an average of parameters"
            )
            return values
        state.run.notes["averaging"] = f"the parameters are an average of the iterates, its decay {average.decay:g}"
        moved = dict(zip(state.leaves["program"], average.values, strict=True))
        mean = {name: moved[first].clone() for name, first in state.movers.items()}
        return replace(values, unconstrained={**values.unconstrained, **mean})
    optimiser = state.moves.optimisers.get("program")
    if not isinstance(optimiser, WhitenedAdam) or not optimiser.count or state.bad is not None:
        return values
    mean = dict(zip(state.leaves["program"], optimiser.averaged(), strict=True))
    return replace(values, unconstrained={**values.unconstrained, **mean})


def _curved(guide: AutoLaplaceApproximation, values: ProgramState, run: Run) -> tuple[LaplaceGuide, ProgramState]:
    """The second stage of a Laplace approximation, its numbers beside those that were learned."""
    batch = run.data.batch()
    made = second_stage(Setting(run.program, run.joint, guide, run.info, batch), batch)
    with without_side_effects():
        run.info = dry_run(run.program, batch, guide=made, predicted=run.info.predicted)
    run.notes["second stage"] = "a normal at the optimum, its covariance the inverse Hessian of -log p(x, z)"
    return made, replace(values, buffers={**values.buffers, **kept_buffers(made)})
