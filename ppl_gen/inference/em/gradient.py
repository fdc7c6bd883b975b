"""The M-step of last resort: L-BFGS on the expected complete log-joint."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ppl_gen.enumeration.marginals import row_log_density
from ppl_gen.inference.em.expectation import Problem

__all__ = ["ascend", "gradient_step", "spread"]

# Measured on mixtures in raw units: 4 inner iterations leave most of Q's rise undone and EM crawls.
INNER_STEPS = 20
_SIGNS = 8


def ascend(parameters: Sequence[Tensor], objective: Callable[[], Tensor], steps: int = INNER_STEPS) -> float:
    """Raise ``objective`` by L-BFGS with a strong Wolfe line search, in place; by how much.

    Where the search ends lower than it began, or nowhere finite, the parameters are put back and the gain is zero.

    References:
        Numerical Optimization, chapters 3 and 7 (Nocedal and Wright, 2006).

    Example:
        >>> x = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
        >>> round(ascend([x], lambda: -(x - 1.0) ** 2), 6), round(x.item(), 6)
        (4.0, 1.0)
    """
    kept = [p.detach().clone() for p in parameters]
    seen: list[float] = []

    def closure() -> Tensor:
        with torch.enable_grad():
            loss = -objective()
            gradients = torch.autograd.grad(loss, list(parameters), allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        seen.append(float(loss.detach()))
        return loss.detach()

    optimiser = torch.optim.LBFGS(
        list(parameters), max_iter=steps, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )
    optimiser.step(closure)
    for parameter in parameters:
        parameter.grad = None
    with torch.no_grad():
        gain = seen[0] + float(objective())
        if math.isfinite(gain) and gain > 0:
            return gain
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    return 0.0


def spread(problem: Problem, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The standard deviation that a single row leaves each entry of each site, in unconstrained shapes and coordinates.

    It is the root of the inverse mean square of a row's score. The sum over rows of squared scores is itself the mean,
    over random signs, of the square of the signed sum; each entry's is averaged with that of its whole site, which
    steadies it and keeps it finite for entries that no row speaks of.
    """
    free = {n: t.inv(values[n]).detach().clone().requires_grad_() for n, t in problem.transforms.items()}
    ones = {name: torch.ones_like(value.detach()) for name, value in free.items()}
    with torch.enable_grad():
        trace = problem.trace({n: t(free[n]) for n, t in problem.transforms.items()})
        try:
            rows = row_log_density(trace, problem.plate)
        except ValueError:  # rows that are coupled have no densities of their own
            return ones
        if len(rows) == 1 or not rows.requires_grad or not free:
            return ones
        squares = {name: torch.zeros_like(value) for name, value in ones.items()}
        for _ in range(_SIGNS):
            signs = torch.randint(0, 2, rows.shape, device=rows.device).to(rows) * 2 - 1
            found = torch.autograd.grad((signs * rows).sum(), list(free.values()), retain_graph=True, allow_unused=True)
            for name, gradient in zip(free, found, strict=True):
                if gradient is not None:
                    squares[name] += gradient.square() / (_SIGNS * len(rows))
    steadied = {name: (square + square.mean()) / 2 for name, square in squares.items()}
    return {name: s.rsqrt() if bool((s.isfinite() & (s > 0)).all()) else ones[name] for name, s in steadied.items()}


def gradient_step(
    problem: Problem,
    values: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    names: Iterable[str],
    *,
    leaves: bool = True,
) -> tuple[dict[str, Tensor], float]:
    """Raise Q over the sites ``names`` (in unconstrained coordinates) and, if ``leaves``, all that Pyro holds.

    Returns all values, new where they moved, and by how many nats Q rose. The coordinates are measured in what a row
    leaves uncertain of them: in raw units of the data L-BFGS needs many times the steps.
    """
    transforms = {name: problem.transforms[name] for name in names}
    units = spread(problem, values) if transforms else {}
    origin = {name: t.inv(values[name]).detach() for name, t in transforms.items()}
    moves = {name: torch.zeros_like(value, requires_grad=True) for name, value in origin.items()}
    parameters = [*moves.values(), *(problem.leaves.values() if leaves else ())]
    if not parameters:
        return dict(values), 0.0

    def moved() -> dict[str, Tensor]:
        return {name: t(origin[name] + units[name] * moves[name]) for name, t in transforms.items()}

    def objective() -> Tensor:
        return problem.surrogate({**values, **moved()}, weights) / problem.rows  # nats per row: the first step's length

    gain = ascend(parameters, objective) * problem.rows
    if gain == 0.0:
        return dict(values), 0.0
    with torch.no_grad():
        return {**values, **moved()}, gain
