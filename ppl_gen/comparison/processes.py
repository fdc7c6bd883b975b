"""The fits of a comparison in several processes."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ppl_gen.comparison.runner import Job, Line, Setup, inspected, line_of
from ppl_gen.comparison.spread import Spread
from ppl_gen.data.batching import as_dataset
from ppl_gen.data.on_disk import as_received, for_sending
from ppl_gen.data.streamed import StreamedRows
from ppl_gen.fits.result import Status
from ppl_gen.runtime.apart import call, died, pickled, request, setting
from ppl_gen.runtime.interrupts import taken, telling
from ppl_gen.runtime.progress import ProgressBar
from ppl_gen.runtime.workers import heeding, scratch, spawning, unworried

__all__ = ["side_by_side"]

_FLAG, _SETUP, _BEGUN, _LOST = "interrupted", "setup", "begun", "lost"  # files of a comparison that runs


def _parcels(setup: Setup, jobs: Sequence[Job]) -> tuple[bytes, list[tuple[str, bytes, int]]]:
    """The setup, and every job, as bytes."""
    sent = _pickled(
        replace(
            setup,
            train=for_sending(setup.train),
            test=for_sending(setup.test),
            device=None if setup.device is None else str(setup.device),
        ),
        "the program or the data",
    )
    return sent, [(label, _pickled(algorithm, label), seed) for label, algorithm, seed in jobs]


def side_by_side(
    setup: Setup,
    jobs: Sequence[Job],
    spread: Spread,
    progress: bool | None,
    known: Mapping[int, Line] | None = None,
) -> dict[int, Line]:
    """The lines by the place of their job, all but the ``known`` made in processes of their own.

    Each fit has a process to itself, which a worker of joblib's backend waits for. One that dies is a line that says
    so. Should a worker itself be ended, loky ends the others, and what they had begun is begun again, but for what ran
    below the one that was ended.

    Raises:
        TypeError: if program, data or an algorithm cannot be sent to another process.
    """
    parcels, done, excuses = _parcels(setup, jobs), dict(known or {}), 1
    with scratch() as folder, unworried(), telling((folder / _FLAG).touch):
        (folder / _SETUP).write_bytes(parcels[0])
        try:
            with ProgressBar(progress, "comparison", _running(folder, jobs, done)) as shown:
                while left := [i for i in range(len(jobs)) if i not in done]:
                    if shown is not None:
                        shown(len(done), len(jobs), "")
                    try:
                        for i, line in _results(setup, jobs, spread, parcels, left, folder):
                            if line is not None:
                                done[i] = line
                            if shown is not None:
                                shown(len(done), len(jobs), "")
                        break
                    except Exception as error:
                        ended = [i for i in left if i not in done and _mark(folder, _LOST, i).exists()]
                        if not ended and excuses:
                            excuses -= 1
                            continue
                        why = f"its worker ended: {type(error).__name__}: {error}"
                        for i in ended or [i for i in left if i not in done]:
                            done[i] = Line(jobs[i][0], jobs[i][2], str(Status.FAILED), why)
        except KeyboardInterrupt:
            return done
        taken()  # the processes were told
    return done


def _results(
    setup: Setup,
    jobs: Sequence[Job],
    spread: Spread,
    parcels: tuple[bytes, list[tuple[str, bytes, int]]],
    left: Sequence[int],
    folder: Path,
) -> Iterator[tuple[int, Line | None]]:
    """The lines of the jobs ``left`` as they come; None for one that Ctrl-C came before."""
    from joblib import delayed

    setup_sent = spread.sendable(parcels[0], folder / _SETUP)
    made = setting()
    calls = []
    for i in left:
        asked = request(_remote, folder, os.getpid(), i, *parcels[1][i])
        calls.append(delayed(_called)(call, i, made, [asked, setup_sent], str(_mark(folder, _LOST, i)), str(folder)))
    with spawning():
        results = spread.pool(len(left))(calls)
    for i, kind, content in results:
        label, _, seed = jobs[i]
        if kind == "answer":
            yield i, _received(setup, pickle.loads(content)) if content else None
            continue
        if kind == "died":
            why, trail = f"its process ended before the fit was judged: {died(content)}", ""
        else:
            trail = content.decode(errors="replace")
            why = f"its process could not make the fit: {trail.strip().splitlines()[-1]}"
        yield i, Line(label, seed, str(Status.FAILED), why, traceback=trail)


def _calling() -> Callable[..., tuple[int, str, Any]]:
    """What a worker is sent: like `apart.call`, it imports nothing of this package."""

    def called(call: Any, index: int, *args: Any) -> tuple[int, str, Any]:
        return (index, *call(*args))

    return called


_called = _calling()


def _running(folder: Path, jobs: Sequence[Job], done: Mapping[int, Line]) -> Callable[[], str]:
    """What tells which fits are under way: processes that share this machine's files leave one for each they begin."""

    def names() -> str:
        begun = [i for i in range(len(jobs)) if i not in done and _mark(folder, _BEGUN, i).exists()]
        return "; ".join(f"{jobs[i][0]}, seed {jobs[i][2]}" for i in begun)

    return names


def _mark(folder: Path, kind: str, index: int) -> Path:
    return folder / f"{kind}{index}"


def _pickled(value: Any, what: str) -> bytes:
    try:
        return pickled(value)
    except Exception as error:
        raise TypeError(f"n_jobs: {what} cannot be sent to another process ({error}); use n_jobs=1") from error


def _remote(folder: Path, owner: int, index: int, label: str, algorithm: bytes, seed: int, sent: bytes) -> bytes:
    """One fit in a process of its own; nothing where Ctrl-C came before it was begun.

    ``folder`` is there on the machine of the comparison only: elsewhere nobody tells of Ctrl-C.
    """
    if not folder.exists():
        return _fitted(sent, label, algorithm, seed)
    flag, content = folder / _FLAG, sent or (folder / _SETUP).read_bytes()
    try:
        with heeding(flag, owner):
            if flag.exists():
                return b""
            with contextlib.suppress(OSError):  # it is only looked at
                _mark(folder, _BEGUN, index).touch()
            return _fitted(content, label, algorithm, seed)
    except KeyboardInterrupt:
        return b""


def _fitted(sent: bytes, label: str, algorithm: bytes, seed: int) -> bytes:
    setup: Setup = pickle.loads(sent)
    setup = replace(setup, train=as_received(setup.train), test=as_received(setup.test))
    if inspected(setup)[1] != setup.fingerprint:
        text = (
            "the program draws other values in another process: a module that it imports makes random numbers, such as "
            "the first weights of a network. Make them in a pg.Recipe, or use n_jobs=1"
        )
        return _pickled(Line(label, seed, str(Status.FAILED), text), label)
    line = line_of(setup, label, pickle.loads(algorithm), seed, False)
    if line.fit is not None:  # the rows are at home already
        kept: Any = {"entries": {}, "constants": {}, "original": None, "on_batch": None}
        if isinstance(line.fit.data, StreamedRows):
            kept |= {"stream": None, "made": None}
        bare = replace(line.fit, data=replace(line.fit.data, **kept))
        bare.computed.update(line.fit.computed)  # what was judged once
        line = replace(line, fit=bare)
    try:
        return _pickled(line, label)
    except TypeError as error:
        return _pickled(replace(line, fit=None, message=f"{line.message}; its fit is lost: {error}"), label)


def _received(setup: Setup, line: Line) -> Line:
    if line.fit is None:
        return line
    kept = line.fit.data
    rows = as_dataset(setup.train, line.fit.program.model, like=kept, missing=True)
    whole = replace(line.fit, data=rows)
    whole.computed.update(line.fit.computed)
    return replace(line, fit=whole)
