"""Several Markov chains, one after another or side by side in worker processes, with the same draws either way.

A chain is a function of its plan alone: its own seed, one thread, a potential that it loads itself. Each writes its
draws into a table as it goes (a memory-mapped file where it runs in a worker), so that progress is seen from outside
and an interrupted run keeps what was drawn.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ppl_gen.capture.replay import Recording
from ppl_gen.handlers.whole_plates import whole_plates
from ppl_gen.inference.mcmc.kernel import Chain, DrawTable, sample_chain
from ppl_gen.runtime.apart import call, died, inside, pickled, request, setting
from ppl_gen.runtime.interrupts import check, hold
from ppl_gen.runtime.threads import torch_threads
from ppl_gen.runtime.workers import scratch
from ppl_gen.workspace.isolation import isolated, validation_off
from ppl_gen.workspace.workspace import Workspace

__all__ = ["run_chains", "threads", "workers"]

_POLL = 0.2  # seconds between two looks at the workers
_DYING = 5.0  # seconds in which a worker has noticed that its parent was killed
_WORTHWHILE = 6.0  # seconds: starting a worker costs about three, most of it importing torch and Pyro

Report = Callable[[Sequence[DrawTable]], None]


def _run(chain: Chain, table: DrawTable, tick: Callable[[], None]) -> None:
    records = None if chain.checkpoint is None else chain.checkpoint.records
    # A worker of a run that was killed may still be on its way to its end.
    alone = contextlib.nullcontext() if records is None else records.claimed(_DYING)
    with alone, torch_threads(1), isolated(chain.seed, dtype=chain.dtype), validation_off(), whole_plates():
        potential = chain.potential
        sample_chain(chain, potential.load() if isinstance(potential, Recording) else potential, table, tick)


def _work(path: str, stop: str, content: bytes) -> bytes:
    """What a process does: one chain into one file, until it is done or the file ``stop`` is there.

    Gives the error that ended it, or None, pickled.
    """

    def tick() -> None:
        if os.path.exists(stop):
            raise KeyboardInterrupt

    try:
        try:
            chain: Chain = pickle.loads(content)
        except Exception as error:
            raise _CannotTravel(f"{type(error).__name__}: {error}") from error
        if chain.checkpoint is not None:
            chain.checkpoint.begin()
        with Workspace(device=chain.device, dtype=chain.dtype, modules=dict(chain.modules)):
            with contextlib.suppress(KeyboardInterrupt):
                _run(chain, DrawTable.of(chain, Path(path), "r+"), tick)
    except Exception as error:
        error.add_note(traceback.format_exc())
        try:
            return pickled(error)
        except Exception:  # an error of the user's that holds what cannot travel
            return pickled(RuntimeError(f"{type(error).__name__}: {error}"))
    return pickled(None)


def threads(chains: int) -> int:
    """How many chains run at once in threads where the user leaves it open; the draws do not depend on it."""
    from joblib import cpu_count

    return 1 if _nested() else min(chains, cpu_count())


def _nested() -> bool:
    """Whether this process is one of several that share the cores."""
    return inside() or multiprocessing.current_process().name != "MainProcess"


def workers(chains: int, seconds: float, device: torch.device | None) -> int:
    """How many processes to use when the user leaves it open; the draws do not depend on it."""
    if chains == 1 or seconds < _WORTHWHILE or (device is not None and device.type != "cpu"):
        return 1
    from joblib import cpu_count

    return 1 if _nested() else min(chains, cpu_count())


def run_chains(chains: Sequence[Chain], processes: int, report: Report) -> tuple[list[DrawTable], bool, str | None]:
    """Run all chains; ``report(tables)`` is called as they grow.

    Returns the tables, whether Ctrl-C, SIGTERM or a KeyboardInterrupt of ``report`` ended the run, and why it ran in
    this process although more were asked for (None if it did not).
    """
    hold()  # from here on a signal ends the run between two iterations, and what was drawn is kept
    why = None
    if processes > 1:
        try:
            return *_side_by_side(chains, processes, report), None
        except _CannotTravel as error:
            why = f"the program cannot be sent to another process: {error}"
    return *_here(chains, report), why


class _CannotTravel(Exception):
    """A chain could not be pickled in this process, or unpickled in another."""


def _here(chains: Sequence[Chain], report: Report) -> tuple[list[DrawTable], bool]:
    tables = [DrawTable.of(chain) for chain in chains]

    def tick() -> None:
        report(tables)
        check()

    try:
        for chain, table in zip(chains, tables, strict=True):
            _run(chain, table, tick)
    except KeyboardInterrupt:
        return tables, True
    return tables, False


def _side_by_side(chains: Sequence[Chain], processes: int, report: Report) -> tuple[list[DrawTable], bool]:
    # Fresh interpreters do not import the user's script, so that no __main__ guard is needed; forking a process whose
    # torch has used threads can hang.
    try:
        contents = [pickled(chain) for chain in chains]
    except Exception as error:
        raise _CannotTravel(f"{type(error).__name__}: {error}") from error
    over = threading.Event()
    with scratch() as folder, ThreadPoolExecutor(processes, "ppl_gen-chain") as threads:
        paths = [folder / f"chain{i}" for i in range(len(chains))]
        tables = [DrawTable.of(chain, path) for chain, path in zip(chains, paths, strict=True)]
        made, stop = setting(), folder / "stop"
        asked = [request(_work, str(path), str(stop)) for path in paths]
        futures = [
            threads.submit(call, made, [task, content], None, None, over)
            for task, content in zip(asked, contents, strict=True)
        ]
        interrupted = False
        try:
            _wait(futures, tables, report)
        except KeyboardInterrupt:
            if any(chain.checkpoint is not None for chain in chains):
                stop.touch()
                _wait_for_ends(futures)
            interrupted = True
        finally:
            over.set()  # what still runs ends, and so do the threads that wait for it
            for future in futures:
                future.cancel()
        return [DrawTable(np.array(table.rows)) for table in tables], interrupted  # copies, as the files go


def _wait_for_ends(futures: Sequence[Future[tuple[str, Any]]]) -> None:
    """Until all chains have written what they have, at most an iteration later; a second Ctrl-C waits no longer."""
    pending = set(futures)
    with contextlib.suppress(KeyboardInterrupt):
        while pending:
            _, pending = wait(pending, timeout=_POLL)
            check()


def _wait(futures: Sequence[Future[tuple[str, Any]]], tables: Sequence[DrawTable], report: Report) -> None:
    pending = set(futures)
    while pending:
        finished, pending = wait(pending, timeout=_POLL, return_when="FIRST_COMPLETED")
        for future in finished:
            kind, content = future.result()
            if kind == "died":
                raise RuntimeError(f"a process that ran a chain ended ({died(content)}); try processes=1")
            if kind == "error":
                raise RuntimeError(f"a process could not run a chain:\n{content.decode(errors='replace')}")
            if error := pickle.loads(content):
                raise error
        report(tables)
        check()
