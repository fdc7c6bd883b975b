"""Marks to go back to in a run by gradients, where a loss that is not finite is seen some steps late."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ppl_gen.data.batches import Batches
from ppl_gen.errors import PROGRAM_ERRORS
from ppl_gen.fitting.run import NonFiniteStepError
from ppl_gen.workspace.isolation import generators, set_generators

if TYPE_CHECKING:
    from ppl_gen.inference.updates import State

__all__ = ["Mark"]

NEAR, FAR = 50, 500  # steps between two marks: as many as were made, between these


class Mark:
    """A copy of all that changes from step to step: parameters, buffers, optimisers, order of rows, generators."""

    def __init__(self, state: State, source: Batches) -> None:
        self.count, self.source = state.count, source
        self.state, self.rows, self.numbers = state.state_dict(), source.state_dict(), generators()
        self.buffers = state.run.workspace.buffers()

    def is_due(self, count: int) -> bool:
        """Whether it is time for the next mark."""
        return count - self.count >= min(FAR, max(NEAR, self.count))

    def _go_back(self, state: State) -> None:
        path = state.steps.state_dict()
        state.load_state_dict(self.state)
        state.steps.load_state_dict(path)  # which path ran is a fact about the run, and no part of where it stands
        for module, name, kept in self.buffers:
            module._buffers[name] = kept.clone()
        self.source.load_state_dict(self.rows)
        set_generators(self.numbers)
        state.kept = {}

    def failure(self, state: State, failed: int | None) -> FloatingPointError:
        """The error of the first step that is not finite; the state goes to the last parameters known to be finite.

        The steps since the mark are made again, checked. A program that remembers what it did may come elsewhere this
        time: then ``failed``, the step whose loss was not finite, says where the run ended.
        """
        last = state.count
        self._go_back(state)
        end = last if failed is None else failed
        try:
            while state.count < end:
                state.round(self.source, checked=True)
            if failed is not None:
                buffers = state.run.workspace.buffers()
                state.round(self.source, checked=True)
                for module, name, kept in buffers:  # it is finite this time, and does not count
                    module._buffers[name] = kept
        except NonFiniteStepError as error:
            state.put_back()
            return error
        except PROGRAM_ERRORS:
            pass  # reached another way than the first time
        bad = state._infinite()
        state.put_back()
        if failed is not None:
            return NonFiniteStepError(
                f"the loss is not finite at step {failed}; it was finite when it was made again", failed
            )
        names = ", ".join(bad) or "a parameter"
        return NonFiniteStepError(
            f"the update of step {last} made {names} infinite or NaN. Try a smaller lr or clip_norm=", last
        )
