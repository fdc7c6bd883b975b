"""Expectation-maximisation for any program whose local latent sites are finite, or that offers its own steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from ppl_gen.inference.em.online import OnlineState
from ppl_gen.inference.em.starts import TRIAL_STEPS, advanced, candidates, first_values
from ppl_gen.inference.em.whole import WholeState, copied, put_back
from ppl_gen.inference.guides.moving import MOVED_REMEDY, moving_supports, said_to_move
from ppl_gen.program.offers import Need
from ppl_gen.workspace.isolation import isolated

__all__ = ["EM"]

_MODES = ("auto", "offered", "derived", "gradient")
# Starts tried where the program has none of its own; one where it has.
_STARTS = 5


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
        batch_size: rows of a step; None: all. With it, EM is stochastic approximation by sufficient statistics s (Cappe
            and Moulines 2009), for programs whose steps say how these add up (`gaussian_mixture`, `ppca`,
            `factor_analysis`; `EMSteps.blend`):
            :math:`s_{t+1} = (1 - \\gamma_t) s_t + \\gamma_t \\hat s(\\theta_t)`, with the statistics of a batch at
            the present values, scaled to all rows. It makes all its ``steps``; values at the end are those of an
            average of s that gives most weight to the last third of the run, and
            ``history["batch_log_likelihood"]`` is that of each batch before its step, scaled to all rows.
        decay: kappa of the step sizes :math:`\\gamma_t = (t + 1)^{-\\kappa}`, above 0.5 and at most 1 (which forgets
            the start very slowly); only with ``batch_size``. The first five steps only gather statistics.

    Raises:
        ValueError: for settings out of range.
        IncompatibleError: from `pg.fit`: local latent sites that are neither finite nor covered by offered steps; a
            global site that only priors depend on, unless ``prior``; no M-step of the kind asked for.
        NonFiniteError: from `pg.fit`, where the likelihood is unbounded and a scale falls to zero.

    References:
        Maximum likelihood from incomplete data via the EM algorithm (Dempster, Laird and Rubin, 1977).
        On-line expectation-maximization algorithm for latent data models (Cappe and Moulines, 2009).

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
    batch_size: int | None = None
    decay: float = 0.6

    dtype: ClassVar[torch.dtype | None] = torch.float64
    growing: ClassVar[Sequence[str]] = ("steps",)
    vectors: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("steps", "restarts", "batch_size"):
            value = getattr(self, name)
            if value is not None or name == "steps":
                require_whole(name, value)
        require_number("tolerance", self.tolerance, expected="a number of nats of at least 0")
        require_flag("prior", self.prior)
        require_choice("m_step", self.m_step, _MODES)
        require_number("decay", self.decay, 0.5, 1.0, "a number above 0.5 and at most 1")
        if self.decay == 0.5:
            raise ValueError("decay: expected a number above 0.5 and at most 1, got 0.5: the noise would never die out")
        if self.batch_size is not None and (self.m_step not in ("auto", "offered") or self.restarts not in (None, 1)):
            raise ValueError(
                "batch_size: minibatches are for the program's own steps from one start; leave m_step and restarts out"
            )

    @property
    def endless(self) -> bool:
        return self.batch_size is not None

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
        if self.batch_size is not None and (program.em is None or None in (program.em.e_step, program.em.blend)):
            raise IncompatibleError(
                f"EM(batch_size={self.batch_size}) does not fit the program {program.name!r}: minibatches need "
                "sufficient statistics that add up over rows: Program(model, em=EMSteps(m_step=..., e_step=..., "
                "blend=...)). Use EM()"
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
        moved = moving_supports(run.joint, run.data.glimpse())
        if moved := {name: by for name, by in moved.items() if not info.sites[name].local}:
            raise IncompatibleError(
                f"EM moves each global site of {program.name!r} within one support, and {said_to_move(moved)}. "
                f"{MOVED_REMEDY}"
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

    def source(self, run: Run) -> Batches:
        steps = run.program.em
        given = self.batch_size is not None and steps is not None and steps.prepare is not None
        data = replace(run.data, dtype=None) if given else run.data
        return Batches(data, self.batch_size, run.seed, ranks=run.ranks)

    def init(self, run: Run) -> WholeState | OnlineState:
        """Starts are compared, and the M-steps decided, at the first."""
        offered, few = self.m_step in ("auto", "offered"), self.batch_size is not None
        problem = Problem.of(run, prior=self.prior, offered=offered, few=few)
        if few:
            return self._online(run, problem)
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
        return WholeState(self.prior, problem, maximiser, expectation, len(starts), torch.finfo(run.dtype).eps)

    def _online(self, run: Run, problem: Problem) -> OnlineState:
        values = first_values(run, problem)
        maximiser = Maximiser(problem, "offered", run.seed)
        maximiser.prepare(_finite(problem.expect(values)))
        run.notes["M-step"] = f"{maximiser.describe()}, from statistics of minibatches"
        assert run.program.em is not None  # check
        return OnlineState(run.program.em, self.prior, run.data.rows or 1, self.decay, values)

    def step(self, state: WholeState | OnlineState, source: Batches) -> tuple[WholeState | OnlineState, Info]:
        state.advance(source)
        return state, state.info()

    def state_dict(self, state: WholeState | OnlineState) -> dict[str, Any]:
        return state.state_dict()

    def load_state_dict(self, state: WholeState | OnlineState, saved: Mapping[str, Any]) -> WholeState | OnlineState:
        state.load_state_dict(saved)
        return state

    def limit(self, run: Run) -> int:
        return self.steps

    def stop(self, history: Mapping[str, Sequence[float]]) -> str | None:
        if self.endless:
            return None
        values = history["log_posterior" if self.prior else "log_likelihood"]
        if len(values) < 2:
            return None
        gain = float(values[-1]) - float(values[-2])
        if not gain <= self.tolerance:
            return None
        return f"converged after {len(values)} steps: the last gained {max(gain, 0.0):.1e} nats"

    def outcome(self, state: WholeState | OnlineState, run: Run) -> Outcome:
        values = {name: value.detach().clone() for name, value in state.values.items()}
        cost = {"restarts": 1, "trial_steps": 0}
        if isinstance(state, OnlineState):
            return Outcome(PointPosterior(values), run.workspace.snapshot(), cost=cost)
        if state.replaced:
            run.notes["replaced M-steps"] = (
                f"{state.replaced} M-step(s) would have lowered the objective; gradients made them"
            )
        if state.starts > 1:
            cost = {"restarts": state.starts, "trial_steps": TRIAL_STEPS * state.starts}
        ending = Ending("failed", state.failed) if state.failed else None
        return Outcome(PointPosterior(values), run.workspace.snapshot(), ending=ending, cost=cost)


def _finite(expectation: Expectation) -> Expectation:
    if not math.isfinite(expectation.objective):
        raise ValueError(
            f"the log-likelihood is {expectation.log_likelihood} at the start of EM: the starting values make some row "
            "impossible. Give plausible ones: Program(model, start=...)"
        )
    return expectation


def _best(problem: Problem, maximiser: Maximiser, starts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The start that is highest after a few steps; each begins with the same parameters of Pyro's."""
    kept = copied(problem)
    found = []
    for values in starts:
        try:
            found.append(advanced(problem, maximiser, problem.expect(values), TRIAL_STEPS).objective)
        except FloatingPointError:
            found.append(-math.inf)
        put_back(problem, kept)
    return starts[max(range(len(starts)), key=found.__getitem__)]
