"""What a comparison runs: one line per fit, in this process or in several."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import pickle
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine

from ppl_gen.data.batching import Batch, as_dataset
from ppl_gen.driver import fit as learn
from ppl_gen.errors import FitWarning, IncompatibleError, NonFiniteError
from ppl_gen.handlers.unobserved import unobserved
from ppl_gen.inference.base import Algorithm
from ppl_gen.interrupts import allowed, taken, telling
from ppl_gen.isolation import isolated
from ppl_gen.newrows import check_columns
from ppl_gen.program import Program, Recipe, filtered
from ppl_gen.result import Fit, Status
from ppl_gen.workers import heeding, initializer, scratch, spawning, unworried

if TYPE_CHECKING:
    import pandas

    from ppl_gen.diagnostics.evidence import Evidence
    from ppl_gen.dryrun import ProgramInfo

__all__ = ["Line", "Task", "counted", "inspected", "one_by_one", "side_by_side"]

Job = tuple[str, Algorithm, int]


@dataclass(frozen=True)
class Line:
    """One algorithm under one seed: its fit where there is one, and what the yardsticks say of it."""

    label: str
    seed: int
    status: str
    message: str
    seconds: float = math.nan
    fit: Fit | None = None
    evidence: Evidence | None = None
    verdict: str = ""
    pareto_k: float = math.nan
    summary: pandas.DataFrame | None = None
    traceback: str = ""


@dataclass(frozen=True)
class Task:
    """What all fits of a comparison share; ``mark`` tells whether another process holds the same program."""

    recipe: Recipe
    train: Any
    test: Any
    particles: int = 100
    draws: int = 500
    threads: int = 1
    device: str | torch.device | None = None
    dtype: torch.dtype | None = None
    mark: str = ""


@contextlib.contextmanager
def counted(threads: int) -> Iterator[None]:
    """Torch on so many threads inside: the last bits of a sum depend on how it was shared out.

    >>> before = torch.get_num_threads()
    >>> with counted(1):
    ...     torch.get_num_threads()
    1
    >>> torch.get_num_threads() == before
    True
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def inspected(task: Task) -> tuple[ProgramInfo, str]:
    """Dry-run the program on the training rows and check the held-out ones; with a mark of what it draws on a few.

    The mark is the hash of one run of model and guide under a fixed seed: a process that imported a module of networks
    again holds other weights, and draws something else.

    Raises:
        ValueError, TypeError: as `pg.check` does, or where the held-out rows are unlike the training rows.
    """
    from ppl_gen.driver import _built, _dtype_of, _inspected, _modules_of
    from ppl_gen.isolation import Workspace

    place = None if task.device is None else torch.device(task.device)
    with counted(task.threads), isolated(0, dtype=task.dtype or _dtype_of(task.train)):
        with allowed():
            built, dataset = _built(task.recipe, task.train, task.dtype, place, None)
        space = Workspace(device=place, dtype=dataset.dtype, training=False, modules=_modules_of(built, None))
        with space, allowed():
            info = _inspected(built, dataset)
            held = as_dataset(task.test, built.model, read=dataset.read, data_dim=dataset.data_dim)
            check_columns("test", held, dataset)
            with torch.no_grad():
                return info, _mark(built, dataset.head(64))


def _mark(program: Program, batch: Batch) -> str:
    digest = hashlib.sha256()
    guide = program.guide if _is_plain_guide(program.guide) else None
    for part in (unobserved(program.model), guide and filtered(guide)):
        if part is not None:
            trace = poutine.trace(part).get_trace(*batch.args, **batch.kwargs)
            for name in sorted(trace.nodes):
                value = trace.nodes[name].get("value")
                if isinstance(value, torch.Tensor):
                    digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _is_plain_guide(guide: Any) -> bool:
    from pyro.infer.autoguide import AutoGuide

    return guide is not None and not isinstance(guide, type | AutoGuide)


def one_by_one(task: Task, jobs: Sequence[Job], progress: bool | None) -> dict[int, Line]:
    """The lines by the place of their job, made in this process; an interrupted one is the last."""
    done: dict[int, Line] = {}
    with contextlib.suppress(KeyboardInterrupt):
        for i, (label, algorithm, seed) in enumerate(jobs):
            done[i] = _line(task, label, algorithm, seed, progress)
            if taken() or done[i].status == Status.INTERRUPTED:
                break
    return done


def side_by_side(task: Task, jobs: Sequence[Job], n_jobs: int, progress: bool | None) -> dict[int, Line]:
    """The lines by the place of their job, made in ``n_jobs`` processes; all numbers are those of `one_by_one`.

    Raises:
        TypeError: if program, data or an algorithm cannot be sent to another process.
        ValueError: if joblib was told to run threads.
    """
    from joblib import delayed
    from joblib.parallel import get_active_backend

    if getattr(get_active_backend()[0], "uses_threads", False):
        raise ValueError(
            "n_jobs: joblib is set to run threads, but fits of one process share Pyro's parameter store; "
            'use joblib.parallel_config(backend="loky"), or n_jobs=1'
        )
    sent = _pickled(replace(task, device=None if task.device is None else str(task.device)), "the program or the data")
    n_jobs = max(2, min(n_jobs, len(jobs))) if n_jobs > 0 else n_jobs  # more would only be idle
    packed = [(label, _pickled(algorithm, label), seed) for label, algorithm, seed in jobs]
    done: dict[int, Line] = {}
    with _bar(progress, len(jobs)) as advance, _pool(n_jobs) as (pool, flag), unworried():
        calls = [delayed(_remote)(sys.path, flag, os.getpid(), sent, i, *job) for i, job in enumerate(packed)]
        try:
            with spawning():
                results = pool(calls)
            for i, content in results:
                if content is not None:
                    done[i] = _received(task, pickle.loads(content))
                    advance(done[i].label)
        except KeyboardInterrupt:
            return done
        except Exception as error:  # a process that died takes the lines it had not finished with it
            text = f"its process ended: {type(error).__name__}: {error}"
            for i, (label, _, seed) in enumerate(jobs):
                done.setdefault(i, Line(label, seed, str(Status.FAILED), text))
        taken()  # the workers were told
    return done


@contextlib.contextmanager
def _pool(n_jobs: int) -> Iterator[tuple[Any, Path | None]]:
    """joblib's pool; and for its own workers the file that tells them of Ctrl-C, so that they send what they have."""
    from joblib import Parallel
    from joblib.parallel import get_active_backend

    # Bytes go and come, so that joblib neither maps arrays into read-only memory nor fails on a result.
    settings: dict[str, Any] = {"n_jobs": n_jobs, "return_as": "generator_unordered", "batch_size": 1}
    if type(get_active_backend()[0]).__name__ != "LokyBackend":
        with allowed():
            yield Parallel(**settings), None
        return
    with scratch() as folder:
        flag = folder / "interrupted"
        with telling(flag.touch):
            yield Parallel(**settings, **initializer()), flag


def _pickled(value: Any, what: str) -> bytes:
    from joblib.externals.loky.backend.reduction import dumps

    try:
        return bytes(dumps(value))
    except Exception as error:
        raise TypeError(f"n_jobs: {what} cannot be sent to another process ({error}); use n_jobs=1") from error


def _remote(
    path: list[str], flag: Path | None, owner: int, sent: bytes, index: int, label: str, algorithm: bytes, seed: int
) -> tuple[int, bytes | None]:
    """One fit in a process of its own; None where Ctrl-C came before it was begun."""
    # The process may have been started before the caller's sys.path was complete.
    sys.path.extend(entry for entry in path if entry not in sys.path)
    if flag is None:
        return index, _fitted(sent, label, algorithm, seed)
    try:
        with heeding(flag, owner):
            return index, None if flag.exists() else _fitted(sent, label, algorithm, seed)
    except KeyboardInterrupt:
        return index, None


def _fitted(sent: bytes, label: str, algorithm: bytes, seed: int) -> bytes:
    task: Task = pickle.loads(sent)
    if inspected(task)[1] != task.mark:
        text = (
            "the program draws other values in another process: a module that it imports makes random numbers, such as "
            "the first weights of a network. Make them in a pg.Recipe, or use n_jobs=1"
        )
        return _pickled(Line(label, seed, str(Status.FAILED), text), label)
    line = _line(task, label, pickle.loads(algorithm), seed, False)
    if line.fit is not None:  # the rows are at home already
        bare = replace(line.fit, data=replace(line.fit.data, entries={}, constants={}, original=None, on_batch=None))
        bare.computed.update(line.fit.computed)  # what was judged once
        line = replace(line, fit=bare)
    try:
        return _pickled(line, label)
    except TypeError as error:
        return _pickled(replace(line, fit=None, message=f"{line.message}; its fit is lost: {error}"), label)


def _received(task: Task, line: Line) -> Line:
    if line.fit is None:
        return line
    kept = line.fit.data
    rows = as_dataset(task.train, line.fit.program.model, like=kept)
    whole = replace(line.fit, data=rows)
    whole.computed.update(line.fit.computed)
    return replace(line, fit=whole)


@contextlib.contextmanager
def _bar(wanted: bool | None, total: int) -> Iterator[Any]:
    if not (wanted if wanted is not None else sys.stderr.isatty() or "ipykernel" in sys.modules):
        yield lambda label: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        row = bar.add_task("comparison", total=total)
        yield lambda label: bar.update(row, advance=1, description=f"comparison, {label} done")


def _line(task: Task, label: str, algorithm: Algorithm, seed: int, progress: bool | None) -> Line:
    """One fit and its yardsticks; whatever goes wrong is what the line says."""
    began = time.perf_counter()
    kept, text, trail = None, "", ""
    with counted(task.threads):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FitWarning)  # the row has a verdict
                result = learn(
                    task.recipe,
                    task.train,
                    algorithm,
                    seed=seed,
                    device=task.device,
                    dtype=task.dtype,
                    progress=progress,
                )
                return _judged(task, label, result)
        except IncompatibleError as error:
            status, text = "incompatible", str(error)
        except NonFiniteError as error:
            status, text, kept = str(Status.DIVERGED), str(error), error.fit
        except Exception as error:  # whatever a program may raise is a row, and the row reports it
            status, text, trail = str(Status.FAILED), f"{type(error).__name__}: {error}", traceback.format_exc()
    seconds = time.perf_counter() - began
    return Line(label, seed, status, text, seconds, kept, verdict=f"do not trust: {status}", traceback=trail)


def _judged(task: Task, label: str, result: Fit) -> Line:
    line = Line(label, result.seed, str(result.status), result.message, float(result.cost["seconds"]), result)
    try:
        with allowed():
            line = replace(line, evidence=result.evidence(task.test, particles=task.particles, draws=task.draws))
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
        verdict = f"not diagnosed: {type(error).__name__}: {error}"
        return replace(line, verdict=verdict, traceback=traceback.format_exc())
    k = float(summary.attrs.get("pareto_k", math.nan))
    return replace(line, summary=summary, verdict=str(summary.attrs["verdict"]), pareto_k=k)
