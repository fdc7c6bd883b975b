"""What one run of an algorithm works with, and what it hands back."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppl_gen.data.batching import Dataset
from ppl_gen.fitting.posteriors.base import Posterior, checked
from ppl_gen.program.info import ProgramInfo
from ppl_gen.program.program import Program
from ppl_gen.runtime.ranks import ALONE, Ranks
from ppl_gen.workspace.workspace import ProgramState, Workspace

if TYPE_CHECKING:
    from ppl_gen.fits.result import Fit
    from ppl_gen.fitting.checkpoint import Checkpoint

__all__ = ["Ending", "Info", "NonFiniteStepError", "Outcome", "Run", "Status"]


#: What one step reports: named scalars for the history (tensors are not synchronised until they are read).
Info = Mapping[str, Tensor | float]


class Status(enum.StrEnum):
    """How a run ended."""

    CONVERGED = "converged"
    FINISHED = "finished"
    STOPPED = "stopped"
    INTERRUPTED = "interrupted"
    DIVERGED = "diverged"
    FAILED = "failed"
    INCOMPATIBLE = "incompatible"  # of a row of a comparison: what does not fit makes no fit


@dataclass(frozen=True)
class Ending:
    """How a run ended, and the sentence that says why.

    >>> Ending("converged", "it is the mean").status
    <Status.CONVERGED: 'converged'>
    """

    status: Status | str
    message: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "status", Status(self.status))


class NonFiniteStepError(FloatingPointError):
    """A loss, gradient or parameter that is not finite; ``steps`` were finite before it."""

    def __init__(self, text: str, steps: int) -> None:
        super().__init__(text)
        self.steps = steps


@dataclass
class Run:
    """Everything one fit works with. Made by the driver; algorithms read it and write `notes`.

    ``joint`` is the model to be learned, ``data.batch()`` all rows as its arguments, ``info`` the table of its sites.
    ``workspace`` holds Pyro's parameters: ``workspace.collect(call, ...)`` makes those of calls of model and guide and
    gives them by name, ``workspace.snapshot()`` is the state for the `Outcome`. ``progress(done, total, text)``, if it
    is not None, moves the bar. Randomness and parameter store are the run's own.

    >>> from dataclasses import dataclass
    >>> import ppl_gen as pg, pyro, pyro.distributions as dist
    >>> from ppl_gen.inference import Algorithm
    >>> from ppl_gen.extending import PointPosterior
    >>> @dataclass(frozen=True)
    ... class AtTheMean(Algorithm):
    ...     needs = (("data plate",),)
    ...     def run(self, run):
    ...         run.notes["rows"] = str(run.data.rows)
    ...         return Outcome(PointPosterior({"loc": run.data.batch().args[0].mean()}))
    >>> def model(x):
    ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
    >>> fit = pg.fit(model, torch.arange(5.0), AtTheMean())
    >>> fit.notes["rows"], float(fit.point["loc"])
    ('5', 2.0)
    """

    program: Program
    data: Dataset
    info: ProgramInfo
    workspace: Workspace
    seed: int
    start: Fit | None = None
    progress: Callable[[int, int, str], None] | None = None
    notes: dict[str, str] = field(default_factory=dict)
    resolved: Callable[..., Any] | None = None  # the guide that a program alone leads to
    hooks: Sequence[Callable[[int, Info], None]] = ()
    validation: Any = None
    ranks: Ranks = ALONE  # the processes that learn together
    checkpoint: Checkpoint | None = None
    compile: str | bool = "auto"

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype or torch.get_default_dtype()

    @property
    def joint(self) -> Callable[..., Any]:
        """The program's model as a density of what is to be learned."""
        from ppl_gen.program.unlearned import joint

        return joint(self.program.model, self.info)

    def starting_values(self) -> dict[str, Tensor]:
        """Plausible values of latent sites: those of the fit to continue from, else the program's own."""
        centre = None if self.start is None else self.start.learned.centre(self.data.most())
        if centre is not None:
            return {name: value.detach().clone() for name, value in centre.items()}
        if self.program.start is None:
            return {name: value.clone() for name, value in self.info.inside.items()}
        return {name: torch.as_tensor(value, dtype=self.dtype) for name, value in self.program.start().items()}


@dataclass
class Outcome:
    """What an algorithm hands back to the driver, which makes the `Fit` of it.

    ``posterior``: what was learned. ``state``: parameters, from ``run.workspace.snapshot()``; ``guide``: the guide at
    them, where there is one; that of the posterior, unless it is given. ``ending``: how the run ended and why, such as
    ``Ending("converged", "...")``; where it is left out, it made all its steps. ``history``: name -> one number per
    step. ``cost``: counts, such as "steps".

    >>> from ppl_gen.extending import PointPosterior
    >>> outcome = Outcome(PointPosterior({"loc": torch.zeros(())}), ending=Ending("converged", "it is the mean"))
    >>> outcome.ending.message
    'it is the mean'
    """

    posterior: Posterior
    state: ProgramState = field(default_factory=ProgramState)
    modules: Mapping[str, torch.nn.Module] = field(default_factory=dict)
    ending: Ending | None = None
    history: Mapping[str, Sequence[float]] = field(default_factory=dict)
    checks: Mapping[str, Sequence[float]] = field(default_factory=dict)
    cost: Mapping[str, float | str] = field(default_factory=dict)
    guide: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        learned = checked(self.posterior)
        if self.guide is None:
            self.guide = learned.proposal
