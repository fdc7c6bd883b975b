"""Worker processes that end when their parent does, heed nobody else, and leave no folders behind."""

from __future__ import annotations

import _thread
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from ppl_gen.runtime import interrupts
from ppl_gen.runtime.locks import locked

__all__ = ["heeding", "initializer", "scratch", "spawning", "sweep", "unworried"]

_PREFIX = "ppl_gen-scratch-"
_POLL = 0.2  # seconds between two looks at a file
_FRESH = 60.0  # seconds in which a folder may not be locked yet
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def initializer() -> dict[str, Any]:
    """What loky has to be given, so that every worker watches this process from its first moment on."""
    # Linux counts the end of the thread that started a worker as its parent's: only the main thread lasts.
    lasting = threading.current_thread() is threading.main_thread()
    return {"initializer": _BEGIN, "initargs": (os.getpid(), lasting)}


def _beginning() -> Callable[[int, bool], None]:
    """The first thing that a worker does: a function in a function, which is sent by its code.

    A function of a module would first have to be imported with this package, and the seconds that torch takes for that
    are those in which a dead parent would not be noticed.
    """

    def begin(parent: int, lasting: bool) -> None:
        import ctypes
        import os
        import signal
        import sys
        import threading
        import time

        def watch() -> None:
            while os.getppid() == parent:
                time.sleep(0.2)
            os._exit(1)

        if lasting and sys.platform == "linux":
            set_parent_death_signal = 1
            ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)  # also where no thread gets to run
        threading.Thread(target=watch, daemon=True, name="ppl_gen-watch").start()
        # A terminal sends Ctrl-C to all processes at once, a service manager SIGTERM: the parent decides.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))

    return begin


_BEGIN = _beginning()  # one object, by which loky knows its workers again


@contextlib.contextmanager
def heeding(flag: Path, owner: int) -> Iterator[None]:
    """In a worker of the process ``owner``: the appearance of the file ``flag`` is Ctrl-C here."""
    with interrupts.listening():
        if os.getpid() == owner or threading.current_thread() is not threading.main_thread():
            yield
            return
        over = threading.Event()
        told = False

        def heed(number: int, frame: FrameType | None) -> None:
            if told and not over.is_set():  # anything else comes from outside
                interrupts.notice(number, frame)

        def watch() -> None:
            nonlocal told
            while not over.wait(_POLL):
                if flag.exists():
                    told = True
                    _thread.interrupt_main()
                    return

        before = signal.signal(signal.SIGINT, heed)
        threading.Thread(target=watch, daemon=True, name="ppl_gen-flag").start()
        try:
            yield
        finally:
            over.set()
            signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def spawning() -> Iterator[None]:
    """While workers are started: they are born deaf to signals, until they ignore them."""
    from multiprocessing import resource_tracker

    if hasattr(signal, "pthread_sigmask"):
        resource_tracker.ensure_running()  # loky starts it on the way, and Python 3.11 lets signals in again then
    with _deaf():
        yield


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def unworried() -> Iterator[None]:
    """Without two warnings of loky's and joblib's threads that concern nobody.

    A worker that has been idle for long may leave in the very moment in which a job is submitted; another is started in
    its place, with a warning. And results that nobody waits for after Ctrl-C are announced.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="A worker stopped while some jobs were given to the executor")
        warnings.filterwarnings("ignore", message=".*still being processed by the workers.*")
        yield


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder that is gone afterwards, whatever ends this process.

    A small process removes it when this one is killed. Where that is killed too, the next `scratch` does: a lock that
    the owner holds on the folder tells.

    >>> with scratch() as folder:
    ...     folder.is_dir()
    True
    >>> folder.exists()
    False
    """
    sweep()
    folder = Path(tempfile.gettempdir(), f"{_PREFIX}{uuid.uuid4().hex}")
    with _deaf():
        heir = subprocess.Popen([sys.executable, "-I", "-S", "-c", _HEIR, str(folder)], stdin=subprocess.PIPE)
    folder.mkdir(mode=0o700)  # not before somebody is there to remove it
    lock = locked(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        heir.communicate()  # what is still mapped, Windows keeps: it tries again
        if lock is not None:
            os.close(lock)


_HEIR = """
import shutil, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.stdin.read()
shutil.rmtree(sys.argv[1], ignore_errors=True)
"""


def sweep() -> None:
    """Remove the folders of processes that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # another's, or gone already
            if time.time() - folder.stat().st_mtime > _FRESH and (lock := locked(folder)) is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)
