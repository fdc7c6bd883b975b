"""The density of a program as a function of one vector, replayed from a recording where that gives the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ppl_gen.capture.replay import record_checked
from ppl_gen.capture.tape import RecordingRefused
from ppl_gen.errors import IncompatibleError
from ppl_gen.fitting.run import Run
from ppl_gen.inference.unconstrained import Unconstrained, refuse_hidden_draws, starting_point
from ppl_gen.workspace.isolation import isolated

__all__ = ["derived_seed", "first_points", "guarded", "note_unrecorded", "recorded_potential", "refuse_large"]

Potential = Callable[[Tensor], tuple[Tensor, ...]]


def recorded_potential(run: Run, density: Unconstrained, points: Sequence[Tensor]) -> Potential:
    """U and its slope as a replay checked at ``points``, or the program itself where it cannot be recorded (noted).

    Raises:
        IncompatibleError: where two evaluations at one point differ: the density draws random numbers.
    """
    refuse_hidden_draws(run.program.name, density, points[0])
    if run.compile is False:
        return density.potential_and_gradient
    try:
        return record_checked(density.potential_and_gradient, [*points, 0.5 * points[0], -points[0]]).load()
    except RecordingRefused as refused:
        note_unrecorded(run, refused)
        return density.potential_and_gradient


def note_unrecorded(run: Run, refused: RecordingRefused) -> str:
    """Note why the program itself is run; gives the reason."""
    reason = str(refused).splitlines()[0]  # below it stand the shapes that Pyro adds to what goes through a program
    run.notes["potential"] = f"evaluated by running the program each time, as it cannot be recorded: {reason}"
    return reason


def guarded(potential: Potential) -> Potential:
    """The same with NaN as +inf, a slope of zeros there: to a line search both say that it went too far."""

    def safe(u: Tensor) -> tuple[Tensor, ...]:
        value, slope = potential(u)
        fine = value.isfinite() & slope.isfinite().all()
        return torch.where(fine, value, torch.full_like(value, float("inf"))), torch.where(
            fine, slope, torch.zeros_like(slope)
        )

    return safe


def derived_seed(seed: int, *places: int) -> int:
    """A seed that follows from the fit's and from numbers that say what it is for.

    >>> derived_seed(0, 1) == derived_seed(0, 1), derived_seed(0, 1) == derived_seed(0, 2)
    (True, False)
    """
    return int(np.random.SeedSequence([seed, *places]).generate_state(1)[0])


def first_points(run: Run, density: Unconstrained, count: int) -> list[Tensor]:
    """Where ``count`` paths begin: the first at the starting values, if there are any, the others dispersed.

    Of every two of the others, the second lies across zero from the one before. A point follows from the seed of the
    fit and its own number alone.

    Raises:
        ValueError: where 100 tries find no finite density (the sites are named).
    """
    parts = density.parts_of(run.starting_values())
    points: list[Tensor] = []
    for number in range(count):
        exact = bool(parts) and number == 0
        opposite = points[-1] if number % 2 else None
        with isolated(derived_seed(run.seed, number), dtype=run.dtype):
            points.append(starting_point(density, parts, 0.0 if exact else None, opposite))
    return points


def refuse_large(run: Run, density: Unconstrained, label: str, most: int) -> None:
    """A covariance of so many numbers would take too long.

    Raises:
        IncompatibleError: beyond ``most`` numbers; it names the largest site.
    """
    if density.size <= most:
        return
    name, shape = max(density.sites.items(), key=lambda site: site[1].numel())
    raise IncompatibleError(
        f"{label} keeps the covariance of all latent numbers together, up to {most} of them, and {run.program.name!r} "
        f"has {density.size} ({name}: {shape.numel()}); use SVI(), whose default guide keeps a variance for each"
    )
