"""What a comparison runs: one line per fit."""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine

from ppl_gen.comparison.kept import keep, kept_line, place_of
from ppl_gen.comparison.lines import Job, Line, Setup
from ppl_gen.data.batching import Batch, as_dataset
from ppl_gen.diagnostics.diagnosis import DRAWS
from ppl_gen.diagnostics.verdicts import Verdict
from ppl_gen.draws.new_data import check_columns
from ppl_gen.errors import FitWarning, IncompatibleError, NonFiniteError
from ppl_gen.fits import preparing
from ppl_gen.fits.driver import fit as learn
from ppl_gen.fits.preparing import prepared
from ppl_gen.fits.result import Fit, Status
from ppl_gen.fitting.algorithm import Algorithm
from ppl_gen.handlers.unobserved import unobserved
from ppl_gen.program.missing import refuse_read_nan
from ppl_gen.program.program import Program, with_known_kwargs
from ppl_gen.runtime.interrupts import allowed, taken
from ppl_gen.runtime.progress import called
from ppl_gen.runtime.threads import torch_threads

if TYPE_CHECKING:
    from ppl_gen.program.info import ProgramInfo

__all__ = ["Callback", "Job", "Line", "Setup", "inspected", "finished_lines", "line_of", "one_by_one"]

Callback = Callable[[int, Mapping[str, Any]], None]


def inspected(setup: Setup) -> tuple[ProgramInfo, str]:
    """Dry-run the program on the training rows and check the held-out ones; with a fingerprint of what it draws.

    The fingerprint is the hash of one run of model and guide on a few rows under a fixed seed: a process that imported
    a module of networks again holds other weights, and draws something else.

    Raises:
        ValueError, TypeError: as `pg.check` does, or where the held-out rows are unlike the training rows.
    """
    place = None if setup.device is None else torch.device(setup.device)
    made = prepared(setup.recipe, setup.train, dtype=setup.dtype, device=place, training=False)
    with torch_threads(setup.threads), allowed(), made as (built, dataset, _):
        info = preparing.inspected(built, dataset)
        held = as_dataset(setup.test, built.model, read=dataset.read, data_dim=dataset.data_dim, missing=True)
        check_columns("test", held, dataset)
        refuse_read_nan(built.model, held)
        with torch.no_grad():
            return info, _fingerprint(built, dataset.head(64))


def _fingerprint(program: Program, batch: Batch) -> str:
    digest = hashlib.sha256()
    guide = program.guide if _is_plain_guide(program.guide) else None
    for part in (unobserved(program.model), guide and with_known_kwargs(guide)):
        if part is not None:
            trace = poutine.trace(part).get_trace(*batch.args, **batch.kwargs)
            for name in sorted(trace.nodes):
                value = trace.nodes[name].get("value")
                if isinstance(value, torch.Tensor):
                    digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _is_plain_guide(guide: Any) -> bool:
    from pyro.infer.autoguide import AutoGuide

    from ppl_gen.inference.guides.resolved import as_class

    kind, _ = as_class(guide)
    return kind is not None and not isinstance(kind, type | AutoGuide)


def one_by_one(
    setup: Setup, jobs: Sequence[Job], progress: bool | None, known: Mapping[int, Line] | None = None
) -> dict[int, Line]:
    """The lines by the place of their job, all but the ``known`` made here; an interrupted one is the last."""
    done: dict[int, Line] = dict(known or {})
    with contextlib.suppress(KeyboardInterrupt):
        for i, (label, algorithm, seed) in enumerate(jobs):
            if i in done:
                continue
            with called(f"{label}, seed {seed} ({i + 1} of {len(jobs)})"):
                done[i] = line_of(setup, label, algorithm, seed, progress)
            if taken() or done[i].status == Status.INTERRUPTED:
                break
    return done


def line_of(
    setup: Setup, label: str, algorithm: Algorithm, seed: int, progress: bool | None, callbacks: Sequence[Callback] = ()
) -> Line:
    """One fit and its yardsticks; whatever goes wrong is what the line says. Kept, where the setup has a folder."""
    line = _made(setup, label, algorithm, seed, progress, callbacks)
    keep(setup, line)
    return line


def _made(
    setup: Setup, label: str, algorithm: Algorithm, seed: int, progress: bool | None, callbacks: Sequence[Callback]
) -> Line:
    began = time.perf_counter()
    kept, text, trail = None, "", ""
    with torch_threads(setup.threads):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FitWarning)  # the row has a verdict
                return _judged(setup, label, _learned(setup, label, algorithm, seed, progress, callbacks))
        except IncompatibleError as error:
            status, text = str(Status.INCOMPATIBLE), str(error)
        except NonFiniteError as error:
            status, text, kept = str(Status.DIVERGED), str(error), error.fit
        except Exception as error:  # whatever a program may raise is a row, and the row reports it
            status, text, trail = str(Status.FAILED), f"{type(error).__name__}: {error}", traceback.format_exc()
    seconds = time.perf_counter() - began
    verdict = Verdict("do not trust", f"the run ended {status}") if kept is not None else None
    return Line(
        label, seed, status, text, seconds, kept, None, verdict, traceback=trail, undiagnosed=f"no fit: {status}"
    )


def _learned(
    setup: Setup, label: str, algorithm: Algorithm, seed: int, progress: bool | None, callbacks: Sequence[Callback] = ()
) -> Fit:
    return learn(
        setup.recipe,
        setup.train,
        algorithm,
        seed=seed,
        device=setup.device,
        dtype=setup.dtype,
        progress=progress,
        callbacks=callbacks,
        checkpoint=None if setup.folder is None else place_of(setup.folder, label, seed) / "run",
    )


def finished_lines(setup: Setup, jobs: Sequence[Job]) -> dict[int, Line]:
    """The lines that are finished in the setup's folder, by the place of their job; no step is made for them."""
    found: dict[int, Line] = {}
    for i, (label, algorithm, seed) in enumerate(jobs if setup.folder is not None else ()):
        if (kept := kept_line(setup, label, seed)) is not None:
            line, fitted = kept
            found[i] = _regained(setup, algorithm, line) if fitted else line
    return found


def _regained(setup: Setup, algorithm: Algorithm, line: Line) -> Line:
    """The line with its fit again, from its checkpoint."""
    with torch_threads(setup.threads), warnings.catch_warnings():
        warnings.simplefilter("ignore", FitWarning)
        try:
            fit: Fit | None = _learned(setup, line.label, algorithm, line.seed, False)
        except NonFiniteError as error:
            fit = error.fit
    assert fit is not None
    if line.verdict is not None:
        fit.computed["verdict"] = fit.computed["verdict", DRAWS] = line.verdict
    if line.summary is not None:
        fit.computed["diagnosis"] = line.summary.copy()
    return replace(line, fit=fit)


def _judged(setup: Setup, label: str, result: Fit) -> Line:
    line = Line(label, result.seed, str(result.status), result.message, float(result.cost["seconds"]), result)
    try:
        with allowed():
            line = replace(line, evidence=result.evidence(setup.test, particles=setup.particles, draws=setup.draws))
    except KeyboardInterrupt:
        return replace(line, status=str(Status.INTERRUPTED), message="interrupted before it was judged")
    except IncompatibleError as error:  # a program without a density has no held-out value: the row says so
        line = replace(line, message=f"{line.message}; no held-out value: {error}")
    except Exception as error:  # the row says why there is no value
        line = replace(line, message=f"{line.message}; no held-out value: {error}", traceback=traceback.format_exc())
    try:
        with allowed():
            summary = result.diagnose()
    except KeyboardInterrupt:
        return replace(line, status=str(Status.INTERRUPTED), message="interrupted before it was judged")
    except Exception as error:  # the row says why there is no verdict
        why = f"not diagnosed: {type(error).__name__}: {error}"
        return replace(line, undiagnosed=why, traceback=traceback.format_exc())
    k = float(summary.attrs.get("pareto_k", math.nan))
    return replace(line, summary=summary, verdict=result.computed["verdict"], pareto_k=k)
