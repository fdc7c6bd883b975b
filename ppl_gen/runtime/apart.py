"""Calls in a process of their own: whatever ends that process is an answer, and takes nothing else along.

The one who calls may be a worker of any kind (loky's, dask's, ray's, a thread): it only passes bytes on and waits, so
it imports nothing of this package, and several calls of one worker do not share Pyro's parameter store. The process
stays for the next call, and goes after a while without one, or with whoever started it.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["IDLE", "call", "died", "inside", "pickled", "request", "serve", "setting"]

IDLE = 60.0  # seconds that a process stays for the next call
_POLL = 0.2  # seconds between two looks at the process above
_inside = False

# What decides how sums are shared out among threads, which their last bits depend on.
_NUMERIC = ("ATEN_", "BLIS_", "GOMP_", "KMP_", "MKL_", "NUMEXPR_", "OMP_", "OPENBLAS_", "VECLIB_")


def inside() -> bool:
    """Whether this is a process that was started for a call."""
    return _inside


def setting() -> dict[str, Any]:
    """What a process has to share with this one to compute the same: where modules are found, threads of libraries."""
    numeric = {name: value for name, value in os.environ.items() if name.startswith(_NUMERIC)}
    return {"path": list(sys.path), "numeric": numeric, "names": _NUMERIC, "idle": IDLE}


def pickled(value: Any) -> bytes:
    """``value`` as bytes; functions and classes of the user's script, or made in a function, by their code.

    Raises:
        whatever hinders pickling: a lock in a closure, say.
    """
    import cloudpickle

    return bytes(cloudpickle.dumps(value))


def request(function: Callable[..., bytes], *args: Any) -> bytes:
    """The call ``function(*args, *rest)`` as bytes, ``rest`` being what is sent beside it, bytes too."""
    return pickled((function, args))


def died(code: int) -> str:
    """What a process died of, by its exit code.

    >>> died(-9)
    'it was killed (SIGKILL), perhaps for lack of memory'
    >>> died(3)
    'it exited with code 3'
    """
    if code >= 0:
        return f"it exited with code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"it was killed ({name}){', perhaps for lack of memory' if name == 'SIGKILL' else ''}"


def _made() -> Callable[..., tuple[str, Any]]:
    """The caller: a function in a function, which is sent by its code and imports nothing of this package."""

    def call(
        setting: dict[str, Any], parts: list[Any], lost: str | None = None, owner: str | None = None, stop: Any = None
    ) -> tuple[str, Any]:
        """Make the call that ``parts`` (a request and what goes beside it) describe, in a process that is free.

        ``lost``: a file that is made where this process here dies while the call runs. ``owner``: a locked folder of
        whoever wants the answer; where it can be seen and its lock is gone, so is the call. ``stop``: an event that
        ends the call. Returns ("answer", bytes), ("error", traceback) or ("died", exit code).
        """
        import atexit
        import contextlib
        import json
        import os
        import queue
        import signal
        import subprocess
        import sys
        import threading
        import types

        kept = vars(sys.modules.setdefault("_ppl_gen_apart", types.ModuleType("_ppl_gen_apart")))
        mine = os.getpid()  # a fork has no claim on what its parent started
        lock, idle = kept.setdefault(f"lock{mine}", threading.Lock()), kept.setdefault(f"idle{mine}", {})

        def leave() -> None:
            for process, source in [pair for waiting in idle.values() for pair in waiting]:
                closed(process, source)
            idle.clear()

        with lock:
            if not kept.get(f"leaving{mine}"):
                kept[f"leaving{mine}"] = True
                atexit.register(leave)
        kind = json.dumps(setting, sort_keys=True)
        near = owner if owner is not None and os.path.exists(owner) else None
        code = (
            "import json, sys; made = json.loads(sys.argv[1]); sys.argv[1:] = []; "
            "sys.path.extend(p for p in made['path'] if p not in sys.path); "
            "from ppl_gen.runtime.apart import serve; serve(made['idle'], made['answers'])"
        )

        def started() -> Any:
            environment = {k: v for k, v in os.environ.items() if not k.startswith(tuple(setting["names"]))}
            signals = (signal.SIGINT, signal.SIGTERM)
            before = signal.pthread_sigmask(signal.SIG_BLOCK, signals) if hasattr(signal, "pthread_sigmask") else None
            reading, writing = os.pipe() if os.name == "posix" else (None, None)  # elsewhere only stdout is handed down
            given = json.dumps(setting | {"answers": writing})
            try:  # born deaf to signals, until it ignores them
                process = subprocess.Popen(
                    [sys.executable, "-P", "-c", code, given],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE if writing is None else None,
                    pass_fds=() if writing is None else (writing,),
                    env=environment | setting["numeric"],
                )
            except BaseException:
                if reading is not None:
                    os.close(reading)
                raise
            finally:
                if writing is not None:
                    os.close(writing)
                if before is not None:
                    signal.pthread_sigmask(signal.SIG_SETMASK, before)
            return process, process.stdout if reading is None else os.fdopen(reading, "rb")

        def received(source: Any) -> Any:
            head = source.read(8)
            size = int.from_bytes(head, "big")
            content = source.read(size) if len(head) == 8 else b""
            return content if len(head) == 8 and len(content) == size else None

        def listen(source: Any, answers: Any) -> None:
            for _ in range(2):  # that it has begun, and what came of it
                answer = None
                with contextlib.suppress(OSError, ValueError):
                    answer = received(source)
                answers.put(answer)
                if answer is None:
                    return

        def unwanted() -> bool:
            if stop is not None and stop.is_set():
                return True
            if near is None:
                return False
            try:
                import fcntl

                folder = os.open(near, os.O_RDONLY)
            except (ImportError, OSError):
                return not os.path.exists(near)
            try:
                fcntl.flock(folder, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return False
            finally:
                os.close(folder)
            return True

        def asked(process: Any, source: Any) -> tuple[bool, Any]:
            answers: Any = queue.Queue()
            threading.Thread(target=listen, args=(source, answers), daemon=True).start()
            begun = False
            with contextlib.suppress(OSError):  # it has died: there will be no answer
                message = [(lost or "").encode(), *(part if isinstance(part, bytes) else bytes(part) for part in parts)]
                process.stdin.write(len(message).to_bytes(8, "big"))
                for part in message:
                    process.stdin.write(len(part).to_bytes(8, "big"))
                    process.stdin.write(part)
                process.stdin.flush()
            while True:
                try:
                    answer = answers.get(timeout=0.2)
                except queue.Empty:
                    if unwanted():
                        process.kill()
                    continue
                if answer is None or begun:
                    return begun, answer
                begun = True

        def closed(process: Any, source: Any) -> int:
            process.kill()
            ended = process.wait()
            for pipe in (process.stdin, source):
                with contextlib.suppress(OSError):
                    pipe.close()
            return int(ended)

        for _ in range(100):
            with lock:
                waiting = idle.setdefault(kind, [])
                fresh = not waiting
                found = [] if fresh else [waiting.pop()]
            process, source = found[0] if found else started()
            try:
                begun, answer = asked(process, source)
            except BaseException:
                closed(process, source)
                raise
            if answer is not None:
                with lock:
                    idle[kind].append((process, source))
                return ("answer" if answer[:1] == b"1" else "error"), answer[1:]
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10.0)  # its pipes close a moment before it is gone
            ended = closed(process, source)
            if begun or fresh or unwanted():  # else it had left, being idle, in the very moment in which it was asked
                return "died", ended
        return "died", -1

    return call


call = _made()


def serve(idle: float, descriptor: int | None) -> None:
    """What the process does: one call after another, until none comes for ``idle`` seconds.

    Answers go to ``descriptor``; where there is none, to standard output, and what programs print to standard error.
    """
    global _inside
    _inside = True
    _be_deaf()
    source = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1) if descriptor is None else descriptor, "wb")
    if descriptor is None:
        os.dup2(2, 1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)  # a program that asks for input gets none
    os.close(nothing)
    requests: queue.SimpleQueue[list[bytes]] = queue.SimpleQueue()
    lost: list[str] = []

    def gone() -> None:
        for path in filter(None, lost):
            with contextlib.suppress(OSError):
                Path(path).touch()
        os._exit(1)

    def listen() -> None:
        while (message := _message(source)) is not None:
            requests.put(message)
        gone()

    def watch(above: int) -> None:
        while os.getppid() == above:
            time.sleep(_POLL)
        gone()

    for work in ((listen, ()), (watch, (os.getppid(),))):
        threading.Thread(target=work[0], args=work[1], daemon=True).start()
    while True:
        try:
            path, content, *rest = requests.get(timeout=idle)
        except queue.Empty:
            return
        lost[:] = [path.decode()]
        _send(answers, b"")
        answer = _answer(content, rest)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # the program's own, perhaps, and closed
                stream.flush()
        lost.clear()
        _send(answers, answer)


def _be_deaf() -> None:
    """A terminal sends Ctrl-C to all processes at once, a service manager SIGTERM: whoever asks decides."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))


def _answer(content: bytes, rest: list[bytes]) -> bytes:
    try:
        function, args = pickle.loads(content)
        return b"1" + bytes(function(*args, *rest))
    except BaseException:  # sys.exit() in a program, too, is an answer
        return b"0" + traceback.format_exc().encode()


def _message(source: BinaryIO) -> list[bytes] | None:
    parts = []
    head = source.read(8)
    for _ in range(int.from_bytes(head, "big")):
        size = source.read(8)
        content = source.read(int.from_bytes(size, "big"))
        if len(size) < 8 or len(content) < int.from_bytes(size, "big"):
            return None
        parts.append(content)
    return parts if len(head) == 8 else None


def _send(answers: BinaryIO, content: bytes) -> None:
    try:
        answers.write(len(content).to_bytes(8, "big") + content)
        answers.flush()
    except OSError:  # nobody is there
        os._exit(1)
