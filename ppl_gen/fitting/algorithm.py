"""The contract between the driver and an algorithm."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from ppl_gen.data.batches import Batches
from ppl_gen.fitting.loop import iterate
from ppl_gen.fitting.run import Info, Outcome, Run
from ppl_gen.program.offers import Need

__all__ = ["Algorithm", "Iterative"]


class Algorithm(ABC):
    """A learning procedure: what it needs of a program, and how it runs.

    An algorithm is a frozen dataclass of its settings. One that owns its loop (NUTS) implements `run`; one that
    moves step by step derives from `Iterative` instead and leaves the loop to the driver.
    """

    #: The dtype asked for when neither data nor user say otherwise.
    dtype: ClassVar[torch.dtype | None] = None

    #: Whether it runs plates with a ``subsample_size`` as they are written; for all others they are whole.
    subsamples: ClassVar[bool] = False

    #: Settings that a run may be given more of when it goes on from its checkpoint; all others must be as they were.
    growing: ClassVar[Sequence[str]] = ()

    #: Settings that change no number of the fit.
    idle: ClassVar[Sequence[str]] = ()

    #: Whether a vector outside of every plate is read as one draw, as if it ended in ``.to_event(1)``.
    vectors: ClassVar[bool] = False

    #: Whether several processes can learn together (``fit(..., fabric=)``): batches are then shares of batches, and a
    #: step makes the same of them everywhere, by ``run.ranks.all_reduce``, weighed by ``batch.share.weight``.
    spreads: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """The name in tables and messages."""
        return type(self).__name__

    @property
    @abstractmethod
    def needs(self) -> Sequence[Need]:
        """What a program must offer; each need is a group of offers any of which will do."""

    @property
    def resumable(self) -> bool:
        """Whether a run can be kept and gone on with: whether it writes to ``run.checkpoint`` and reads from it."""
        return False

    def check(self, run: Run) -> None:
        """Refuse, before anything changes, what `needs` cannot express. The default accepts."""
        return None

    @abstractmethod
    def run(self, run: Run) -> Outcome:
        """Learn ``run.program`` from ``run.data``."""

    def outline(self, run: Run) -> Outcome:
        """The outcome before any step, into which `pg.load` puts what was saved: its guide, networks and posterior.

        Raises:
            NotImplementedError: for an algorithm that owns its loop and does not implement it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement outline(run)")


class Iterative(Algorithm):
    """An algorithm that moves in steps; the driver owns the loop.

    A complete toy, averaging the data by stochastic approximation:

    >>> from dataclasses import dataclass
    >>> import ppl_gen as pg, pyro, pyro.distributions as dist
    >>> from ppl_gen.extending import PointPosterior
    >>> @dataclass(frozen=True)
    ... class RunningMean(Iterative):
    ...     steps: int = 200
    ...     needs = (("data plate",),)
    ...     def init(self, run):
    ...         return torch.zeros(()), 0
    ...     def step(self, state, source):
    ...         mean, count = state
    ...         x = source.next().args[0]
    ...         mean = mean + (x.mean() - mean) / (count + 1)
    ...         return (mean, count + 1), {"mean": mean}
    ...     def limit(self, run):
    ...         return self.steps
    ...     def outcome(self, state, run):
    ...         return Outcome(PointPosterior({"loc": state[0]}))
    >>> def model(x):
    ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
    >>> fit = pg.fit(model, torch.arange(5.0), RunningMean(), seed=0)
    >>> float(fit.posterior(draws=1)["loc"])
    2.0
    """

    @abstractmethod
    def init(self, run: Run) -> Any:
        """The state before the first step."""

    @abstractmethod
    def step(self, state: Any, source: Batches) -> tuple[Any, Info]:
        """One step: the next state, and what the history keeps."""

    @abstractmethod
    def limit(self, run: Run) -> int:
        """How many steps at most."""

    @abstractmethod
    def outcome(self, state: Any, run: Run) -> Outcome:
        """The result at ``state``; called at the end, on an interrupt and for a validation yardstick."""

    def state_dict(self, state: Any) -> dict[str, Any]:
        """All of ``state`` that changes from step to step, copied: tensors, numbers, words, and mappings of these.

        Raises:
            NotImplementedError: for an algorithm that does not implement it: its runs cannot be moved or resumed.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement state_dict(state)")

    def load_state_dict(self, state: Any, saved: Mapping[str, Any]) -> Any:
        """``state``, as `init` makes it for the same run, at what `state_dict` gave: the run goes on from there."""
        raise NotImplementedError(f"{type(self).__name__} does not implement load_state_dict(state, saved)")

    @property
    def resumable(self) -> bool:
        own = type(self)
        return own.state_dict is not Iterative.state_dict and own.load_state_dict is not Iterative.load_state_dict

    def source(self, run: Run) -> Batches:
        """Where batches come from: the whole data unless the algorithm says otherwise."""
        return Batches(run.data, None, run.seed, ranks=run.ranks)

    def stop(self, history: Mapping[str, Sequence[float]]) -> str | None:
        """A pure function of the history: the sentence that says why it has converged, or None."""
        return None

    @property
    def endless(self) -> bool:
        """Whether only the number of steps ends a run, with these settings, so that to make them all is no failure."""
        return False

    def stop_every(self) -> int:
        """Ask `stop` and synchronise with the device once in so many steps."""
        return 1

    def outline(self, run: Run) -> Outcome:
        """The outcome at the first state."""
        return self.outcome(self.init(run), run)

    def run(self, run: Run) -> Outcome:
        """The driver's loop over `init` and `step`."""
        return iterate(self, run)
