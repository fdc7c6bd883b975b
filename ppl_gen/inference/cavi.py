"""Coordinate ascent variational inference, where the program offers its updates in closed form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import constraints, transform_to

from ppl_gen.data.batches import Batches
from ppl_gen.errors import require_number, require_whole
from ppl_gen.fitting.algorithm import Iterative
from ppl_gen.fitting.posteriors.guides import GuidePosterior
from ppl_gen.fitting.run import Info, Outcome, Run
from ppl_gen.program.offers import Need
from ppl_gen.workspace.workspace import ProgramState

__all__ = ["CAVI"]

# A fall of the ELBO by more than this share of itself is no rounding error (sums of 1e6 terms err by less than 1e-10).
_LARGEST_FALL = 1e-8


@dataclass(frozen=True)
class CAVI(Iterative):
    r"""Coordinate ascent in the mean field of a conjugate program: one factor after the other at its optimum.

    .. math:: \log q_j(\theta_j) = E_{q_{-j}}[\log p(x, \theta)] + \text{const}

    Each step raises the ELBO, recorded in total nats as ``history["elbo"]``. Works in float64, on the whole data.

    A mean field leaves out the correlations between its factors: its standard deviations are too small, by a factor of
    three to five for the means of overlapping mixture components. Use NUTS where the spread of the posterior matters.

    Args:
        steps: at most so many sweeps over all factors.
        tolerance: converged when a sweep raises the ELBO by less than this share of it; 0 runs all steps.

    Raises:
        ValueError: for settings out of range.
        IncompatibleError: from `pg.fit`, if the program does not offer CAVI updates.
        ArithmeticError: from `pg.fit`, if the ELBO falls: then the program's updates do not belong to one bound.
        NonFiniteError: from `pg.fit`, if the ELBO is infinite or NaN.

    References:
        Pattern Recognition and Machine Learning, chapter 10 (Bishop, 2006).
        Variational inference: a review for statisticians (Blei, Kucukelbir and McAuliffe, 2017).

    Example:
        >>> import torch, ppl_gen as pg
        >>> from ppl_gen.inference.cavi import CAVI
        >>> from ppl_gen.models import gaussian_mixture
        >>> x = torch.cat([torch.linspace(-3.0, -1.0, 20), torch.linspace(2.0, 3.0, 30)])
        >>> result = pg.fit(gaussian_mixture(components=2), x, CAVI(), seed=0)
        >>> str(result.status), bool((result.history["elbo"].diff("step") >= -1e-9).all())
        ('converged', True)
    """

    steps: int = 2000
    tolerance: float = 1e-10

    dtype: ClassVar[torch.dtype | None] = torch.float64
    growing: ClassVar[Sequence[str]] = ("steps",)

    def __post_init__(self) -> None:
        require_whole("steps", self.steps)
        require_number("tolerance", self.tolerance, 0.0, 1.0, "a number from 0 up to 1")

    @property
    def needs(self) -> Sequence[Need]:
        return (("CAVI updates",),)

    def init(self, run: Run) -> _State:
        """The program's own start, or the parameters of the fit to continue from."""
        updates = run.program.cavi
        assert updates is not None  # needs
        batch = run.data.batch()
        with torch.no_grad():
            parameters = updates.init(*batch.args, **batch.kwargs)
        earlier = run.start.state.params if run.start is not None else {}
        if earlier.keys() >= parameters.keys():
            parameters = {name: earlier[name].to(value) for name, value in parameters.items()}
        return _State(updates.step, parameters)

    def step(self, state: _State, source: Batches) -> tuple[_State, Info]:
        batch = source.next()
        with torch.no_grad():
            parameters, bound = state.update(state.parameters, *batch.args, **batch.kwargs)
        elbo, count = float(bound), state.count + 1
        if not torch.isfinite(bound) or not all(bool(value.isfinite().all()) for value in parameters.values()):
            raise FloatingPointError(f"the ELBO or a variational parameter is not finite at step {count} (ELBO {elbo})")
        if elbo < state.elbo - _LARGEST_FALL * max(1.0, abs(elbo)):
            raise ArithmeticError(
                f"the ELBO fell from {state.elbo:.10g} to {elbo:.10g} at step {count}: the program's CAVI updates do "
                "not maximise one bound. Check its step() against the log joint density of the model"
            )
        return _State(state.update, parameters, elbo, count), {"elbo": elbo}

    def state_dict(self, state: _State) -> dict[str, Any]:
        parameters = {name: value.clone() for name, value in state.parameters.items()}
        return {"parameters": parameters, "elbo": state.elbo, "count": state.count}

    def load_state_dict(self, state: _State, saved: Mapping[str, Any]) -> _State:
        parameters = {name: value.clone() for name, value in saved["parameters"].items()}
        return _State(state.update, parameters, float(saved["elbo"]), int(saved["count"]))

    def limit(self, run: Run) -> int:
        return self.steps

    def stop(self, history: Mapping[str, Sequence[float]]) -> str | None:
        values = history["elbo"]
        if len(values) < 2 or self.tolerance == 0:
            return None
        gain, threshold = float(values[-1]) - float(values[-2]), self.tolerance * max(1.0, abs(float(values[-1])))
        if not gain < threshold:
            return None
        return f"a sweep raised the ELBO by less than {threshold:.1e} nats, after {len(values)} steps"

    def outcome(self, state: _State, run: Run) -> Outcome:
        updates = run.program.cavi
        assert updates is not None
        known = {name: updates.constraints.get(name, constraints.real) for name in state.parameters}
        unconstrained = {
            name: transform_to(known[name]).inv(value).detach().clone() for name, value in state.parameters.items()
        }
        run.notes["spread"] = "mean field: standard deviations are too small where factors are correlated"
        return Outcome(GuidePosterior(updates.guide), ProgramState(unconstrained, known), guide=updates.guide)


@dataclass(frozen=True)
class _State:
    """Variational parameters in the program's own units, and the bound at them."""

    update: Callable[..., Any]
    parameters: Mapping[str, Tensor]
    elbo: float = -float("inf")
    count: int = 0
