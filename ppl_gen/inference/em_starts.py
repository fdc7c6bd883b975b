"""Where EM begins: the program's own starting values, or points around the best that all components agree on."""

from __future__ import annotations

from collections.abc import Mapping

import pyro
import torch
from pyro.infer.autoguide.initialization import init_to_median
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ppl_gen.inference.base import Run
from ppl_gen.inference.enumeration import row_log_density
from ppl_gen.inference.expectation import Expectation, Problem
from ppl_gen.inference.m_steps import Maximiser

__all__ = ["TRIAL_STEPS", "advanced", "candidates", "first_values"]

TRIAL_STEPS = 10  # after ten steps on the crabs a good start is within 0.05 nats of the maximum, the saddle 27 below
_WARM_STEPS = 5
_JITTER = 0.1
_SIGNS = 16


class _Median(Messenger):
    """Global sites at the median of a few prior draws."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg: dict[str, object]) -> None:
        if msg["name"] in self.names and msg["value"] is None:
            with torch.no_grad():
                msg["value"] = init_to_median(msg)


def first_values(run: Run, problem: Problem) -> dict[str, Tensor]:
    """Values of all global sites: those of a fit to continue from, the program's own, or the prior's medians."""
    given = run.starting_values()
    missing = [name for name in problem.names if name not in given]
    if missing:
        with torch.no_grad(), _Median(tuple(missing)):
            trace = pyro.poutine.trace(problem.program.model).get_trace(*problem.args, **problem.kwargs)
        given = {**given, **{name: trace.nodes[name]["value"].detach() for name in missing}}
    return {name: given[name].to(run.data.device) for name in problem.names}


def advanced(problem: Problem, maximiser: Maximiser, expectation: Expectation, steps: int) -> Expectation:
    """After some EM steps. Raises FloatingPointError where they end nowhere."""
    for _ in range(steps):
        expectation = problem.expect(maximiser(expectation))
        if not torch.isfinite(torch.tensor(expectation.objective)):
            raise FloatingPointError("the log-likelihood is not finite")
    return expectation


def candidates(
    run: Run, problem: Problem, maximiser: Maximiser, first: dict[str, Tensor], count: int
) -> list[dict[str, Tensor]]:
    """``count`` starts, the first of them ``first``; fewer where a program's own start is always the same.

    Without a start of its own, a program with exchangeable components is taken a few steps from where its prior is
    centred, which brings it to the data but often to a saddle where all components agree; then each site is kicked by
    its own uncertainty from a single row, halved from start to start.
    """
    if count == 1:
        return [first]
    if run.program.start is not None:
        drawn = [first, *(first_values(run, problem) for _ in range(count - 1))]
        return [v for i, v in enumerate(drawn) if not any(_equal(v, other) for other in drawn[:i])]
    near = {n: t(t.inv(first[n]) + _JITTER * torch.randn_like(t.inv(first[n]))) for n, t in problem.transforms.items()}
    try:
        centre = advanced(problem, maximiser, problem.expect(near), _WARM_STEPS).values
    except FloatingPointError:
        centre = near
    spread = _spread(problem, centre)
    return [near, *(_kicked(problem, centre, spread, 0.5**i) for i in range(count - 1))]


def _equal(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)


def _spread(problem: Problem, values: Mapping[str, Tensor]) -> dict[str, float]:
    """By site, the standard deviation that one row leaves it, in unconstrained coordinates: from the squared scores.

    The sum over rows of squared scores is the mean, over random signs, of the square of the signed sum.
    """
    free = {n: t.inv(values[n]).detach().clone().requires_grad_() for n, t in problem.transforms.items()}
    with torch.enable_grad():
        trace = problem.trace({n: t(free[n]) for n, t in problem.transforms.items()})
        try:
            rows = row_log_density(trace, problem.plate)
        except ValueError:  # rows that are coupled have no densities of their own
            return dict.fromkeys(free, 0.5)
        squares = dict.fromkeys(free, 0.0)
        if len(rows) == 1 or not rows.requires_grad:
            return dict.fromkeys(free, 0.5)
        for _ in range(_SIGNS):
            signs = torch.randint(0, 2, rows.shape, device=rows.device).to(rows) * 2 - 1
            found = torch.autograd.grad((signs * rows).sum(), list(free.values()), retain_graph=True, allow_unused=True)
            for name, gradient in zip(free, found, strict=True):
                squares[name] += 0.0 if gradient is None else float(gradient.square().mean()) / _SIGNS
    return {name: (len(rows) / square) ** 0.5 if square > 1e-300 else 0.0 for name, square in squares.items()}


def _kicked(
    problem: Problem, values: Mapping[str, Tensor], spread: Mapping[str, float], size: float
) -> dict[str, Tensor]:
    kicked = {}
    for name, transform in problem.transforms.items():
        free = transform.inv(values[name])
        real = torch.equal(transform(free), free)
        width = spread[name] if real else min(spread[name], 2.0)  # e^2 is as far as a scale need go
        kicked[name] = transform(free + size * width * torch.randn_like(free))
    return kicked
