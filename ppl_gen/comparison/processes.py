"""The fits of a comparison in several processes, where that is worth it."""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ppl_gen.comparison.runner import Job, Line, Task, inspected, line_of, one_by_one
from ppl_gen.data.batching import as_dataset
from ppl_gen.fits.result import Status
from ppl_gen.runtime.interrupts import allowed, taken, telling
from ppl_gen.runtime.progress import ProgressBar, called
from ppl_gen.runtime.workers import heeding, initializer, scratch, spawning, unworried

__all__ = ["shared", "worthwhile"]

START = 10.0  # seconds that workers take to start, most of it importing torch and Pyro; 0: they are always started


def shared(task: Task, jobs: Sequence[Job], n_jobs: int, progress: bool | None) -> tuple[dict[int, Line], str]:
    """The lines by the place of their job, made in up to ``n_jobs`` processes, and what is to be noted of that.

    The first is made here. It is given up, and made again by a worker, where it takes longer than workers to start: by
    then they would have been worth it.

    Raises:
        TypeError: if program, data or an algorithm cannot be sent to another process.
        ValueError: if joblib was told to run threads.
    """
    parcels = _parcels(task, jobs)
    if START <= 0 or not _ours():
        return side_by_side(task, jobs, n_jobs, progress, parcels, {}), ""
    began = time.perf_counter()
    try:
        first = _tried(task, jobs, progress)
    except KeyboardInterrupt:  # before its first step
        return {}, ""
    seconds = time.perf_counter() - began
    if first is None:
        return side_by_side(task, jobs, n_jobs, progress, parcels, {}), ""
    if taken() or first.status == Status.INTERRUPTED:
        return {0: first}, ""
    if worthwhile(seconds, len(jobs) - 1, n_jobs):
        return side_by_side(task, jobs, n_jobs, progress, parcels, {0: first}), ""
    note = f"; one process ran them all: the first took {seconds:.1f} s, and starting others takes about {START:g} s"
    return one_by_one(task, jobs, progress, {0: first}), note


def worthwhile(seconds: float, rest: int, n_jobs: int) -> bool:
    """Whether ``rest`` fits of so many seconds each gain more from ``n_jobs`` processes than these cost.

    >>> worthwhile(3.0, 5, 2), worthwhile(30.0, 5, 2), worthwhile(1000.0, 1, 2)
    (False, True, False)
    """
    from joblib import effective_n_jobs

    processes = min(effective_n_jobs(n_jobs), rest)
    return processes > 1 and seconds * rest * (1 - 1 / processes) > START


class _GivenUpError(BaseException):
    """The first fit has taken as long as workers would have: no error of a program, so nothing catches it."""


def _tried(task: Task, jobs: Sequence[Job], progress: bool | None) -> Line | None:
    """The first line; None where its fit took longer than `START`."""
    (label, algorithm, seed), until = jobs[0], time.perf_counter() + START

    def watch(step: int, info: Mapping[str, Any]) -> None:
        if time.perf_counter() > until and len(jobs) > 1:
            raise _GivenUpError

    try:
        with called(f"{label}, seed {seed} (1 of {len(jobs)})"):
            return line_of(task, label, algorithm, seed, progress, [watch])
    except _GivenUpError:
        return None


def _ours() -> bool:
    """Whether the processes are loky's, of this machine; raises ValueError for threads."""
    from joblib.parallel import get_active_backend

    backend = get_active_backend()[0]
    if getattr(backend, "uses_threads", False):
        raise ValueError(
            "n_jobs: joblib is set to run threads, but fits of one process share Pyro's parameter store; "
            'use joblib.parallel_config(backend="loky"), or n_jobs=1'
        )
    return type(backend).__name__ == "LokyBackend"


def _parcels(task: Task, jobs: Sequence[Job]) -> tuple[bytes, list[tuple[str, bytes, int]]]:
    """The task, and every job, as bytes."""
    _ours()
    sent = _pickled(replace(task, device=None if task.device is None else str(task.device)), "the program or the data")
    return sent, [(label, _pickled(algorithm, label), seed) for label, algorithm, seed in jobs]


def side_by_side(
    task: Task,
    jobs: Sequence[Job],
    n_jobs: int,
    progress: bool | None,
    parcels: tuple[bytes, list[tuple[str, bytes, int]]],
    known: Mapping[int, Line],
) -> dict[int, Line]:
    """The lines by the place of their job, all but the ``known`` made in ``n_jobs`` processes."""
    from joblib import delayed

    (sent, packed), done = parcels, dict(known)
    left = [i for i in range(len(jobs)) if i not in done]
    n_jobs = max(2, min(n_jobs, len(left))) if n_jobs > 0 else n_jobs  # more would only be idle
    with _pool(n_jobs) as (pool, flag), unworried():
        calls = [delayed(_remote)(sys.path, flag, os.getpid(), sent, i, *packed[i]) for i in left]
        try:
            with ProgressBar(progress, "comparison", _running(flag, jobs, done)) as shown:
                if shown is not None:
                    shown(len(done), len(jobs), "")
                with spawning():
                    results = pool(calls)
                for i, content in results:
                    if content is not None:
                        done[i] = _received(task, pickle.loads(content))
                        if shown is not None:
                            shown(len(done), len(jobs), "")
        except KeyboardInterrupt:
            return done
        except Exception as error:  # a process that died takes the lines it had not finished with it
            text = f"its process ended: {type(error).__name__}: {error}"
            for i, (label, _, seed) in enumerate(jobs):
                done.setdefault(i, Line(label, seed, str(Status.FAILED), text))
        taken()  # the workers were told
    return done


def _running(flag: Path | None, jobs: Sequence[Job], done: Mapping[int, Line]) -> Callable[[], str]:
    """What tells which fits are under way: workers leave a file for each that they begin."""

    def names() -> str:
        if flag is None:
            return ""
        begun = [i for i in range(len(jobs)) if i not in done and _begun(flag, i).exists()]
        return "; ".join(f"{jobs[i][0]}, seed {jobs[i][2]}" for i in begun)

    return names


def _begun(flag: Path, index: int) -> Path:
    return flag.with_name(f"begun{index}")


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
            if flag.exists():
                return index, None
            with contextlib.suppress(OSError):  # it is only looked at
                _begun(flag, index).touch()
            return index, _fitted(sent, label, algorithm, seed)
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
    line = line_of(task, label, pickle.loads(algorithm), seed, False)
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
    rows = as_dataset(task.train, line.fit.program.model, like=kept, missing=True)
    whole = replace(line.fit, data=rows)
    whole.computed.update(line.fit.computed)
    return replace(line, fit=whole)
