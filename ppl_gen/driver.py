"""fit(): one loop, one set of guarantees, for every program and algorithm."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ppl_gen.closures import Remembered, functions_of, same_again
from ppl_gen.data.arrays import shared
from ppl_gen.data.batching import LARGE, Batch, Dataset, as_dataset, is_double
from ppl_gen.data.columns import column_notes
from ppl_gen.data.masks import refuse_unread_masks
from ppl_gen.data.names import Read
from ppl_gen.data.sources import collected
from ppl_gen.diagnostics.complaints import warn_if_bad
from ppl_gen.differentiable import why_not_differentiable
from ppl_gen.dryrun import ProgramInfo, dry_run
from ppl_gen.errors import (
    NonFiniteError,
    require_device,
    require_dtype,
    require_flag,
    require_seed,
    require_whole,
)
from ppl_gen.guidechecks import check_masked
from ppl_gen.handlers.adapted import adapted
from ppl_gen.handlers.whole_plates import whole_plates
from ppl_gen.honoured import refuse_idle_masks
from ppl_gen.inference.base import Algorithm, Iterative, Outcome, Run
from ppl_gen.inference.enumerable import unenumerable
from ppl_gen.inference.restored import guide_source
from ppl_gen.inference.stopping import EarlyStop, check_record
from ppl_gen.inference.unlearned import joint, predictions
from ppl_gen.interrupts import allowed, check, hold, listening, taken
from ppl_gen.isolation import Workspace, isolated, looking
from ppl_gen.mixed import MixedDtypesError
from ppl_gen.monitoring import Validation
from ppl_gen.naming import check_names
from ppl_gen.offers import require
from ppl_gen.program import Program, Recipe, as_recipe
from ppl_gen.progress import ProgressBar
from ppl_gen.result import Fit, Status
from ppl_gen.sitechecks import check_observed

__all__ = ["fit", "inspect_program", "iterate"]

DRY_ROWS = 256  # rows of large data that a dry run looks at
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
) -> Fit:
    """Learn ``program`` from ``data`` with ``algorithm``; everything that was passed in stays as it was.

    Args:
        program: a Pyro model function, a `Program`, or a `Recipe` (built once, here, under the seed).
        data: rows: a tensor or array is the model's first positional argument, a mapping its keyword arguments.
        algorithm: SVI(...), EM(...), CAVI(...), NUTS(...).
        seed: the only source of randomness; the same program, data, algorithm, seed and machine give
            bit-for-bit identical fits.
        device: where parameters and batches live; the program runs under ``torch.device(device)``.
        dtype: of data and parameters; float32 unless the data or the algorithm asks for float64.
        progress: a progress bar; None: in terminals and notebooks only.
        validation: held-out rows on which the evidence is estimated during training.
        validate_every: steps between two such estimates (a tenth of all steps when None).
        callbacks: called as ``callback(step, info)`` after every step; KeyboardInterrupt raised there ends the run.
        start: a fit of the same program to continue from.

    Warns:
        FitWarning: once, where chains are bad (what they did, and what to do next), or where columns of the data of
            any other fit are constant or unscaled. A guide is judged when `Fit.verdict` is first asked, and warns then.

    Returns:
        The fit. Ctrl-C, or SIGTERM where the process has no handler of its own for it, ends the run after the step
        under way and returns the partial fit with status ``interrupted``; a second one ends the step too. Before the
        first step KeyboardInterrupt is raised, and nothing is left changed.

    Raises:
        IncompatibleError: the program does not offer what the algorithm needs; both sides are printed.
        NonFiniteError: a loss or gradient was not finite; ``error.fit`` is the last finite state.
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
    recipe = as_recipe(program)
    _check_start(recipe, start)
    _check_callbacks(callbacks)
    asked = dtype
    with listening():
        with allowed():
            data = collected(data)
        rest = (seed, place, validation, validate_every, progress, callbacks, start, recipe is program)
        try:
            result = _fitted(recipe, data, algorithm, asked or algorithm.dtype, *rest)
        except MixedDtypesError:
            given = _dtype_of(data) is torch.float64 or (start is not None and start.data.dtype is torch.float64)
            if asked is not None or algorithm.dtype is not torch.float64 or given:
                raise
            result = _fitted(recipe, data, algorithm, torch.float32, *rest)
            result = replace(result, notes={**result.notes, "dtype": SINGLE})
        if taken():  # it came after the last step: nothing is missing, but a script has to hear of it
            result = replace(result, status=Status.INTERRUPTED, message=f"interrupted at the end: {result.message}")
    if result.status is Status.DIVERGED:
        raise NonFiniteError(result.message, result)
    warn_if_bad(result)
    return result


def _fitted(
    recipe: Recipe,
    data: Any,
    algorithm: Algorithm,
    dtype: torch.dtype | None,
    seed: int,
    place: torch.device | None,
    validation: Any,
    validate_every: int | None,
    progress: bool | None,
    callbacks: Sequence[Callable[[int, Mapping[str, Any]], None]],
    start: Fit | None,
    scaled: bool,
) -> Fit:
    """The fit in one dtype, whatever became of it."""
    with isolated(seed, dtype=dtype or _dtype_of(data)), torch.inference_mode(False), torch.enable_grad():
        with allowed():
            built, dataset = _built(recipe, data, dtype, place, start)
        state = start.state if start is not None else None
        plates = contextlib.nullcontext() if algorithm.subsamples else whole_plates()
        modules = _modules_of(built, start)
        with Workspace(state, device=place, dtype=dataset.dtype, modules=modules) as workspace, plates:
            with allowed():
                run = _checked_run(algorithm, built, dataset, workspace, seed, start, validation)
                run.notes |= column_notes(dataset.entries, scaled=scaled)
            with ProgressBar(progress, algorithm.label) as report, allowed():
                run.progress = report
                before = Remembered(functions_of(built))
                run.hooks = tuple(callbacks)
                if validation is not None:
                    run.validation = Validation(validation, validate_every, run.program, dataset)
                began = time.perf_counter()
                outcome = algorithm.run(run)
                seconds = time.perf_counter() - began
                hold()
            _note_unregistered(workspace, run)
            _note_unused_terms(algorithm, run)
            if changed := before.changed():
                run.notes["remembers"] = f"{', '.join(changed)}: {REMEMBERS}"
            return _finished(recipe, algorithm, run, outcome, seconds)


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
    from ppl_gen.inference.guides import as_class, is_auto

    data = collected(data)
    with isolated(0, dtype=_dtype_of(data)), same_again(program):
        built, dataset = _built(as_recipe(program), data, None, None, None)
        guide = (
            None if is_auto(built.guide) or isinstance(as_class(built.guide)[0], type) else built.guide
        )  # made by a fit
        with Workspace(dtype=dataset.dtype, modules=_modules_of(built, None)):
            built, _ = adapted(built, _looked_at(dataset), dataset, vectors=False)
            return _inspected(built, dataset, guide)


def _checked_run(
    algorithm: Algorithm,
    program: Program,
    data: Dataset,
    workspace: Workspace,
    seed: int,
    start: Fit | None,
    validation: Any,
) -> Run:
    program, changes = adapted(program, _looked_at(data), data, vectors=algorithm.vectors)
    info = _inspected(program, data)
    check_observed(info, _looked_at(data))
    refuse_idle_masks(program, data.head(DRY_ROWS) if data.elements > LARGE else data.batch())
    require(algorithm.label, algorithm.needs, program.name, info.offers, why=info.lost(algorithm.needs))
    program, notes = _with_plate(program, info)
    notes |= changes
    if data.left_out:
        notes["left out"] = f"{', '.join(data.left_out)}: neither model nor recipe reads them"
    if data.taken:
        listed = ", ".join(f"{name} ({kind})" for name, kind in data.taken.items())
        notes["constants"] = f"{listed}: without rows, passed whole with every batch"
    run = Run(program, data, info, workspace, seed, start, notes=notes)
    algorithm.check(run)
    if not algorithm.subsamples:  # the one that does (SVI) has a guide, and looks when it is there
        check_masked(info, None)
    if validation is not None:
        require("validation", [("density", "exact evidence")], program.name, info.offers)
    return run


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


def _dtype_of(data: Any) -> torch.dtype:
    """The one decision about a fit's dtype: float64 where any entry holds it (a list of floats does), else float32."""
    if isinstance(data, Dataset):
        return data.dtype or torch.float32
    values = list(data.values()) if isinstance(data, Mapping) else data if isinstance(data, tuple) else [data]
    return torch.float64 if any(is_double(value) for value in values) else torch.float32


def _built(
    recipe: Recipe, data: Any, dtype: torch.dtype | None, device: torch.device | None, start: Fit | None
) -> tuple[Program, Dataset]:
    given = _as_given(data, dtype)
    given = Read(given) if type(given) is dict else given
    with torch.device(device or "cpu"):
        built = start.program if start is not None else recipe(given)
    read = start.data.read if start is not None else _read(given)
    dtype = dtype or torch.get_default_dtype()
    rows = as_dataset(data, built.model, dtype=dtype, device=device, read=read, data_dim=built.data_dim)
    refuse_unread_masks(rows, rows.left_out, built.name)
    return built, rows


def _read(given: Any) -> Collection[str]:
    """The entries that a recipe has read; of a mapping that does not tell, perhaps all."""
    return given.names if isinstance(given, Read) else list(given) if isinstance(given, Mapping) else ()


def _as_given(data: Any, dtype: torch.dtype | None) -> Any:
    """Recipes see tensors in the fit's dtype, whatever kind of array the user holds."""
    import numpy as np

    if isinstance(data, Dataset):
        data = data.original
    if isinstance(data, np.ndarray) and not isinstance(data, np.memmap) and data.dtype.kind in "fiub":
        data = shared(data)
    if isinstance(data, Tensor) and data.layout is torch.strided:
        data = data.detach().contiguous()
        return data.to(dtype) if data.is_floating_point() and dtype is not None else data
    return data


def _modules_of(program: Program, start: Fit | None) -> dict[str, nn.Module]:
    parts = {"model": program.model, "guide": program.guide if start is None else start.guide}
    return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}


def _inspected(program: Program, data: Dataset, guide: Any = None) -> ProgramInfo:
    batch = _looked_at(data)
    with looking():
        look = partial(dry_run, program, batch, fewer=lambda: data.head((batch.rows or 2) // 2))
        info = look()
        if predicted := predictions(program.model, batch, info):
            info = look(predicted=predicted)
        if guide is not None:
            info = look(guide=guide, predicted=predicted)
        check_names(info.sites, [*data.entries, *data.constants])
        info = info.refusing_sums(unenumerable(joint(program.model, info), batch, data.head, info))
        if "differentiable samples" not in info.offers:
            return info
        observed, latent = [s.name for s in info.select(kind="observed")], [s.name for s in info.select()]
        return info.refusing_gradients(why_not_differentiable(program.model, batch, observed, latent))


def _looked_at(data: Dataset) -> Batch:
    return data.head(DRY_ROWS) if data.elements > LARGE else data.batch()


def _with_plate(program: Program, info: ProgramInfo) -> tuple[Program, dict[str, str]]:
    """The program with the plate that the dry run took for that of the rows, and a note of it."""
    if info.data_plate in (None, program.data_plate):
        return program, {}
    taken = f"{info.data_plate!r}, the one plate that follows the rows"
    return replace(program, data_plate=info.data_plate), {"data plate": taken}


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


def iterate(algorithm: Iterative, run: Run) -> Outcome:
    """The one loop: steps, history, stopping, validation, interrupts and the non-finite guard."""
    state, source, limit = algorithm.init(run), algorithm.source(run), algorithm.limit(run)
    hold()  # from here on a signal ends the loop between two steps, and what was learned is kept
    history: dict[str, list[Any]] = {}
    checks: dict[str, list[float]] = {}
    converged = diverged = None
    interrupted = False
    done = 0
    try:
        for step in range(1, limit + 1):
            state, info = algorithm.step(state, source)
            _append(history, info, step)
            done = step
            for hook in run.hooks:
                hook(step, info)
            check()
            if step == min(limit, algorithm.stop_every()):  # by now every record that the rule may look at has begun
                check_record(getattr(algorithm, "stop_rule", None), history, validated=run.validation is not None)
            if step % algorithm.stop_every() == 0 and (converged := algorithm.stop({**history, **checks})) is not None:
                break
            if run.validation is not None and run.validation.due(step, limit):
                run.validation.record(checks, step, _finished(None, None, run, algorithm.outcome(state, run), 0.0))
            if run.progress is not None and (step == limit or step % max(1, limit // 200) == 0):
                run.progress(step, limit, _latest(info))
    except KeyboardInterrupt:
        interrupted = True
    except FloatingPointError as error:
        diverged = str(error)
    try:
        outcome = algorithm.outcome(state, run)
    except FloatingPointError as error:  # from here on the outcome is the last finite state
        diverged, outcome = str(error), algorithm.outcome(state, run)
    outcome.converged, outcome.interrupted = converged, interrupted
    outcome.diverged = diverged or outcome.diverged
    outcome.history = {**outcome.history, **{name: floats(values) for name, values in history.items()}}
    outcome.checks = checks
    outcome.cost = {"steps": done, **outcome.cost}
    return outcome


def _append(history: dict[str, list[Any]], info: Mapping[str, Any], step: int) -> None:
    """One row of the history; what this step did not record is missing (NaN)."""
    for name in info:
        history.setdefault(name, [float("nan")] * (step - 1))
    for name, values in history.items():
        values.append(info.get(name, float("nan")))


def floats(values: Sequence[Any]) -> list[float]:
    """One synchronisation for a whole history of scalars."""
    if all(isinstance(value, Tensor) for value in values):
        return [float(v) for v in torch.stack([v.detach().double() for v in values]).cpu()]
    return [float(v) for v in values]


def _latest(info: Mapping[str, Any]) -> str:
    return "  ".join(f"{name} {float(value):.4g}" for name, value in list(info.items())[:3])


def _finished(recipe: Recipe | None, algorithm: Algorithm | None, run: Run, outcome: Outcome, seconds: float) -> Fit:
    status, message = _status(outcome)
    return Fit(
        program=run.program,
        algorithm=algorithm.label if algorithm is not None else "",
        settings=repr(algorithm),
        data=run.data,
        info=_with_guide(run, outcome),
        state=outcome.state,
        learned=outcome.posterior,
        guide=outcome.guide,
        extra_modules=dict(outcome.modules),
        module_names=dict(run.workspace.modules),
        records={name: list(values) for name, values in outcome.history.items()},
        checks={name: list(values) for name, values in outcome.checks.items()},
        status=status,
        message=message,
        seed=run.seed,
        cost={"seconds": seconds, **outcome.cost},
        notes=dict(run.notes),
        recipe=recipe,
        guide_source=guide_source(algorithm, run, outcome),
    )


def _with_guide(run: Run, outcome: Outcome) -> ProgramInfo:
    """The site table, with the sites of a guide that came into being during the run (coordinate updates)."""
    if outcome.guide is None or run.info.guide_sites is not None:
        return run.info
    with Workspace(outcome.state, device=run.data.device, dtype=run.data.dtype), isolated():
        batch = run.data.batch()
        fewer, known = (lambda: run.data.head((batch.rows or 2) // 2)), run.info.predicted
        info = dry_run(run.program, batch, guide=outcome.guide, fewer=fewer, predicted=known)
        return info.as_tried(run.info)


def _status(outcome: Outcome) -> tuple[Status, str]:
    steps = int(outcome.cost.get("steps", 0))
    if outcome.diverged is not None:
        return Status.DIVERGED, outcome.diverged
    if outcome.failed is not None:
        return Status.FAILED, outcome.failed
    if outcome.interrupted:
        return Status.INTERRUPTED, outcome.message or f"interrupted after {steps} steps; what was learned is kept"
    if isinstance(outcome.converged, EarlyStop):
        return Status.STOPPED, str(outcome.converged)
    if outcome.converged is not None:
        return Status.CONVERGED, outcome.converged
    return Status.FINISHED, outcome.message or f"ran all {steps} steps"
