"""Expectation-maximisation for any program whose local latent sites are finite, or that offers its own steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ppl_gen.arguments import require_choice
from ppl_gen.data.batches import Batches
from ppl_gen.errors import IncompatibleError, require_flag, require_number, require_whole
from ppl_gen.fitting.algorithm import Iterative
from ppl_gen.fitting.posteriors.points import PointPosterior
from ppl_gen.fitting.run import Ending, Info, Outcome, Run
from ppl_gen.inference.em.expectation import Expectation, Problem
from ppl_gen.inference.em.maximisation import Maximiser
from ppl_gen.inference.em.starts import TRIAL_STEPS, advanced, candidates, first_values
from ppl_gen.program.offers import Need
from ppl_gen.workspace.isolation import isolated

__all__ = ["EM"]

_MODES = ("auto", "offered", "derived", "gradient")
# Starts tried where the program has none of its own; one where it has.
_STARTS = 5
# Sums over rows agree to a few units in the last place of their terms; a larger fall is a fall.
_ROUNDING = 256


@dataclass(frozen=True)
class EM(Iterative):
    r"""Expectation-maximisation: maximum likelihood, or the maximum a posteriori, of the global sites.

    .. math:: \theta_{t+1} = \arg\max_\theta \sum_z p(z \mid x, \theta_t) \log p(x, z \mid \theta)

    The E-step sums the finite local sites out, chains in `pyro.markov` included. The M-step is the program's own where
    it offers one (``Program(em=...)``); else derived from its densities (weighted counts, least squares, residuals);
    else L-BFGS on the expected complete log-joint, which also moves `pyro.param` and networks. ``notes["M-step"]`` says
    which one moved which site. Whole data, float64.

    ``EM()`` drops the priors of the global sites. ``history["log_likelihood"]`` (total nats, after each step) never
    falls; with ``prior=True`` it is ``history["log_posterior"]`` (log-likelihood plus log prior density) that never
    does. An M-step after which it would is done again by gradients, and a run where that fails too has status
    ``failed``.

    Args:
        steps: at most so many steps.
        tolerance: converged when a step gains at most so many nats (in total, not per row). EM's gains shrink
            geometrically: what remains to be gained is this times 1 / (1 - the ratio of two gains), 70 on the crabs.
        prior: maximise the posterior density of the global sites, in their own (constrained) space.
        restarts: how many starts are tried for ten steps each; the best is run from its beginning. None: one where the
            program has its own start (or a fit is continued), else five. An extremum found by EM is a local one.
        m_step: "auto" as above, or only "offered", "derived" or "gradient".

    Raises:
        ValueError: for settings out of range.
        IncompatibleError: from `pg.fit`: local latent sites that are neither finite nor covered by offered steps; a
            global site that only priors depend on, unless ``prior``; no M-step of the kind asked for.
        NonFiniteError: from `pg.fit`, where the likelihood is unbounded and a scale falls to zero.

    References:
        Maximum likelihood from incomplete data via the EM algorithm (Dempster, Laird and Rubin, 1977).

    Example:
        >>> import pyro, torch, ppl_gen as pg
        >>> import pyro.distributions as dist
        >>> def two_coins(heads, tosses):
        ...     bias = pyro.sample("bias", dist.Beta(torch.ones(2), torch.ones(2)).to_event(1))
        ...     with pyro.plate("data", len(heads)):
        ...         coin = pyro.sample("coin", dist.Bernoulli(0.5))
        ...         pyro.sample("heads", dist.Binomial(tosses, bias[coin.long()]), obs=heads)
        >>> data = {"heads": torch.tensor([5.0, 9, 8, 4, 7]), "tosses": 10 * torch.ones(5)}
        >>> result = pg.fit(two_coins, data, EM(), seed=0)
        >>> result.point["bias"].sort().values
        tensor([0.52, 0.80], dtype=torch.float64)
    """

    steps: int = 2000
    tolerance: float = 1e-8
    prior: bool = False
    restarts: int | None = None
    m_step: Literal["auto", "offered", "derived", "gradient"] = "auto"

    dtype: ClassVar[torch.dtype | None] = torch.float64
    growing: ClassVar[Sequence[str]] = ("steps",)
    vectors: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("steps", "restarts"):
            value = getattr(self, name)
            if value is None and name == "restarts":
                continue
            require_whole(name, value)
        require_number("tolerance", self.tolerance, expected="a number of nats of at least 0")
        require_flag("prior", self.prior)
        require_choice("m_step", self.m_step, _MODES)

    @property
    def needs(self) -> Sequence[Need]:
        return (("density",), ("finite local latents", "EM steps"))

    def check(self, run: Run) -> None:
        """Refuse what cannot be learned: see the errors of the class."""
        program, info = run.program, run.info
        if self.m_step == "offered" and program.em is None:
            raise IncompatibleError(
                f"EM(m_step='offered') does not fit the program {program.name!r}, which offers no EM steps. Use EM(), "
                "or give them: Program(model, em=EMSteps(...))"
            )
        whole = [site.name for site in info.select(discrete=True, local=False) if not site.finite]
        if whole:
            raise IncompatibleError(
                f"EM does not fit the program {program.name!r}: the global site(s) {', '.join(whole)} are discrete and "
                "not finite, so they can be neither summed out nor moved. Give them finite support (a Categorical)"
            )
        if "finite local latents" not in info.offers and (program.em is None or program.em.e_step is None):
            local = [site.name for site in info.select(local=True) if not site.finite]
            raise IncompatibleError(
                f"EM does not fit the program {program.name!r}: it offers an M-step, and its E-step cannot sum out "
                f"{', '.join(local)}. Offer that too: EMSteps(m_step=..., e_step=...)"
            )
        if "finite local latents" in info.offers:
            with isolated():
                self._check_values(run)

    def _check_values(self, run: Run) -> None:
        # What can be wrong with steps that the program offers shows on the first rows, and summing all may not fit.
        steps = run.program.em is not None and run.program.em.e_step is not None and self.m_step in ("auto", "offered")
        problem = Problem.of(run, prior=self.prior, offered=steps, few=steps)
        if not problem.names and not problem.leaves:
            raise IncompatibleError(f"EM has nothing to learn in {run.program.name!r}: no global site, no parameter")
        values = first_values(run, problem)
        beside = [s.name for s in run.info.sites.values() if s.kind in ("observed", "factor") and not s.local]
        if beside and not self.prior:
            raise IncompatibleError(
                f"EM() drops what stands outside the data plate of {run.program.name!r} with the priors, and "
                f"{', '.join(beside)} would be lost, which hold data or a constraint. Use EM(prior=True)"
            )
        idle = [] if self.prior else problem.untouched(values)
        if idle:
            raise IncompatibleError(
                f"EM() drops the priors of global sites, and in {run.program.name!r} no density of the data depends on "
                f"{', '.join(idle)}. Use EM(prior=True)"
            )
        if problem.offered:
            own, summed = (problem.expect(values, offered=o).log_likelihood for o in (True, False))
            if not abs(own - summed) <= 1e-6 * (1 + abs(summed)):
                raise ValueError(
                    f"the E-step of {run.program.name!r} says that the log-likelihood at its start is {own:.10g}; "
                    f"summing the states of its model gives {summed:.10g}. The two must describe one model"
                )

    def _problem(self, run: Run) -> Problem:
        return Problem.of(run, prior=self.prior, offered=self.m_step in ("auto", "offered"))

    def init(self, run: Run) -> _State:
        """Starts are compared, and the M-steps decided, at the first."""
        problem = self._problem(run)
        first = first_values(run, problem)
        maximiser = Maximiser(problem, self.m_step, run.seed)
        expectation = _finite(problem.expect(first))
        maximiser.prepare(expectation)
        continued = run.start is not None and run.start.point is not None
        own = run.program.start is not None or not problem.names
        count = 1 if continued or (own and self.restarts is None) else self.restarts or _STARTS
        starts = candidates(run, problem, maximiser, first, count)
        values = starts[0] if len(starts) == 1 else _best(problem, maximiser, starts)
        if values is not first or problem.leaves:
            expectation = _finite(problem.expect(values))
        run.notes["M-step"] = maximiser.describe()
        chosen = f", the best of {len(starts)} after {TRIAL_STEPS} steps each" if len(starts) > 1 else ""
        run.notes["start"] = f"log-likelihood {expectation.log_likelihood:.6f} at the start{chosen}"
        return _State(self, problem, maximiser, expectation, len(starts), torch.finfo(run.dtype).eps)

    def step(self, state: _State, source: Batches) -> tuple[_State, Info]:
        state.advance()
        return state, state.info()

    def state_dict(self, state: _State) -> dict[str, Any]:
        return {
            "values": {name: value.detach().clone() for name, value in state.expectation.values.items()},
            "params": {name: leaf.detach().clone() for name, leaf in state.problem.leaves.items()},
            "replaced": state.replaced,
            "failed": state.failed,
        }

    def load_state_dict(self, state: _State, saved: Mapping[str, Any]) -> _State:
        _put_back(state.problem, [saved["params"][name] for name in state.problem.leaves])
        state.expectation = state.problem.expect({name: value.clone() for name, value in saved["values"].items()})
        state.replaced, state.failed = int(saved["replaced"]), str(saved["failed"])
        return state

    def limit(self, run: Run) -> int:
        return self.steps

    def stop(self, history: Mapping[str, Sequence[float]]) -> str | None:
        values = history["log_posterior" if self.prior else "log_likelihood"]
        if len(values) < 2:
            return None
        gain = float(values[-1]) - float(values[-2])
        if not gain <= self.tolerance:
            return None
        return f"converged after {len(values)} steps: the last gained {max(gain, 0.0):.1e} nats"

    def outcome(self, state: _State, run: Run) -> Outcome:
        if state.replaced:
            run.notes["replaced M-steps"] = (
                f"{state.replaced} M-step(s) would have lowered the objective; gradients made them"
            )
        values = {name: value.detach().clone() for name, value in state.expectation.values.items()}
        trials = TRIAL_STEPS * state.starts if state.starts > 1 else 0
        return Outcome(
            PointPosterior(values),
            run.workspace.snapshot(),
            ending=Ending("failed", state.failed) if state.failed else None,
            cost={"restarts": state.starts, "trial_steps": trials},
        )


def _finite(expectation: Expectation) -> Expectation:
    if not math.isfinite(expectation.objective):
        raise ValueError(
            f"the log-likelihood is {expectation.log_likelihood} at the start of EM: the starting values make some row "
            "impossible. Give plausible ones: Program(model, start=...)"
        )
    return expectation


def _best(problem: Problem, maximiser: Maximiser, starts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The start that is highest after a few steps; each begins with the same parameters of Pyro's."""
    kept = _copied(problem)
    found = []
    for values in starts:
        try:
            found.append(advanced(problem, maximiser, problem.expect(values), TRIAL_STEPS).objective)
        except FloatingPointError:
            found.append(-math.inf)
        _put_back(problem, kept)
    return starts[max(range(len(starts)), key=found.__getitem__)]


def _copied(problem: Problem) -> list[Tensor]:
    return [leaf.detach().clone() for leaf in problem.leaves.values()]


def _put_back(problem: Problem, kept: list[Tensor]) -> None:
    with torch.no_grad():
        for leaf, value in zip(problem.leaves.values(), kept, strict=True):
            leaf.copy_(value)


class _State:
    """The last E-step, and what it takes to make the next."""

    def __init__(
        self,
        em: EM,
        problem: Problem,
        maximiser: Maximiser,
        expectation: Expectation,
        starts: int,
        precision: float,
    ) -> None:
        self.em, self.problem, self.maximiser = em, problem, maximiser
        self.expectation, self.starts, self.precision = expectation, starts, precision
        self.replaced, self.failed = 0, ""

    def advance(self) -> None:
        """One M-step and the E-step after it; the objective is not lower afterwards."""
        if self.failed:
            return
        before, kept = self.expectation, _copied(self.problem)
        try:
            after = self._tried(self.maximiser(before))
            if self._fell(before, after) and (before.trace is not None or self.problem.sums):
                _put_back(self.problem, kept)
                after = self._tried(self.maximiser.by_gradient(before))
                self.replaced += 1
        except (FloatingPointError, KeyboardInterrupt):
            _put_back(self.problem, kept)
            raise
        if self._fell(before, after):
            _put_back(self.problem, kept)
            self.failed = (
                f"the objective fell from {before.objective:.10g} to {after.objective:.10g}: the program's own EM "
                "steps are not those of its model, or its densities differ each time it runs; what came before is kept"
            )
            return
        self.expectation = after

    def _tried(self, values: dict[str, Tensor]) -> Expectation:
        after = self.problem.expect(values)
        if not math.isfinite(after.objective):
            raise FloatingPointError(
                f"the log-likelihood is {after.log_likelihood} after an M-step ({self.maximiser.describe()}). Start "
                "elsewhere (another seed, Program(start=...)), or let the prior keep scales off zero: EM(prior=True)"
            )
        return after

    def _fell(self, before: Expectation, after: Expectation) -> bool:
        slack = _ROUNDING * self.precision * (abs(before.objective) + self.problem.rows)
        return after.objective < before.objective - slack

    def info(self) -> dict[str, float]:
        found = {"log_likelihood": self.expectation.log_likelihood}
        return found | ({"log_posterior": self.expectation.objective} if self.em.prior else {})
