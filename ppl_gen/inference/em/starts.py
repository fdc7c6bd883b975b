"""Where EM begins: the program's own starting values, or points around the best that all components agree on."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pyro
import torch
from torch import Tensor
from torch import distributions as td
from torch.distributions import Transform

from ppl_gen.fitting.run import Run
from ppl_gen.handlers.substitute import Median
from ppl_gen.inference.em.coordinates import unwrapped
from ppl_gen.inference.em.expectation import Expectation, Problem
from ppl_gen.inference.em.gradient import spread
from ppl_gen.inference.em.maximisation import Maximiser

__all__ = ["TRIAL_STEPS", "advanced", "candidates", "first_values"]

TRIAL_STEPS = 10  # after ten steps on the crabs a good start is within 0.05 nats of the maximum, the saddle 27 below
_WARM_STEPS = 5
_JITTER = 0.1


def first_values(run: Run, problem: Problem) -> dict[str, Tensor]:
    """Values of all global sites: those of a fit to continue from, the program's own, or the prior's medians."""
    given = run.starting_values()
    missing = [name for name in problem.names if name not in given]
    if missing:
        with torch.no_grad(), Median(tuple(missing)):
            trace = pyro.poutine.trace(problem.program.model).get_trace(*problem.batch.args, **problem.batch.kwargs)
        given = {**given, **{n: _jittered(problem.transforms[n], trace.nodes[n]["value"].detach()) for n in missing}}
    return {name: given[name].to(run.data.device) for name in problem.names}


def _jittered(transform: Transform, value: Tensor) -> Tensor:
    """Tables of probabilities have no median: all their rows start equal, and EM cannot tell equal components apart."""
    free = transform.inv(value)
    return transform(free + _JITTER * torch.randn_like(free))


def advanced(problem: Problem, maximiser: Maximiser, expectation: Expectation, steps: int) -> Expectation:
    """After some EM steps. Raises FloatingPointError where they end nowhere."""
    for _ in range(steps):
        expectation = problem.expect(maximiser(expectation))
        if not math.isfinite(expectation.objective):
            raise FloatingPointError("the log-likelihood is not finite")
    return expectation


def candidates(
    run: Run, problem: Problem, maximiser: Maximiser, first: dict[str, Tensor], count: int
) -> list[dict[str, Tensor]]:
    """``count`` starts, the first of them ``first``; fewer where a program's own start is always the same.

    Without a start of its own, a program with exchangeable components is first taken to the data with all components
    equal: few steps do that, and no component is lost on the way. There it sits on a saddle. It leaves it by a kick to
    each site as large as what a single row leaves uncertain of it, half as large for the next start, and so on. The
    first start is the prior's centre itself: where the prior tells components apart, it may be the best.
    """
    if count == 1:
        return [first]
    if run.program.start is not None:
        drawn = [first, *(first_values(run, problem) for _ in range(count - 1))]
        return [v for i, v in enumerate(drawn) if not any(_equal(v, other) for other in drawn[:i])]
    level = {name: _levelled(t, first[name]) for name, t in problem.transforms.items()}
    try:
        level = advanced(problem, maximiser, problem.expect(level), _WARM_STEPS).values
    except FloatingPointError:
        level = first
    width = spread(problem, level)
    return [first, *(_kicked(problem, level, width, 0.5**i) for i in range(count - 1))]


def _levelled(transform: Transform, value: Tensor) -> Tensor:
    """All entries of a site at their common mean; equal probabilities in every row of a table."""
    inner = unwrapped(transform)
    if isinstance(inner, td.StickBreakingTransform):
        return torch.full_like(value, 1 / value.shape[-1])
    if inner.domain.event_dim:
        return value
    free = transform.inv(value)
    return transform(free.mean().expand_as(free))


def _equal(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)


def _kicked(
    problem: Problem, values: Mapping[str, Tensor], width: Mapping[str, Tensor], size: float
) -> dict[str, Tensor]:
    kicked = {}
    for name, transform in problem.transforms.items():
        free = transform.inv(values[name])
        # What is bounded is moved by factors of at most e^2 or so: a scale or a weight at zero loses its component.
        unit = width[name] if torch.equal(transform(free), free) else width[name].clamp(max=1.0)
        kicked[name] = transform(free + size * unit * torch.randn_like(free))
    return kicked
