"""fit(): one set of guarantees for every program and algorithm."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ppl_gen.data.batching import Dataset
from ppl_gen.data.columns import column_notes
from ppl_gen.data.on_disk import nan_read
from ppl_gen.data.sources import collected
from ppl_gen.diagnostics.complaints import warn_if_bad
from ppl_gen.errors import (
    NonFiniteError,
    require_device,
    require_dtype,
    require_flag,
    require_seed,
    require_whole,
)
from ppl_gen.fits.checkpoints import checked_place, opened
from ppl_gen.fits.finished import finished
from ppl_gen.fits.monitoring import Validation
from ppl_gen.fits.preparing import built_from, checked_run, dtype_of, inspected, modules_of, prepared
from ppl_gen.fits.result import Fit, Status
from ppl_gen.fits.together import agree, processes_of
from ppl_gen.fits.untouched import untouched
from ppl_gen.fitting.algorithm import Algorithm
from ppl_gen.fitting.checkpoint import Every
from ppl_gen.fitting.run import Run
from ppl_gen.handlers.ordered import ordered
from ppl_gen.handlers.whole_plates import whole_plates
from ppl_gen.program.adapted import adapted
from ppl_gen.program.info import ProgramInfo
from ppl_gen.program.mixed import MixedDtypesError
from ppl_gen.program.program import Program, Recipe, as_recipe
from ppl_gen.runtime.interrupts import allowed, hold, listening
from ppl_gen.runtime.numbered import Numbered
from ppl_gen.runtime.progress import ProgressBar
from ppl_gen.runtime.ranks import Ranks
from ppl_gen.workspace.closures import Remembered, functions_of, same_again
from ppl_gen.workspace.isolation import isolated
from ppl_gen.workspace.workspace import Workspace

__all__ = ["fit", "inspect_program"]

SINGLE = (
    "float32, as the program computes with its own tensors of that dtype; make them in float64 and ask for "
    "dtype=torch.float64 if the precision matters"
)
REMEMBERS = (
    "changed by the program as it ran. Questions put it back, each begins with what training left, and neither another "
    "fit nor a saved one does; give what counts steps to the program as data, or leave it out"
)


def fit(
    program: Program | Recipe | Callable[..., Any],
    data: Any,
    algorithm: Algorithm,
    *,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    progress: bool | None = None,
    validation: Any = None,
    validate_every: int | None = None,
    callbacks: Sequence[Callable[[int, Mapping[str, Any]], None]] = (),
    start: Fit | None = None,
    fabric: Any = None,
    checkpoint: str | Path | None = None,
    every: int | datetime.timedelta | None = None,
    compile: str | bool = "auto",
) -> Fit:
    """Learn ``program`` from ``data`` with ``algorithm``; everything that was passed in stays as it was.

    Args:
        program: a Pyro model function, a `Program`, or a `Recipe` (built once, here, under the seed).
        data: rows: a tensor or array is the model's first argument, a tuple or a torch Dataset its arguments in order,
            a mapping, or a data frame whose columns the model names, its arguments by name.
        algorithm: SVI(...), EM(...), CAVI(...), NUTS(...).
        seed: the only source of randomness; the same program, data, algorithm, seed and machine give
            bit-for-bit identical fits.
        device: where parameters and batches live; the program runs under ``torch.device(device)``.
        dtype: of data and parameters; float32 unless the data or the algorithm asks for float64.
        progress: a progress bar; None: in terminals and notebooks only.
        validation: held-out rows on which the evidence is estimated during training; of an energy whose normaliser is
            no short sum, by annealing.
        validate_every: steps between two such estimates (a tenth of all steps when None).
        callbacks: called as ``callback(step, info)`` after every step; KeyboardInterrupt raised there ends the run.
        start: a fit of the same program to continue from.
        fabric: a launched `lightning_fabric.Fabric`, whose processes learn the one fit together: each takes its share
            of every batch, all make the same steps and return the same fit. Every process passes the same arguments.
        checkpoint: a folder in which the run is kept as it goes. Called again in the same way, after whatever ended it,
            the fit goes on where the last checkpoint stands, to the same bits (on a CPU); a finished one is returned at
            once. ``steps``, ``epochs`` and the ``draws`` of chains may be raised; another fit is refused.
        every: how often: a number of steps, or a `datetime.timedelta`; a minute when None.
        compile: how training steps are computed. ``"graph"`` replays what the program computed, without its Python;
            ``"inductor"`` compiles that; False runs the program at every step; ``"auto"`` chooses by the number of
            steps. What was captured is checked against the program, and random numbers are the same on all paths.
            ``fit.cost`` says which path ran, what building it cost and why no other was taken. Beside ``fabric`` the
            program runs, and an explicit path is an error.

    Warns:
        FitWarning: once, where chains are bad (what they did, and what to do next), or where columns of the data of
            any other fit are constant or unscaled. A guide is judged when `Fit.verdict` is first asked, and warns then.

    Returns:
        The fit. Ctrl-C, or SIGTERM where the process has no handler of its own for it, ends the run after the step
        under way and returns the partial fit with status ``interrupted``; a second one ends the step too. Before the
        first step KeyboardInterrupt is raised, and nothing is left changed. A last checkpoint is written in any case.

    Raises:
        IncompatibleError: the program does not offer what the algorithm needs; both sides are printed.
        NonFiniteError: a loss or gradient was not finite; ``error.fit`` is the last finite state.
        RankError: another of the processes of ``fabric`` failed; its own error was raised there.
        ValueError, TypeError: for a mistake in program, data or settings, before anything changes.

    Example:
        >>> import pyro, torch, ppl_gen as pg
        >>> import pyro.distributions as dist
        >>> from ppl_gen.inference import SVI
        >>> def model(x):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> result = pg.fit(model, torch.tensor([1.0, 2.0, 3.0]), SVI(steps=1000, lr=0.02), seed=0)
        >>> abs(float(result.posterior(draws=1000)["loc"].mean()) - 2.0) < 0.2
        True
    """
    seed, place = _checked(algorithm, seed, device, dtype, validate_every, progress)
    ranks, place = processes_of(fabric, place)
    if not ranks.first:
        progress = False
    recipe = as_recipe(program)
    _check_start(recipe, start)
    _check_callbacks(callbacks)
    _check_compile(compile, ranks)
    kept = checked_place(checkpoint, every, algorithm)
    asked = dtype
    with listening(), ranks.told():
        with allowed():
            data = collected(data)
        rest = _Rest(
            seed, place, validation, validate_every, progress, callbacks, start, recipe is program, ranks, kept, compile
        )
        try:
            result = _fitted(recipe, data, algorithm, asked or algorithm.dtype, rest)
        except MixedDtypesError:
            given = dtype_of(data) is torch.float64 or (start is not None and start.data.dtype is torch.float64)
            if asked is not None or algorithm.dtype is not torch.float64 or given:
                raise
            result = _fitted(recipe, data, algorithm, torch.float32, rest)
            result = replace(result, notes={**result.notes, "dtype": SINGLE})
        if ranks.taken():  # it came after the last step: nothing is missing, but a script has to hear of it
            result = replace(result, status=Status.INTERRUPTED, message=f"interrupted at the end: {result.message}")
    if result.status is Status.DIVERGED:
        if read := nan_read(result.data):
            result = replace(result, message=f"{result.message} ({read})")
        raise NonFiniteError(result.message, result)
    if ranks.first:
        warn_if_bad(result)
    return result


@dataclass(frozen=True)
class _Rest:
    """What `fit` was asked for beside program, data and algorithm, checked."""

    seed: int
    place: torch.device | None
    validation: Any
    validate_every: int | None
    progress: bool | None
    callbacks: Sequence[Callable[[int, Mapping[str, Any]], None]]
    start: Fit | None
    scaled: bool
    ranks: Ranks
    kept: tuple[Numbered | None, Every]
    compile: str | bool


def _fitted(recipe: Recipe, data: Any, algorithm: Algorithm, dtype: torch.dtype | None, rest: _Rest) -> Fit:
    """The fit in one dtype, whatever became of it."""
    place, start = rest.place, rest.start
    with isolated(rest.seed, dtype=dtype or dtype_of(data)), torch.inference_mode(False), torch.enable_grad():
        with allowed():
            built, dataset = built_from(recipe, data, dtype, place, start)
        state = start.state if start is not None else None
        plates = contextlib.nullcontext() if algorithm.subsamples else whole_plates()
        modules = modules_of(built, start)
        with Workspace(state, device=place, dtype=dataset.dtype, modules=modules) as workspace, plates:
            with allowed():
                with untouched(dataset, kept=True):
                    run = checked_run(
                        algorithm, built, dataset, workspace, rest.seed, start, rest.validation, rest.ranks
                    )
                run.notes |= column_notes(dataset.entries, scaled=rest.scaled)
                run.compile = rest.compile
            with ProgressBar(rest.progress, algorithm.label) as report, allowed():
                run.progress = report
                before = Remembered(functions_of(built))
                run.hooks = tuple(rest.callbacks)
                if rest.validation is not None:
                    run.validation = Validation(rest.validation, rest.validate_every, run.program, dataset)
                agree(run, algorithm, kept=rest.kept[0] is not None)
                with opened(*rest.kept, run, recipe, algorithm), untouched(dataset, kept=False):
                    began = time.perf_counter()
                    outcome = algorithm.run(run)
                    seconds = time.perf_counter() - began + (run.checkpoint.seconds if run.checkpoint else 0.0)
                    hold()
            _note_unregistered(workspace, run)
            _note_unused_terms(algorithm, run)
            if changed := before.changed():
                run.notes["remembers"] = f"{', '.join(changed)}: {REMEMBERS}"
            return finished(recipe, algorithm, run, outcome, seconds)


def inspect_program(program: Program | Recipe | Callable[..., Any], data: Any) -> ProgramInfo:
    """Dry-run ``program`` on ``data``: a table of sites, shapes, plates and offers (`pg.check`).

    Raises:
        ValueError, TypeError: naming the site and the edit, for the usual plate and shape mistakes.

    Example:
        >>> import pyro, torch, ppl_gen as pg
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> print(pg.check(model, torch.zeros(3)))  # doctest: +ELLIPSIS
        model: data plate 'data' over 3 rows
        site  kind      distribution  batch  event  plates  guide
        loc   latent    Normal        []     []     -       -
        x     observed  Normal        [3]    []     data    -
        offers: ...
    """
    from ppl_gen.inference.guides.resolved import as_class, is_auto

    data = collected(data)
    with same_again(program), prepared(as_recipe(program), data) as (built, dataset, _), untouched(dataset, kept=True):
        made = is_auto(built.guide) or isinstance(as_class(built.guide)[0], type)  # by a fit
        guide = None if made else ordered(built.guide, dataset.order)
        plain, _notes = adapted(built, dataset.glimpse(), dataset, vectors=False)
        try:
            return inspected(plain, dataset, guide)
        except ValueError:
            found = None if guide is not None else _of_vectors(built, dataset)
            if found is None:
                raise
            return found


def _of_vectors(built: Program, dataset: Dataset) -> ProgramInfo | None:
    """What a program is to the algorithms that read vectors outside of every plate as one draw; None for others."""
    read, notes = adapted(built, dataset.glimpse(), dataset, vectors=True)
    if "vectors" not in notes:
        return None
    try:
        found = inspected(read, dataset, None)
        return None if found.coupled else replace(found, vectors=notes["vectors"].split(":")[0])
    except ValueError:
        return None


def _checked(
    algorithm: Any, seed: Any, device: Any, dtype: Any, validate_every: Any, progress: Any
) -> tuple[int, torch.device | None]:
    """The seed and the device, after everything that can be refused without looking at the data was looked at."""
    if isinstance(algorithm, type) or not isinstance(algorithm, Algorithm):
        name = algorithm.__name__ if isinstance(algorithm, type) else type(algorithm).__name__
        hint = f"{name}() (with brackets)" if isinstance(algorithm, type) else "SVI(), EM() or NUTS()"
        raise TypeError(f"algorithm: expected an instance such as {hint}, got {name}")
    require_dtype(dtype)
    require_flag("progress", progress, optional=True)
    if validate_every is not None:
        require_whole("validate_every", validate_every)
    return require_seed(seed), require_device(device)


def _check_callbacks(callbacks: Any) -> None:
    if not isinstance(callbacks, Sequence) or isinstance(callbacks, str | bytes) or not all(map(callable, callbacks)):
        raise TypeError(f"callbacks: expected a list of functions of a step and its info, got {callbacks!r}")


def _check_compile(compile: Any, ranks: Ranks) -> None:
    if compile is not False and not (isinstance(compile, str) and compile in ("auto", "graph", "inductor")):
        raise ValueError(f'compile: expected "auto", "graph", "inductor" or False, got {compile!r}')
    if compile in ("graph", "inductor") and not ranks.alone:
        raise ValueError(
            f"compile={compile!r} does not go together with fabric: processes that share a batch talk to each other "
            "inside a step, which is not captured; leave compile out"
        )


def _check_start(recipe: Recipe, start: Fit | None) -> None:
    if start is None:
        return
    if not isinstance(start, Fit):
        raise TypeError(f"start: expected a fit, such as pg.load(path, program=...) gives, got {type(start).__name__}")
    names = {start.program.name, *([start.recipe.name] if start.recipe is not None else [])}
    if recipe.name not in names:
        raise ValueError(
            f"start: that fit is of the program {start.program.name!r}, and not of {recipe.name!r}; continue from a "
            "fit of the same program"
        )


def _note_unused_terms(algorithm: Algorithm, run: Run) -> None:
    """An algorithm without a loss has nothing to add a program's terms to, and says so."""
    if run.program.terms and "terms" not in run.notes:
        run.notes["terms"] = f"left out: {', '.join(run.program.terms)}; {algorithm.label} works on the density alone"


def _note_unregistered(workspace: Workspace, run: Run) -> None:
    """Asked at the end: by then the guide has run too, which may register what the model only calls."""
    names = workspace.unregistered()
    if names:
        run.notes["not trained"] = (
            f"{', '.join(names)} hold trainable parameters that Pyro does not know; register the network with "
            'pyro.module("name", network) in model or guide, or set requires_grad_(False) if it is meant to stay fixed'
        )
